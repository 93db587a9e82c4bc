"""Windows and grids: identities on awkward sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outsize.tiler.errors import UsageError
from outsize.tiler.geometry import Grid, Interval, Window, align_down, align_up, halve

extents = st.integers(1, 97)
positions = st.integers(-200, 200)


@given(extents, extents, extents, extents)
def test_cells_partition_the_grid(height: int, width: int, cell_h: int, cell_w: int) -> None:
    grid = Grid(shape=(height, width), cell=(cell_h, cell_w))
    covered = np.zeros((height, width), int)
    for at in grid:
        window = grid.window(*at)
        assert window.pixels > 0
        covered[window.slices()] += 1
    assert (covered == 1).all()
    assert len(list(grid)) == len(grid)


@given(extents, extents, extents, extents, positions, positions, extents, extents)
def test_cells_touching_are_those_that_share_a_pixel(
    height: int, width: int, cell_h: int, cell_w: int, y: int, x: int, h: int, w: int
) -> None:
    grid = Grid(shape=(height, width), cell=(cell_h, cell_w))
    window = Window(y=y, x=x, height=h, width=w)
    inside = window.clamp(grid.shape)
    expected = []
    for at in grid:
        cell = grid.window(*at)
        common_h = min(cell.rows.stop, inside.rows.stop) - max(cell.y, inside.y)
        common_w = min(cell.columns.stop, inside.columns.stop) - max(cell.x, inside.x)
        if common_h > 0 and common_w > 0:
            expected.append(at)
    assert grid.cells_touching(window) == expected


@given(positions, st.integers(1, 50))
def test_alignment_brackets_the_position(position: int, period: int) -> None:
    down, up = align_down(position, period), align_up(position, period)
    assert down % period == up % period == 0
    assert down <= position <= up
    assert up - down in (0, period)


@given(positions, positions, extents)
def test_clamping_keeps_exactly_the_inner_part(a: int, b: int, size: int) -> None:
    interval = Interval(start=min(a, b), stop=max(a, b))
    inside = set(range(interval.start, interval.stop)) & set(range(size))
    clamped = interval.clamp(size)
    assert set(range(clamped.start, clamped.stop)) == inside


@given(extents, extents, extents, extents, extents, extents)
def test_halves_are_the_whole_and_end_at_single_blocks(h: int, w: int, by: int, bx: int, uy: int, ux: int) -> None:
    whole = Window(y=3, x=5, height=h, width=w)
    found = halve(whole, (by, bx), (uy, ux))
    sides = align_up(by, uy), align_up(bx, ux)
    if not found:
        assert h <= sides[0]
        assert w <= sides[1]
        return
    second, first = found
    assert first.pixels + second.pixels == whole.pixels
    assert (first.y, first.x) == (whole.y, whole.x)
    assert (second.y - whole.y) % uy == (second.x - whole.x) % ux == 0
    assert min(first.pixels, second.pixels) > 0


def test_slices_are_relative_to_the_origin() -> None:
    window = Window(y=5, x=7, height=2, width=3)
    image = np.arange(400).reshape(20, 20)
    origin = Window(y=4, x=4, height=10, width=10)
    assert np.array_equal(image[origin.slices()][window.slices(origin)], image[window.slices()])


def test_impossible_rectangles_are_refused() -> None:
    with pytest.raises(UsageError, match="must be >= 0, got -1"):
        Window(y=0, x=0, height=-1, width=3)
    with pytest.raises(UsageError, match="must not end before it starts"):
        Interval(start=3, stop=2)
    with pytest.raises(UsageError, match="shape and cell must be >= 1"):
        Grid(shape=(0, 3), cell=(1, 1))
    with pytest.raises(UsageError, match="outside the grid of 2 x 2"):
        Grid(shape=(4, 4), cell=(2, 2)).window(2, 0)
