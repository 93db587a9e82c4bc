"""The networks that outsize runs and trains; loaded on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
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
