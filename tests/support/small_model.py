"""A model that is analysed and run in no time, for tests of what goes on around it."""

from __future__ import annotations

from pathlib import Path

import torch
from outsize.models import Scaling, SegmentationClass, SegmentationModel, UNet, save_model

BANDS = ("red", "green", "blue", "nir")


def save_small_model(path: Path, bands: tuple[str, ...] = BANDS) -> Path:
    """A U-Net of depth 1 with three classes, of the same weights each time."""
    torch.manual_seed(0)
    model = SegmentationModel(
        name=path.stem,
        network=UNet(len(bands), 3, (8, 12), norm="frozen"),
        bands=bands,
        scaling=Scaling(kind="min-max", subtract=(0.0,) * len(bands), divide=(255.0,) * len(bands)),
        fill=(0.0,) * len(bands),
        classes=tuple(SegmentationClass(name=n, colour=(90 * i, 80, 200)) for i, n in enumerate("abc")),
    )
    save_model(model, path)
    return path
