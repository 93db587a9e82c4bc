"""Normalisation that is exact under tiling: statistics measured once, then constants."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FrozenNorm(nn.Module):
    """y = (x - mean) * rstd * weight + bias for each channel; mean and rstd are constants, weight and bias are learnt.

    Batch normalisation whose statistics come from one calibration batch before training (`calibrating`) and never
    change after. A pixel's value then depends on nothing outside its receptive field, in training as in inference,
    and the whole folds into the convolution before it (`fold_norms`).

    Shapes: x and y are (batch, channels, height, width).
    """

    mean: Tensor
    rstd: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.is_calibrating = False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("rstd", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_calibrating:
            self.mean.copy_(x.mean((0, 2, 3)))
            self.rstd.copy_((x.var((0, 2, 3), unbiased=False) + self.eps).rsqrt())
        scale = self.rstd * self.weight
        shift = self.bias - self.mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """While open, a forward pass sets every FrozenNorm's statistics from the batch that reaches it."""
    norms = [module for module in model.modules() if isinstance(module, FrozenNorm)]
    for norm in norms:
        norm.is_calibrating = True
    try:
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.is_calibrating = False


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of a norm that is a constant per-channel affine map in eval mode, else None."""
    if isinstance(norm, FrozenNorm):
        scale = norm.rstd * norm.weight
        return scale, norm.bias - norm.mean * scale
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        return scale, (norm.bias if norm.bias is not None else 0.0) - norm.running_mean * scale
    return None


def fold_norms(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which each norm that directly follows a convolution in an nn.Sequential is folded into it.

    W' = W * scale, b' = b * scale + shift: the same function to rounding, with one pass over memory less per norm.
    """
    folded = copy.deepcopy(model).eval()
    for sequence in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(sequence) - 1):
            convolution, affine = sequence[index], _affine(sequence[index + 1])
            if not isinstance(convolution, nn.Conv2d) or affine is None:
                continue
            scale, shift = affine
            with torch.no_grad():
                convolution.weight.mul_(scale[:, None, None, None])
                old_bias = torch.zeros_like(scale) if convolution.bias is None else convolution.bias
                convolution.bias = nn.Parameter(old_bias * scale + shift)
            sequence[index + 1] = nn.Identity()
    return folded
