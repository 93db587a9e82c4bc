"""The networks that outsize runs and trains; loaded on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "segmentation.mlm": ["load_model", "save_model"],
        "segmentation.model": [
            "Scaling",
            "SegmentationClass",
            "SegmentationModel",
            "as_tile_network",
            "describe_output",
        ],
        "segmentation.unet": ["UNet"],
    },
)
