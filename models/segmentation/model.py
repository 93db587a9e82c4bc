"""A segmentation model: the network, with all that its numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...tiler.errors import UsageError
from ...tiler.store import OutputDescription
from .norm import fold_norms
from .scaling import Scaling

Output = Literal["class", "probability", "logits"]
OUTPUTS: tuple[Output, ...] = ("class", "probability", "logits")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationClass:
    """One class of the output."""

    name: str
    colour: tuple[int, int, int]
    """RGB, 0..255."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationModel:
    """A network with its bands, scaling, fill value and classes."""

    name: str
    network: nn.Module = field(repr=False)
    """(1, bands, h, w) scaled floats -> (1, classes, h, w) logits."""
    bands: tuple[str, ...]
    scaling: Scaling
    fill: tuple[float, ...]
    """Raw value of each band that stands in for nodata pixels."""
    classes: tuple[SegmentationClass, ...]
    sha256: str = ""
    """Of the weights file; empty for a model that was never saved."""
    architecture: str = ""
    """What builds the network, "package.module:factory"; empty for a UNet, whose files say it by themselves."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keyword arguments of the factory; plain JSON values."""

    def __post_init__(self) -> None:
        for what, values in (("scaling constants", self.scaling.subtract), ("fill values", self.fill)):
            if len(values) != len(self.bands):
                raise UsageError(f"a model of {len(self.bands)} bands needs as many {what}, got {len(values)}")
        if not 1 <= len(self.classes) <= 255:
            raise UsageError(f"a model has 1..255 classes (255 is nodata in class maps), got {len(self.classes)}")

    @property
    def parameters(self) -> int:
        """Numbers that were learnt."""
        # A network that was TorchScript keeps its own as buffers.
        learnt = list(self.network.parameters()) or list(self.network.buffers())
        return sum(tensor.numel() for tensor in learnt)


def describe_output(model: SegmentationModel, output: Output = "class") -> OutputDescription:
    """What an output of this model means: for `predict(..., description=...)`, so that names and colours are kept."""
    return OutputDescription(
        kind=output,
        model=model.name,
        model_sha256=model.sha256,
        classes=tuple(entry.name for entry in model.classes),
        colours=tuple(entry.colour for entry in model.classes),
    )


class TileNetwork(nn.Module):
    """Scaling, network and finishing step as one module: raw pixels in, finished pixels out.

    Shapes: (1, bands, h, w) in the raster's own dtype -> class (1, 1, h, w) uint8; probability (1, classes, h, w)
    uint8, round(254 p); logits (1, classes, h, w) float.
    """

    subtract: Tensor
    divide: Tensor

    def __init__(self, network: nn.Module, scaling: Scaling, output: Output, band_names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network = network
        self.output: Output = output
        self.band_names = band_names
        """Of the model: a raster that names its own is read in this order."""
        self.register_buffer("subtract", torch.tensor(scaling.subtract)[None, :, None, None])
        self.register_buffer("divide", torch.tensor(scaling.divide)[None, :, None, None])

    def logits(self, x: Tensor) -> Tensor:
        return self.network((x.to(self.subtract.dtype) - self.subtract) / self.divide)

    def finish(self, logits: Tensor) -> Tensor:
        if self.output == "class":
            return logits.argmax(dim=1, keepdim=True).to(torch.uint8)
        if self.output == "probability":
            return (logits.softmax(dim=1) * 254).round().to(torch.uint8)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.logits(x))


def as_tile_network(model: SegmentationModel, output: Output = "class") -> TileNetwork:
    """The model as one module in eval mode, its norms folded into the convolutions (same function to rounding).

    Raises:
        UsageError: an output other than class, probability or logits.
    """
    if output not in OUTPUTS:
        raise UsageError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    return TileNetwork(fold_norms(model.network), model.scaling, output, model.bands).eval()
