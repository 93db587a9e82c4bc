"""Window runs of a network by hand, and its whole image: what tiles are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from outsize.tiler.analysis.network import Network
from outsize.tiler.base.geometry import Grid, Window
from torch import Tensor


def padded_image(network: Network, shape: tuple[int, int], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn((1, 3, *shape), generator=generator, dtype=torch.float64)
    height, width = network.padded_shape(shape)
    return torch.nn.functional.pad(image, (0, width - shape[1], 0, height - shape[0]))


def run_window(network: Network, image: Tensor, core: Window, window: Window) -> Tensor:
    """The core, computed from a window of the (padded) image."""
    rows, columns = window.slices()
    with torch.no_grad():
        result = network.module(image[..., rows, columns])[0]
    top, left = int(window.y * network.scale[0]), int(window.x * network.scale[1])
    return result[:, core.y - top : core.y - top + core.height, core.x - left : core.x - left + core.width]


def run_whole(network: Network, image: Tensor) -> Tensor:
    with torch.no_grad():
        return network.module(image)[0]


def cores_of(network: Network, shape: tuple[int, int], cell: tuple[int, int]) -> Iterator[Window]:
    grid = Grid(shape=network.output_shape(shape), cell=cell)
    return (grid.window(*at) for at in grid)
