"""U-Net, defined for every image size from 1 x 1."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ....tiler.base.errors import UsageError
from .norm import FrozenNorm

Norm = Literal["none", "frozen"]


def _stage(channels_in: int, channels_out: int, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source in (channels_in, channels_out):
        convolution = nn.Conv2d(source, channels_out, 3, padding=1)
        # He initialisation keeps the variance of ReLU activations from layer to layer, so that no norm is needed.
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        layers += [convolution, FrozenNorm(channels_out)] if norm == "frozen" else [convolution]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with same-size convolutions: logits for every pixel of any image.

    Shapes: (batch, bands, h, w) float -> (batch, classes, h, w), for all h, w >= 1: it pools with ceil_mode, upsamples
    by exactly 2 (nearest) and crops to the skip's size, so no size needs padding.

    Args:
        bands: input channels.
        classes: output channels.
        widths: channels of each level, finest first; `len(widths) - 1` is the depth, the number of poolings.
        norm: "none", or "frozen" (see FrozenNorm). Both are exact under tiling in training.
        checkpointing: recompute each stage in backward instead of keeping its inner activations; the same gradients.

    Raises:
        UsageError: a size below 1.
    """

    def __init__(
        self,
        bands: int = 4,
        classes: int = 6,
        widths: tuple[int, ...] = (16, 32, 64, 128),
        norm: Norm = "none",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min((bands, classes, *widths), default=0) < 1 or not widths:
            raise UsageError(f"bands, classes and widths must be >= 1, got {bands}, {classes}, {widths}")
        if norm not in ("none", "frozen"):
            raise UsageError(f'norm must be "none" or "frozen", got {norm!r}')
        self.bands, self.classes, self.widths, self.norm = bands, classes, tuple(widths), norm
        self.checkpointing = checkpointing
        sources = (bands, *widths)
        self.encoder = nn.ModuleList(_stage(a, b, norm) for a, b in zip(sources, widths, strict=False))
        pairs = list(pairwise(widths))
        self.decoder = nn.ModuleList(_stage(fine + coarse, fine, norm) for fine, coarse in reversed(pairs))
        self.head = nn.Conv2d(widths[0], classes, 1)

    @property
    def depth(self) -> int:
        return len(self.widths) - 1

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, x, use_reentrant=False)
        return stage(x)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, stage in enumerate(self.encoder):
            x = self._run(stage, F.max_pool2d(x, 2, ceil_mode=True) if level else x)
            skips.append(x)
        for level, stage in zip(reversed(range(self.depth)), self.decoder, strict=True):
            skip = skips[level]
            x = F.interpolate(x, scale_factor=2, mode="nearest")[..., : skip.shape[-2], : skip.shape[-1]]
            x = self._run(stage, torch.cat([skip, x], dim=1))
        return self.head(x)
