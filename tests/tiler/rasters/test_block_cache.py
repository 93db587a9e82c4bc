"""Decoded blocks: the same pixels as without a cache, each block decoded about once, never more kept than allowed."""

from __future__ import annotations

import numpy as np
import pytest
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters import block_cache
from outsize.tiler.rasters.block_cache import BlockCache, BlockStore

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


def cached(store: BlockStore, block: tuple[int, int], reads: Reads, name: str = "image") -> BlockCache:
    return BlockCache(store, name, shape_yx=(101, 89), block=block, pixel_bytes=12, read=reads)


@pytest.mark.parametrize("together", [1, 5_000, 1 << 30])
@pytest.mark.parametrize("blocks", [0.5, 1, 3, 7, 1000])
@pytest.mark.parametrize("block", [(16, 16), (7, 23), (101, 5), (1, 89), (200, 200)])
def test_windows_are_what_the_raster_holds(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], blocks: float, together: int
) -> None:
    monkeypatch.setattr(block_cache, "READ_BYTES", together)
    reads, random = Reads(), np.random.default_rng(0)
    store = BlockStore(int(blocks * 3 * 4 * block[0] * block[1]))
    cache = cached(store, block, reads)
    for _ in range(40):
        y, x = int(random.integers(0, 101)), int(random.integers(0, 89))
        window = Window(y=y, x=x, height=int(random.integers(1, 102 - y)), width=int(random.integers(1, 90 - x)))
        bands = [slice(None), slice(1, 2), [2, 0, 2]][int(random.integers(3))]
        before = len(reads.windows)
        assert np.array_equal(cache.read(window, bands), IMAGE[(slice(None), *window.slices())][bands])
        assert store.held_bytes <= store.limit_bytes
        assert store.held_bytes == sum(kept.nbytes for kept in store._blocks.values())
        for read in reads.windows[before:]:
            whole = read.y % block[0] == 0 and read.x % block[1] == 0
            assert whole or read == window  # nothing of it can be kept


def test_what_is_kept_is_not_read_again_and_belongs_to_nobody_else() -> None:
    reads, store = Reads(), BlockStore(1 << 30)
    cache = cached(store, (16, 16), reads)
    cache.read(Window(y=10, x=10, height=20, width=20))[:] = -1
    assert reads.pixels == 32 * 32
    assert np.array_equal(cache.read(Window(y=0, x=0, height=32, width=32)), IMAGE[:, :32, :32])
    assert reads.pixels == 32 * 32
    cache.read(Window(y=0, x=0, height=101, width=89))
    assert reads.pixels == 101 * 89
    assert store.decoded_bytes == 12 * 101 * 89
    store.clear()
    cache.read(Window(y=0, x=0, height=1, width=1))
    assert reads.pixels == 101 * 89 + 16 * 16
    assert store.decoded_bytes == 12 * (101 * 89 + 16 * 16)


def test_rows_of_one_pixel_are_read_together_but_only_those_that_are_missing() -> None:
    reads = Reads()
    cache = cached(BlockStore(1 << 30), (1, 89), reads)
    cache.read(Window(y=40, x=3, height=20, width=5))
    cache.read(Window(y=30, x=50, height=50, width=5))
    assert [(window.y, window.height, window.width) for window in reads.windows] == [
        (40, 20, 89),
        (30, 10, 89),
        (60, 20, 89),
    ]


def test_a_window_beyond_the_limit_is_counted_and_leaves_what_is_kept() -> None:
    reads, store = Reads(), BlockStore(12 * 16 * 16 * 2)
    cache = cached(store, (16, 16), reads)
    cache.read(Window(y=0, x=0, height=16, width=32))
    kept = store.held_bytes
    cache.read(Window(y=10, x=10, height=10, width=40))  # two rows of four blocks
    assert reads.windows[-1] == Window(y=10, x=10, height=10, width=40)
    assert store.decoded_bytes == 12 * (16 * 32 + 32 * 64)
    assert store.held_bytes == kept


def test_arrays_share_one_limit_and_keep_their_own_blocks() -> None:
    one, other, store = Reads(), Reads(), BlockStore(12 * 16 * 16 * 3)
    first, second = cached(store, (16, 16), one, "a"), cached(store, (16, 16), other, "b")
    corner = Window(y=0, x=0, height=16, width=16)
    first.read(corner)
    second.read(corner)
    assert (one.pixels, other.pixels) == (256, 256)
    second.read(Window(y=16, x=0, height=16, width=32))
    first.read(corner)  # was used longest ago, and had to go
    assert (one.pixels, other.pixels) == (512, 768)
