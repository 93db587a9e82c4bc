"""outsize: CNNs whose activations, or whose output layer, outsize the device.

Everyday names are loaded on first use, so that importing the package does not import torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, _names = lazy_loader.attach(
    __name__,
    submod_attrs={
        "models": [
            "BinaryCrossEntropy",
            "CrossEntropy",
            "Dice",
            "HuberLoss",
            "OneAgainstAll",
            "Scaling",
            "SegmentationClass",
            "SegmentationModel",
            "SquaredLoss",
            "SumOfLosses",
            "UNet",
            "as_tile_network",
            "describe_output",
            "load_model",
            "save_model",
        ],
        "tiler": [
            "ClusterOptions",
            "Network",
            "OutputDescription",
            "Proof",
            "Raster",
            "ReadOptions",
            "RunSummary",
            "TilePlan",
            "TiledLoss",
            "TiledModule",
            "TilerError",
            "TrainPlan",
            "TrainingCluster",
            "TrainingMemory",
            "Window",
            "analyze_network",
            "copy_raster",
            "lazy_predict",
            "open_mosaic",
            "open_raster",
            "open_stack",
            "plan_tiles",
            "plan_training",
            "predict",
            "predict_window",
            "prove_network",
            "tile_checkpoint",
            "tile_loss",
        ],
    },
)
__all__ = [*_names, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]
