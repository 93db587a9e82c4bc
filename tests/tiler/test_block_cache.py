"""Decoded blocks: the same pixels as without a cache, each block decoded about once, never more kept than allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from outsize.tiler.block_cache import BlockCache
from outsize.tiler.geometry import Window
from outsize.tiler.network import analyze_network
from outsize.tiler.planner import plan_tiles
from outsize.tiler.raster import open_raster
from torch import Tensor, nn

IMAGE = np.arange(3 * 101 * 89, dtype=np.int32).reshape(3, 101, 89)


class Reads:
    """Answers windows of IMAGE and remembers them."""

    def __init__(self) -> None:
        self.windows: list[Window] = []

    def __call__(self, window: Window) -> np.ndarray:
        self.windows.append(window)
        return IMAGE[(slice(None), *window.slices())]

    @property
    def pixels(self) -> int:
        return sum(window.pixels for window in self.windows)


@pytest.mark.parametrize("blocks", [0.5, 1, 3, 7, 1000])
@pytest.mark.parametrize("block", [(16, 16), (7, 23), (101, 5), (1, 89), (200, 200)])
def test_windows_are_what_the_raster_holds(block: tuple[int, int], blocks: float) -> None:
    reads, random = Reads(), np.random.default_rng(0)
    limit = int(blocks * 3 * 4 * block[0] * block[1])
    cache = BlockCache(shape_yx=(101, 89), block=block, limit_bytes=limit, read=reads)
    for _ in range(40):
        y, x = int(random.integers(0, 101)), int(random.integers(0, 89))
        window = Window(y=y, x=x, height=int(random.integers(1, 102 - y)), width=int(random.integers(1, 90 - x)))
        assert np.array_equal(cache.read(window), IMAGE[(slice(None), *window.slices())])
        assert cache._bytes <= limit
        assert cache._bytes == sum(kept.nbytes for kept in cache._blocks.values())
    assert all(window.y % block[0] == 0 and window.x % block[1] == 0 for window in reads.windows)


def test_what_is_kept_is_not_read_again_and_belongs_to_nobody_else() -> None:
    reads = Reads()
    cache = BlockCache(shape_yx=(101, 89), block=(16, 16), limit_bytes=1 << 30, read=reads)
    cache.read(Window(y=10, x=10, height=20, width=20))[:] = -1
    assert reads.pixels == 32 * 32
    assert np.array_equal(cache.read(Window(y=0, x=0, height=32, width=32)), IMAGE[:, :32, :32])
    assert reads.pixels == 32 * 32
    cache.read(Window(y=0, x=0, height=101, width=89))
    assert reads.pixels == 101 * 89


class Blurred(nn.Module):
    """Looks ten pixels far."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = nn.Conv2d(2, 1, 21, padding=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.blur(x.float())


@pytest.mark.parametrize("core", [64, 128, 256, 512])
def test_the_plan_says_how_much_is_decoded(tmp_path: Path, core: int) -> None:
    values = np.random.default_rng(0).integers(0, 255, (2, 1200, 1100), dtype=np.uint8)
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=values.shape, chunks=(2, 128, 128), dtype="u1", dimension_names=["band", "y", "x"]
    )
    array[:] = values
    raster = open_raster(tmp_path / "a.zarr")
    plan = plan_tiles(raster, analyze_network(Blurred().eval(), bands=2, dtype="uint8"), core=core, memory="8GB")
    decoded = 0

    def read(window: Window) -> np.ndarray:
        nonlocal decoded
        decoded += window.pixels
        return values[(slice(None), *window.slices())]

    cache = BlockCache(shape_yx=raster.shape_yx, block=raster.block, limit_bytes=plan.cache_bytes, read=read)
    for at in plan.order():
        window = plan.tile(*at).window
        assert np.array_equal(cache.read(window), values[(slice(None), *window.slices())])
    # At the last rows and columns, which are of another kind, some of what the others have decoded is still there.
    assert 0.65 * plan.read_amplification < decoded / (1200 * 1100) <= plan.read_amplification
    assert decoded / (1200 * 1100) < 1.5
