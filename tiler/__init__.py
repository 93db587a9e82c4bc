"""Exact tiled inference and training of CNNs on giant rasters.

Public names are loaded on first use, so that importing the package does not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cluster": ["ClusterOptions"],
        "errors": ["TilerError"],
        "geometry": ["Window"],
        "inference": ["lazy_predict", "predict_window"],
        "network": ["Network", "analyze_network"],
        "plan": ["TilePlan"],
        "planner": ["plan_tiles"],
        "proof": ["Proof", "prove_network"],
        "raster": ["Raster", "ReadOptions"],
        "raster_open": ["open_raster"],
        "raster_bands": ["BandMatch", "match_bands", "select_bands"],
        "raster_parts": ["open_mosaic", "open_stack"],
        "run": ["predict"],
        "run_summary": ["RunSummary"],
        "store": ["OutputDescription"],
        "tiled_autograd": ["TiledLoss", "TiledModule", "tile_checkpoint", "tile_loss"],
        "training_cluster": ["TrainingCluster"],
        "training_plan": ["TrainPlan", "TrainingMemory"],
        "training_planner": ["plan_training"],
        "transfer": ["copy_raster"],
    },
)
