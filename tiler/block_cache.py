"""Decoded blocks of a raster, the last used ones kept, so that neighbours decode what they share once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .geometry import Grid, Interval, Window
from .nodata import Array


class BlockCache:
    """Gives windows of a raster out of whole blocks, one row of blocks at a time; for one thread at a time.

    Args:
        shape_yx: of the raster.
        block: rows and columns of its blocks.
        limit_bytes: of the blocks that are kept.
        read: (bands, height, width) of a window of whole blocks.
    """

    def __init__(
        self, *, shape_yx: tuple[int, int], block: tuple[int, int], limit_bytes: int, read: Callable[[Window], Array]
    ) -> None:
        self._grid = Grid(shape=shape_yx, cell=block)
        self._limit_bytes, self._read = limit_bytes, read
        self._blocks: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._bytes = 0

    def read(self, window: Window) -> Array:
        """(bands, height, width) of a non-empty window inside the raster."""
        result: Array | None = None
        columns: dict[int, list[int]] = {}
        for row, column in self._grid.cells_touching(window):
            columns.setdefault(row, []).append(column)
        for row, wanted in columns.items():
            # All that this row needs is taken before anything is let go for it.
            found = {column: self._blocks[row, column] for column in wanted if (row, column) in self._blocks}
            for first, last in _runs([column for column in wanted if column not in found]):
                area = self._area(row, first, last)
                image = self._read(area)
                for column in range(first, last + 1):
                    rows, across = self._grid.window(row, column).slices(area)
                    found[column] = image[:, rows, across]
            for column in wanted:
                place, pixels = self._grid.window(row, column), found[column]
                if result is None:
                    result = np.empty((pixels.shape[0], *window.shape), pixels.dtype)
                shared = Window.from_intervals(_shared(place.rows, window.rows), _shared(place.columns, window.columns))
                result[(slice(None), *shared.slices(window))] = pixels[(slice(None), *shared.slices(place))]
                self._keep((row, column), pixels)
        assert result is not None
        return result

    def _area(self, row: int, first: int, last: int) -> Window:
        """The blocks of a row from the first to the last column."""
        left, right = self._grid.window(row, first), self._grid.window(row, last)
        return Window(y=left.y, x=left.x, height=left.height, width=right.columns.stop - left.x)

    def _keep(self, cell: tuple[int, int], pixels: Array) -> None:
        """Count a block as the last used; those that were not used for longest go where there are too many."""
        if cell in self._blocks:
            self._blocks.move_to_end(cell)
            return
        # A copy: a view would keep all that was read with it.
        self._blocks[cell] = pixels.copy()
        self._bytes += pixels.nbytes
        while self._bytes > self._limit_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self._bytes -= dropped.nbytes


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of neighbours in ascending positions."""
    for index, position in enumerate(positions):
        if index == 0 or positions[index - 1] != position - 1:
            first = position
        if index == len(positions) - 1 or positions[index + 1] != position + 1:
            yield first, position  # pyright: ignore[reportPossiblyUnboundVariable] - the first position begins a run


def _shared(a: Interval, b: Interval) -> Interval:
    return Interval(start=max(a.start, b.start), stop=min(a.stop, b.stop))
