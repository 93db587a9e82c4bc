"""Decoded blocks of rasters, the last used ones kept and all counted: neighbours decode what they share once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from ..base.geometry import Grid, Window
from ..base.text import MB
from .nodata import Array

READ_BYTES = 8 * MB
"""Rows of blocks are read together up to that, since a block is often one row of pixels; one row always."""


class BlockStore:
    """Blocks of any number of arrays under one limit; for one thread at a time.

    Guarantee: the blocks kept never hold more than `limit_bytes` between two reads.

    Args:
        limit_bytes: of the blocks that are kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.decoded_bytes = 0
        """Of all blocks that were decoded so far, those decoded again counted again."""
        self._blocks: OrderedDict[Hashable, Array] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._blocks

    def take(self, key: Hashable) -> Array:
        """A kept block; it counts as the last used."""
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def keep(self, key: Hashable, pixels: Array) -> None:
        """Those that were not used for longest go where there are too many."""
        # A copy: a view would keep all that was read with it.
        self._blocks[key] = pixels.copy()
        self.held_bytes += pixels.nbytes
        while self.held_bytes > self.limit_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self.held_bytes -= dropped.nbytes

    def clear(self) -> None:
        """Forget all blocks, not what was counted."""
        self._blocks.clear()
        self.held_bytes = 0


class BlockCache:
    """Gives windows of one array out of whole blocks; for one thread at a time.

    Where not even the blocks beside each other in one row of a window can be kept, the window is read past the store:
    its blocks are decoded and counted, and nothing is held.

    Args:
        store: where blocks are kept.
        name: of the array, in the store.
        shape_yx: of the array.
        block: rows and columns of its blocks.
        pixel_bytes: of all its bands.
        read: (bands, height, width) of a window.
    """

    def __init__(
        self,
        store: BlockStore,
        name: Hashable,
        *,
        shape_yx: tuple[int, int],
        block: tuple[int, int],
        pixel_bytes: int,
        read: Callable[[Window], Array],
    ) -> None:
        self._store, self._name, self._read = store, name, read
        self._grid = Grid(shape=shape_yx, cell=block)
        self._pixel_bytes = pixel_bytes

    def read(self, window: Window, bands: slice | list[int] = slice(None)) -> Array:
        """(bands, height, width) of a non-empty window inside the array."""
        height, width = self._grid.cell
        rows = range(window.y // height, (window.rows.stop - 1) // height + 1)
        columns = range(window.x // width, (window.columns.stop - 1) // width + 1)
        row_bytes = self._area(rows[:1], columns).pixels * self._pixel_bytes
        if row_bytes > self._store.limit_bytes:
            self._store.decoded_bytes += self._area(rows, columns).pixels * self._pixel_bytes
            return self._read(window)[bands]
        result: Array | None = None
        together = max(1, READ_BYTES // row_bytes)
        across = [_overlap(column * width, width, window.x, window.columns.stop) for column in columns]
        for start in range(0, len(rows), together):
            some = rows[start : start + together]
            # All that these rows need is taken before anything is let go for it.
            found = self._blocks(some, columns)
            if result is None:
                like = found[some[0], columns[0]][bands]
                result = np.empty((like.shape[0], *window.shape), like.dtype)
            for row in some:
                to_y, from_y = _overlap(row * height, height, window.y, window.rows.stop)
                for column, (to_x, from_x) in zip(columns, across, strict=True):
                    pixels = found[row, column]
                    result[:, to_y, to_x] = pixels[bands, from_y, from_x]
                    if (key := (self._name, row, column)) not in self._store:
                        self._store.keep(key, pixels)
        assert result is not None
        return result

    def _blocks(self, rows: range, columns: range) -> dict[tuple[int, int], Array]:
        """All blocks of those rows and columns, in that order; what is not kept is decoded in few reads."""
        found: dict[tuple[int, int], Array] = {}
        wanted: list[tuple[range, tuple[int, int]]] = []
        above: dict[tuple[int, int], int] = {}
        """Runs of columns that the row before wants, by their places in `wanted`."""
        for row in rows:
            missing: list[int] = []
            for column in columns:
                if (key := (self._name, row, column)) in self._store:
                    found[row, column] = self._store.take(key)
                else:
                    missing.append(column)
            here: dict[tuple[int, int], int] = {}
            for run in _runs(missing):
                here[run] = above.get(run, len(wanted))
                if run in above:
                    wanted[above[run]] = range(wanted[above[run]][0].start, row + 1), run
                else:
                    wanted.append((range(row, row + 1), run))
            above = here
        height, width = self._grid.cell
        for tall, (first, last) in wanted:
            area = self._area(tall, range(first, last + 1))
            image = self._read(area)
            self._store.decoded_bytes += area.pixels * self._pixel_bytes
            for row in tall:
                y = row * height - area.y
                for column in range(first, last + 1):
                    x = column * width - area.x
                    found[row, column] = image[:, y : y + height, x : x + width]
        return found

    def _area(self, rows: range, columns: range) -> Window:
        """The pixels of those rows and columns of blocks."""
        first, last = self._grid.window(rows[0], columns[0]), self._grid.window(rows[-1], columns[-1])
        return Window(y=first.y, x=first.x, height=last.rows.stop - first.y, width=last.columns.stop - first.x)


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of neighbours in ascending positions."""
    for index, position in enumerate(positions):
        if index == 0 or positions[index - 1] != position - 1:
            first = position
        if index == len(positions) - 1 or positions[index + 1] != position + 1:
            yield first, position  # pyright: ignore[reportPossiblyUnboundVariable] - the first position begins a run


def _overlap(block: int, size: int, start: int, stop: int) -> tuple[slice, slice]:
    """What a block and a window [start, stop) share along one axis, in the window and in the block."""
    first, last = max(block, start), min(block + size, stop)
    return slice(first - start, last - start), slice(first - block, last - block)
