"""Windows and grids: identities on awkward sizes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.geometry import Grid, Interval, Window, align_down, align_up, halve, order_cells

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


kinds = st.lists(st.sampled_from([(-3, ""), (-3, "a"), (-1, "b"), (0, "")]), min_size=1, max_size=12)


@given(kinds, kinds, st.integers(1, 5), st.sampled_from(["kinds first", "strips first", "turning"]))
def test_cells_come_by_kind_and_then_column_by_column_through_strips(
    rows: list[tuple[int, str]], columns: list[tuple[int, str]], strip_rows: int, way: str
) -> None:
    ranks = [sorted(set(columns)).index(kind) for kind in columns]

    def place(cell: tuple[int, int]) -> tuple[object, ...]:
        row, column = cell
        strip, rank = row // strip_rows, ranks[column]
        if way == "turning" and strip % 2:
            rank = -rank
        return (rows[row], *((rank, strip) if way == "kinds first" else (strip, rank)), column, row)

    cells = [(row, column) for row in range(len(rows)) for column in range(len(columns))]
    options = {"strips_first": way != "kinds first", "turning": way == "turning"}
    assert list(order_cells(rows, columns, strip_rows, **options)) == sorted(cells, key=place)


def test_an_order_keeps_nothing_as_long_as_its_grid() -> None:
    tracemalloc.start()
    try:
        assert sum(1 for _ in order_cells([0] * 1000, [0] * 1000, 4)) == 1_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # a list of the cells takes 99 MB


@given(extents, extents, extents, extents, st.integers(0, 2**32))
def test_pixels_of_chosen_cells_are_counted(height: int, width: int, cell_h: int, cell_w: int, seed: int) -> None:
    grid = Grid(shape=(height, width), cell=(cell_h, cell_w))
    chosen = np.random.default_rng(seed).random(grid.counts) < 0.5
    assert grid.count_pixels(chosen) == sum(grid.window(*at).pixels for at in grid if chosen[at])
