"""The networks that outsize runs and trains; loaded on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "faceid.checkpoint": ["list_generations", "load_checkpoint", "save_checkpoint"],
        "faceid.errors": ["GalleryError", "HeadError", "HeadMemoryError"],
        "faceid.gallery": ["Answer", "Gallery", "Match"],
        "faceid.embedder_file": ["Embedder", "load_embedder"],
        "faceid.head": ["ShardedMarginHead"],
        "faceid.head_plan": ["HeadPlan", "plan_head"],
        "faceid.identification": ["measure_identification", "split_pictures"],
        "faceid.interchange": ["export_safetensors", "import_insightface"],
        "faceid.reference": ["compute_dense_loss"],
        "faceid.row_rules": ["SGD", "Momentum", "RowRMS", "RowRule"],
        "segmentation.losses": [
            "BinaryCrossEntropy",
            "CrossEntropy",
            "Dice",
            "HuberLoss",
            "OneAgainstAll",
            "SquaredLoss",
            "SumOfLosses",
        ],
        "faceid.verification": ["measure_folds", "measure_verification"],
        "segmentation.model": [
            "SegmentationClass",
            "SegmentationModel",
            "as_tile_network",
            "describe_output",
        ],
        "segmentation.scaling": ["Scaling"],
        "segmentation.sources": ["load_model", "save_model"],
        "segmentation.trust": ["ModelFileError"],
        "segmentation.unet": ["UNet"],
    },
)
