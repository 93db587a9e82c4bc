"""Exact tiled inference and training of CNNs on giant rasters.

Public names are loaded on first use, so that importing the package does not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cluster.client": ["ClusterOptions"],
        "base.errors": [
            "BudgetError",
            "DamagedError",
            "EngineError",
            "ExactnessError",
            "LabelError",
            "NotFiniteError",
            "OutputError",
            "RasterError",
            "TilerError",
            "UntileableError",
            "UntraceableError",
            "UsageError",
            "WorkerError",
        ],
        "base.geometry": ["Window"],
        "runs.inference": ["lazy_predict", "predict_window"],
        "analysis.network": ["Network", "analyze_network"],
        "output.options": ["WriteOptions"],
        "planning.options": ["PlanOptions"],
        "planning.plan": ["TilePlan"],
        "planning.planner": ["plan_tiles"],
        "runs.proof": ["Proof", "prove_network"],
        "rasters.raster": ["Raster", "ReadOptions"],
        "rasters.opening": ["open_raster"],
        "rasters.bands": ["BandMatch", "match_bands", "select_bands"],
        "rasters.parts": ["open_mosaic", "open_stack"],
        "runs.run": ["predict"],
        "runs.summary": ["RunSummary"],
        "output.store": ["OutputDescription"],
        "training.tiled_autograd": ["TiledLoss", "TiledModule", "tile_checkpoint", "tile_loss"],
        "training.cluster": ["TrainingCluster"],
        "training.plan": ["TrainPlan", "TrainingMemory"],
        "training.planner": ["plan_training"],
        "copying.transfer": ["copy_raster"],
    },
)
