"""Networks whose output is as large as the image only where the image's size is divisible by some k, and what they give
on an image that is padded to that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from outsize.tiler.analysis.network import Network
from torch import Tensor, nn
from torch.nn import functional as F

_Conv, _Back = nn.Conv2d, nn.ConvTranspose2d


def _stem(*rest: nn.Module, step: int = 4) -> nn.Module:
    """A patchify stem, and what follows it."""
    return nn.Sequential(_Conv(3, 6, step, step), nn.GELU(), _Conv(6, 6, 3, padding=1), *rest)


def _pooled(pool: nn.Module, factor: int) -> nn.Module:
    return nn.Sequential(
        _Conv(3, 6, 3, padding=1), pool, nn.ReLU(), _Conv(6, 2, 3, padding=1), nn.Upsample(None, factor)
    )


class Floored(nn.Module):
    """Joins a stem's result, enlarged, with what the image has of it: a crop by its own arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _Conv(3, 6, 4, 4), _Back(6, 3, 4, 4), _Conv(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, x = x.shape[-2] // 4 * 4, x[..., : x.shape[-1] // 4 * 4]
        return self.c(torch.cat([self.b(F.relu(self.a(x))), x[..., :y, :]], 1))


class Dense(nn.Module):
    """Other code for sizes that are not divisible: what it does there is never seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _stem(_Back(6, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        result = self.inner(x)
        return result if result.shape == (1, 2, *x.shape[2:]) else -result


FLOORED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "stem and transposed convolution": (lambda: _stem(_Back(6, 2, 4, 4)), 4),
    "stem and overlapping transposed convolution": (lambda: _stem(_Back(6, 2, 8, 4, padding=2)), 4),
    "stem and pixel shuffle": (lambda: _stem(_Conv(6, 32, 1), nn.PixelShuffle(4)), 4),
    "stem and bilinear": (lambda: _stem(nn.Upsample(scale_factor=4, mode="bilinear")), 4),
    "stem and aligned corners": (lambda: _stem(nn.Upsample(scale_factor=4, mode="bilinear", align_corners=True)), 4),
    "stem of other sides": (lambda: nn.Sequential(_Conv(3, 6, (2, 3), (2, 3)), _Back(6, 2, (2, 3), (2, 3))), 6),
    "even kernel and back": (lambda: nn.Sequential(_Conv(3, 6, 4, 2, 1), nn.ReLU(), _Back(6, 2, 4, 2, 1)), 2),
    "even kernels and back": (
        lambda: nn.Sequential(
            _Conv(3, 6, 4, 2, 1), _Conv(6, 6, 4, 2, 1), nn.ReLU(), _Back(6, 6, 4, 2, 1), _Back(6, 2, 4, 2, 1)
        ),
        4,
    ),
    "floor max pooling": (lambda: _pooled(nn.MaxPool2d(2), 2), 2),
    "floor average pooling by three": (lambda: _pooled(nn.AvgPool2d(3), 3), 3),
    "ceil pooling without a crop": (lambda: _pooled(nn.MaxPool2d(2, ceil_mode=True), 2), 2),
    "odd kernel and back": (lambda: nn.Sequential(_Conv(3, 6, 3, 2, 1), nn.ReLU(), _Back(6, 2, 2, 2)), 2),
    "kernels with gaps": (
        lambda: nn.Sequential(_Conv(3, 6, 2, 5), nn.ReLU(), _Back(6, 2, 2, 5, output_padding=3)),
        5,
    ),
    "crop by arithmetic": (Floored, 4),
    "other code for other sizes": (Dense, 4),
    "twice the pixels": (lambda: _stem(_Back(6, 2, 8, 8)), 4),
    "half the pixels": (lambda: _stem(_Back(6, 2, 2, 2)), 4),
    "three quarters of the pixels": (lambda: _stem(_Back(6, 2, 3, 3)), 4),
    "quarter of the pixels of eight": (lambda: _stem(_Conv(6, 6, 2, 2), _Back(6, 2, 2, 2)), 8),
}
"""By name: how to make one, and k."""


def make_image(network: Network, shape: tuple[int, int]) -> Tensor:
    """Random pixels in float64, without padding."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    return torch.randn((1, network.bands, *shape), generator=generator, dtype=torch.float64)


def pad_image(image: Tensor, multiple: int, fill: float = 0.0) -> Tensor:
    """As docs/explanation/exactness.md defines it: at bottom and right, to the multiple."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), value=fill)
