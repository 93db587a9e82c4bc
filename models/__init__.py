"""The networks that outsize runs and trains; loaded on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "faceid.layer.checkpoint": ["list_generations", "load_checkpoint", "save_checkpoint"],
        "faceid.base.errors": ["GalleryError", "HeadError", "HeadMemoryError"],
        "faceid.gallery.gallery": ["Gallery"],
        "faceid.gallery.lookup": ["Answer", "Match"],
        "faceid.embedder.file": ["Embedder", "load_embedder"],
        "faceid.layer.head": ["ShardedMarginHead"],
        "faceid.layer.head_plan": ["HeadPlan", "plan_head"],
        "faceid.scores.identification": ["measure_identification", "split_pictures"],
        "faceid.layer.interchange": ["export_safetensors", "import_insightface"],
        "faceid.layer.reference": ["compute_dense_loss"],
        "faceid.layer.row_rules": ["SGD", "Momentum", "RowRMS", "RowRule"],
        "segmentation.training.losses": [
            "BinaryCrossEntropy",
            "CrossEntropy",
            "Dice",
            "HuberLoss",
            "OneAgainstAll",
            "SquaredLoss",
            "SumOfLosses",
        ],
        "faceid.scores.verification": ["measure_folds", "measure_verification"],
        "segmentation.networks.model": [
            "Model",
            "SegmentationClass",
            "SegmentationModel",
            "as_tile_network",
            "describe_output",
        ],
        "segmentation.networks.scaling": ["Scaling"],
        "segmentation.files.sources": ["load_model", "save_model"],
        "segmentation.networks.trust": ["ModelFileError"],
        "segmentation.networks.unet": ["UNet"],
    },
)
