"""iResNets: the residual networks of face recognition, with a normalisation that looks at one picture alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base.errors import HeadError
from .feature_norm import FeatureNorm

DEPTHS = {"r18": (2, 2, 2, 2), "r50": (3, 4, 14, 3), "r100": (3, 13, 30, 3)}
"""Blocks of the four stages, as ArcFace's networks have them."""
WIDTHS = (64, 64, 128, 256, 512)
"""Channels of the stem and of the stages, each of which halves height and width."""
GROUPS = 32
"""Of channels that are normalised together."""
REDUCTION = 2 ** (len(WIDTHS) - 1)
"""Pixels along an axis for one place of the last stage."""


class _Block(nn.Module):
    """norm, convolution, norm, PReLU, convolution (stride), norm; around it a shortcut."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        last = nn.GroupNorm(GROUPS, wider)
        nn.init.zeros_(last.weight)  # each block begins as its shortcut, so that a hundred layers start as a few
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.Conv2d(channels, wider, 3, 1, 1, bias=False),
            nn.GroupNorm(GROUPS, wider),
            nn.PReLU(wider),
            nn.Conv2d(wider, wider, 3, stride, 1, bias=False),
            last,
        )
        same = stride == 1 and channels == wider
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, wider, 1, stride, bias=False), nn.GroupNorm(GROUPS, wider))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class IResNet(nn.Module):
    """(batch, 3, height, width) -> (batch, dim): a stem at full size, four stages, one linear map of all places.

    Layout of ArcFace's iResNets (Deng et al. 2019, after Han et al. 2017), except: group norm in place of batch norm,
    so that a picture's features depend on no other picture, and a run not on how its batch is cut; the batch norm
    behind the last layer is `FeatureNorm`, without weights; no dropout.

    Args:
        depth: "r18", "r50" or "r100".
        dim: of a feature.
        height, width: of the pictures; multiples of 16.
        recompute: keep only what enters each block for the backward pass, and compute the rest again.

    Raises:
        HeadError: another depth or size.
    """

    def __init__(
        self, depth: str = "r50", dim: int = 512, height: int = 112, width: int = 112, *, recompute: bool = False
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise HeadError(f"depth must be one of {', '.join(DEPTHS)}, got {depth!r}")
        if min(height, width) < REDUCTION or height % REDUCTION or width % REDUCTION:
            raise HeadError(
                f"pictures of an iResNet must have sides that are multiples of {REDUCTION}, got {height} x {width}; "
                "crop or resize them"
            )
        self.recompute = recompute
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.GroupNorm(GROUPS, WIDTHS[0]), nn.PReLU(WIDTHS[0])
        )
        blocks: list[nn.Module] = []
        for stage, count in enumerate(DEPTHS[depth]):
            channels, wider = WIDTHS[stage : stage + 2]
            blocks += [_Block(channels, wider, 2)] + [_Block(wider, wider, 1) for _ in range(count - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.GroupNorm(GROUPS, WIDTHS[-1])
        self.project = nn.Linear(WIDTHS[-1] * (height // REDUCTION) * (width // REDUCTION), dim, bias=False)
        self.feature_norm = FeatureNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                # Nothing is random in a block, so no state of generators has to be kept.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return self.feature_norm(self.project(self.norm(x).flatten(1)))
