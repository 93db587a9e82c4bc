"""Windows and grids: pure arithmetic of rectangles and intervals, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A half-open run [start, stop) of pixels on one axis."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.stop < self.start:
            raise UsageError(f"an interval must not end before it starts, got [{self.start}, {self.stop})")

    @property
    def length(self) -> int:
        return self.stop - self.start

    def clamp(self, size: int) -> Interval:
        """The part inside [0, size)."""
        start = min(max(self.start, 0), size)
        return Interval(start=start, stop=max(start, min(self.stop, size)))

    def contains(self, other: Interval) -> bool:
        return self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A rectangle of pixels: rows [y, y + height), columns [x, x + width)."""

    y: int
    x: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 0 or self.width < 0:
            raise UsageError(f"a window's height and width must be >= 0, got {self.height} x {self.width}")

    @classmethod
    def from_intervals(cls, rows: Interval, columns: Interval) -> Window:
        return cls(y=rows.start, x=columns.start, height=rows.length, width=columns.length)

    @classmethod
    def whole(cls, shape_yx: tuple[int, int]) -> Window:
        return cls(y=0, x=0, height=shape_yx[0], width=shape_yx[1])

    @property
    def rows(self) -> Interval:
        return Interval(start=self.y, stop=self.y + self.height)

    @property
    def columns(self) -> Interval:
        return Interval(start=self.x, stop=self.x + self.width)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.height, self.width)

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def contains(self, other: Window) -> bool:
        return self.rows.contains(other.rows) and self.columns.contains(other.columns)

    def clamp(self, shape_yx: tuple[int, int]) -> Window:
        """The part inside a raster of `shape_yx`."""
        return Window.from_intervals(self.rows.clamp(shape_yx[0]), self.columns.clamp(shape_yx[1]))

    def slices(self, origin: Window | None = None) -> tuple[slice, slice]:
        """Row and column slices that cut this window out of an array covering `origin` (None: the whole)."""
        y, x = (origin.y, origin.x) if origin else (0, 0)
        return slice(self.y - y, self.y - y + self.height), slice(self.x - x, self.x - x + self.width)

    def __str__(self) -> str:
        return f"{self.y},{self.x},{self.height},{self.width}"


def halve(window: Window, block_yx: tuple[int, int], unit_yx: tuple[int, int]) -> list[Window]:
    """Both halves of a window along its side of more blocks, the first one last; none for a single block. The cut lies
    between units, counted from the window's corner, and as near blocks as they allow."""
    sides = [align_up(block, unit) for block, unit in zip(block_yx, unit_yx, strict=True)]
    shares = [extent / side for extent, side in zip(window.shape, sides, strict=True)]
    axis = int(shares[1] > shares[0])
    if shares[axis] <= 1:
        return []
    length, cut = window.shape[axis], int(-(-shares[axis] // 2)) * sides[axis]
    if axis:
        return [replace(window, x=window.x + cut, width=length - cut), replace(window, width=cut)]
    return [replace(window, y=window.y + cut, height=length - cut), replace(window, height=cut)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Halo:
    """Input pixels needed beyond a core that starts and ends on the stride, on each side."""

    top: int
    bottom: int
    left: int
    right: int

    def __str__(self) -> str:
        sides = (self.top, self.bottom, self.left, self.right)
        if len(set(sides)) == 1:
            return f"{self.top} px"
        return f"{self.top}/{self.bottom}/{self.left}/{self.right} px (top/bottom/left/right)"


def footprint(wanted: Interval, scale: Fraction) -> Interval:
    """The input pixels that lie under `wanted` output pixels of a network of that scale."""
    return Interval(start=wanted.start // scale, stop=-((-wanted.stop) // scale))


def align_down(position: int, period: int) -> int:
    """The largest multiple of `period` that is <= `position`."""
    return position // period * period


def align_up(position: int, period: int) -> int:
    """The smallest multiple of `period` that is >= `position`."""
    return -(-position // period) * period


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A partition of [0, height) x [0, width) into cells of `cell` pixels; the last row and column may be smaller."""

    shape: tuple[int, int]
    """(height, width) in pixels."""
    cell: tuple[int, int]
    """(height, width) of a whole cell in pixels."""

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or min(self.cell) < 1:
            raise UsageError(f"a grid's shape and cell must be >= 1, got shape {self.shape}, cell {self.cell}")

    @property
    def counts(self) -> tuple[int, int]:
        """(rows, columns) of cells."""
        return (-(-self.shape[0] // self.cell[0]), -(-self.shape[1] // self.cell[1]))

    def has(self, row: int, column: int) -> bool:
        """Whether the grid has that cell."""
        return 0 <= row < self.counts[0] and 0 <= column < self.counts[1]

    def window(self, row: int, column: int) -> Window:
        """The cell at (row, column)."""
        rows, columns = self.counts
        if not (0 <= row < rows and 0 <= column < columns):
            raise UsageError(f"cell ({row}, {column}) is outside the grid of {rows} x {columns} cells")
        y, x = row * self.cell[0], column * self.cell[1]
        return Window(y=y, x=x, height=min(self.cell[0], self.shape[0] - y), width=min(self.cell[1], self.shape[1] - x))

    def count_pixels(self, chosen: npt.NDArray[np.bool_]) -> int:
        """Pixels of the cells that are chosen, (rows, columns)."""
        heights, widths = (
            np.diff([*range(0, size, cell), size]) for size, cell in zip(self.shape, self.cell, strict=True)
        )
        return int(heights @ (chosen @ widths))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows, columns = self.counts
        return ((row, column) for row in range(rows) for column in range(columns))

    def __len__(self) -> int:
        rows, columns = self.counts
        return rows * columns

    def cells_touching(self, window: Window) -> list[tuple[int, int]]:
        """The (row, column) of every cell that shares a pixel with `window`, in row-major order."""
        inside = window.clamp(self.shape)
        if inside.pixels == 0:
            return []
        rows = range(inside.y // self.cell[0], (inside.y + inside.height - 1) // self.cell[0] + 1)
        columns = range(inside.x // self.cell[1], (inside.x + inside.width - 1) // self.cell[1] + 1)
        return [(row, column) for row in rows for column in columns]


def order_cells(
    row_kinds: Sequence[Any],
    column_kinds: Sequence[Any],
    strip_rows: int,
    *,
    strips_first: bool = False,
    turning: bool = False,
) -> Iterator[tuple[int, int]]:
    """Every (row, column) once: rows of one kind together, of these the columns of one kind, kinds in ascending order;
    and of those column by column through strips of some rows, so that blocks are decoded once for neighbours.

    Nothing as long as the grid is kept.

    Args:
        row_kinds: of each row, anything that can be sorted.
        strip_rows: rows of a strip; strips are counted from the first row of all.
        strips_first: all kinds of columns in one strip before the next strip; else all strips of one kind first.
        turning: every other strip goes from the last kind to the first, which spares a change of kind; only with
            `strips_first`.
    """
    columns_of = _by_kind(column_kinds)
    for rows in _by_kind(row_kinds):
        strips = [list(strip) for _, strip in groupby(rows, key=lambda row: row // strip_rows)]
        if strips_first:
            parts = [
                (strip, columns)
                for strip in strips
                for columns in columns_of[:: -1 if turning and strip[0] // strip_rows % 2 else 1]
            ]
        else:
            parts = [(strip, columns) for columns in columns_of for strip in strips]
        for strip, columns in parts:
            for column in columns:
                for row in strip:
                    yield row, column


def _by_kind(kinds: Sequence[Any]) -> list[list[int]]:
    """Indices of each kind."""
    found: dict[Any, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return [found[kind] for kind in sorted(found)]
