"""The tile map's numbers: states, counts, pixels, pictures, throughput."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from outsize.tiler.base.geometry import Window
from outsize.tiler.cluster import backdrop
from outsize.tiler.cluster.backdrop import make_backdrop
from outsize.tiler.cluster.tile_map import (
    BUCKETS,
    DONE,
    FAILED,
    KEPT,
    LISTED,
    RUNNING,
    WAITING,
    History,
    TileMap,
    backdrop_message,
    begin_message,
    end_message,
    kept_cells,
    make_sketch,
    shrink,
    shrink_map,
    sketch_cell,
    tile_message,
)
from outsize.tiler.rasters.opening import open_raster

from ...support.rasters import damage, write_geotiff


def make_map(shape: tuple[int, int], core: int, todo: list[tuple[int, int]] | None = None) -> TileMap:
    counts = (-(-shape[0] // core), -(-shape[1] // core))
    kept = None if todo is None else kept_cells(counts, todo)
    return TileMap(
        begin_message(run="r", title="t", shape=shape, core=(core, core), counts=counts, kept=kept, at=100.0)
    )


def test_states_are_counted_and_pixels_are_those_of_the_cores() -> None:
    tiles = make_map((150, 205), 64, todo=[(0, 0), (2, 3), (1, 1), (2, 0)])
    assert tiles.count() == {"waiting": 4, "running": 0, "done": 0, "failed": 0, "kept": 8}
    assert tiles.pixels == 64 * 64 + 22 * 13 + 64 * 64 + 22 * 64
    tiles.apply(tile_message("r", (2, 3), "running", worker="a"), at=101)
    tiles.apply(tile_message("r", (0, 0), "running", worker="b"), at=101)
    assert tiles.count()["running"] == 2
    tiles.apply(tile_message("r", (2, 3), "done", seconds=1.5, worker="a"), at=102)
    assert tiles.pixels_done == 22 * 13
    assert (tiles.seconds[2, 3], tiles.done_by["a"]) == (1.5, 1)
    tiles.apply(tile_message("r", (2, 3), "done", seconds=1.5, worker="a"), at=102)  # twice is once
    assert tiles.pixels_done == 22 * 13
    tiles.lose("b")
    assert tiles.states[0, 0] == WAITING
    tiles.apply(tile_message("r", (1, 1), "failed", seconds=2, worker="b", error="no such band"), at=103)
    tiles.apply(tile_message("r", (0, 0), "running", worker="b"), at=103)
    assert (tiles.pixels_done, tiles.pixels_failed, tiles.done_by["b"]) == (22 * 13, 64 * 64, 0)
    said = tiles.to_json(now=104)
    assert said["failed"] == [{"row": 1, "column": 1, "error": "no such band"}]
    assert said["mpx_per_s"] == pytest.approx(22 * 13 / 3 / 1e6, abs=1e-4)
    # Since the first tile began, at 101; a failed tile is over, too.
    over = 22 * 13 + 64 * 64
    assert said["eta_s"] == pytest.approx((tiles.pixels - over) * 3 / over, abs=0.1)
    tiles.apply(end_message("r", "KeyboardInterrupt"), at=105)
    assert tiles.count() == {"waiting": 2, "running": 0, "done": 1, "failed": 1, "kept": 8}
    assert (tiles.to_json()["state"], tiles.to_json()["seconds"]) == ("KeyboardInterrupt", 5)


def test_a_failed_tile_that_is_done_after_all_counts_once() -> None:
    tiles = make_map((64, 128), 64)
    for state in ("failed", "done", "done"):
        tiles.apply(tile_message("r", (0, 0), state, seconds=1, worker="a", error="x" * (state == "failed")), at=110)
    assert (tiles.pixels_done, tiles.pixels_failed, tiles.done_by["a"], tiles.failures) == (64 * 64, 0, 1, {})


def test_set_up_is_no_time_of_tiles() -> None:
    tiles = make_map((64, 64 * 4), 64)
    assert tiles.eta_s(now=130) is None
    tiles.apply(tile_message("r", (0, 0), "running", worker="a"), at=130)
    tiles.apply(tile_message("r", (0, 0), "done", seconds=2, worker="a"), at=132)
    assert tiles.eta_s(now=132) == pytest.approx(3 * 2)
    assert tiles.rate(now=132) == pytest.approx(64 * 64 / 2)


def test_a_bounded_number_of_failures_and_buckets_is_kept() -> None:
    tiles = make_map((64, 64 * 6000), 64)
    for column in range(6000):
        state, error = ("failed", "x") if column % 2 else ("done", "")
        tiles.apply(tile_message("r", (0, column), state, error=error), at=100 + column / 2)
    assert len(tiles.failures) == LISTED
    assert tiles.count()["failed"] == 3000
    assert len(tiles.history.buckets) <= BUCKETS
    times, rates = tiles.history.rates(3100)
    widths = np.diff([0, *times])
    assert (widths * np.array(rates)).sum() * 1e6 == pytest.approx(3000 * 64 * 64)
    assert len(tiles.recent) < 100


def test_throughput_now_is_that_of_the_last_seconds() -> None:
    tiles = make_map((64, 64 * 200), 64)
    for column in range(100):
        tiles.apply(tile_message("r", (0, column), "done"), at=100 + 0.1 * column)
    for column in range(100, 110):
        tiles.apply(tile_message("r", (0, column), "done"), at=110 + 5 * (column - 99))
    assert tiles.rate(now=161) == pytest.approx(3 * 64 * 64 / 15)
    tiles.apply(end_message("r", "finished"), at=160)
    assert tiles.rate() == pytest.approx(110 * 64 * 64 / 60)


def test_the_curve_goes_on_where_no_tile_ends() -> None:
    history = History(0.0)
    history.add(5, 3_000_000)
    times, rates = history.rates(60.4)
    assert (times[-1], len(rates), rates[5]) == (60, 60, 3)
    assert rates[6:] == [0.0] * 54
    times, rates = history.rates(1e6)
    assert 1e6 - times[-1] < history.width_s
    assert len(rates) <= BUCKETS
    assert rates[0] * history.width_s == 3


def test_history_folds_without_losing_a_pixel() -> None:
    history = History(0.0)
    for second in range(10_000):
        history.add(second, second % 7)
    assert sum(history.buckets) == sum(second % 7 for second in range(10_000))
    assert len(history.buckets) <= BUCKETS
    assert history.width_s == 64


@pytest.mark.parametrize(("shape", "core"), [((150, 205), 64), ((1, 1), 64), ((300, 90), 100), ((700, 700), 7)])
def test_sketches_of_tiles_make_the_whole_picture(shape: tuple[int, int], core: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 1000, (4, *shape)).astype(np.uint16)
    tiles = make_map(shape, core)
    for row in range(tiles.counts[0]):
        for column in range(tiles.counts[1]):
            part = image[:, row * core : (row + 1) * core, column * core : (column + 1) * core]
            sketch = make_sketch(part, (core, core), tiles.counts)
            tiles.apply(tile_message("r", (row, column), "done", sketch=sketch))
    assert np.isfinite(tiles.sketch).all()
    assert core % tiles.cell[0] == 0
    assert np.array_equal(tiles.sketch, shrink(image, sketch_cell((core, core), tiles.counts)))


def test_a_cell_is_a_mean_and_nodata_is_clear() -> None:
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    assert np.array_equal(shrink(image, (4, 4)), [[13.5, 17.5], [45.5, 49.5]])
    missing = np.zeros((8, 8), bool)
    missing[:4, :4] = True
    missing[4, 4] = True
    found = shrink(image, (4, 4), missing)
    assert np.isnan(found[0, 0])
    assert found[1, 1] == pytest.approx((49.5 * 16 - 36) / 15)
    assert make_sketch(np.zeros((0, 0, 0)), (4, 4), (1, 1)) == b""


def test_a_backdrop_fills_what_no_tile_has_shown() -> None:
    tiles = make_map((128, 128), 64)
    tiles.apply(tile_message("r", (0, 0), "done", sketch=np.zeros((16, 16), np.float32).tobytes()))
    tiles.apply(backdrop_message("r", np.array([[1, 2], [3, 4]], np.float32)))
    assert [tiles.sketch[y, x] for y, x in ((0, 0), (0, 31), (31, 0), (31, 31))] == [0, 2, 3, 4]


def test_a_backdrop_shows_the_rows_of_a_raster(tmp_path: Any) -> None:
    rows, columns = np.indices((500, 700))
    image = (rows + columns)[None].astype(np.float32)
    image[:, :250, :350] = -1
    raster = open_raster(write_geotiff(tmp_path / "a.tif", image, nodata=-1, tiled=True, blockxsize=64, blockysize=64))
    grey = make_backdrop(raster, Window(y=100, x=200, height=300, width=256))
    assert grey is not None
    assert grey.shape == (64, 256)
    y, x = np.array([100 + (2 * i + 1) * 300 // 128 for i in range(64)])[:, None], 200 + np.arange(256)
    expected = np.where((y < 250) & (x < 350), np.nan, y + x)
    assert np.array_equal(grey, expected, equal_nan=True)


def test_a_damaged_block_leaves_a_gap_of_its_width(tmp_path: Any) -> None:
    image = np.random.default_rng(0).random((1, 512, 900), np.float32)
    path = write_geotiff(tmp_path / "a.tif", image, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    damage(path, (4, 3))
    grey = make_backdrop(open_raster(path), Window.whole((512, 900)))
    assert grey is not None
    cell = 4  # 900 px on at most 256 columns
    rows = np.array([(2 * row + 1) * 512 // 128 for row in range(64)]) // 64 == 4
    gap = np.zeros(grey.shape, np.bool_)
    gap[np.ix_(rows, np.arange(grey.shape[1]) * cell // 64 == 3)] = True
    assert np.array_equal(np.isnan(grey), gap)


def test_a_late_backdrop_is_shown(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raster = open_raster(write_geotiff(tmp_path / "a.tif", np.ones((1, 64, 64), np.float32)))
    truth, shown = backdrop.make_backdrop, list[Any]()

    def draw_slowly(*words: Any) -> Any:
        time.sleep(0.4)
        return truth(*words)

    monkeypatch.setattr(backdrop, "make_backdrop", draw_slowly)
    with backdrop.draw_backdrop(raster, Window.whole((64, 64)), shown.append):
        assert not shown
    assert len(shown) == 1
    with pytest.raises(KeyboardInterrupt), backdrop.draw_backdrop(raster, Window.whole((64, 64)), shown.append):
        raise KeyboardInterrupt
    assert len(shown) == 1


@pytest.mark.parametrize("side", [400, 7, 1])
def test_a_million_tiles_are_shrunk_to_what_a_screen_shows(side: int) -> None:
    tiles = make_map((1000, 1003), 1)
    tiles.states[:500] = DONE
    tiles.states[700, 800] = FAILED
    tiles.states[900, 3] = RUNNING
    tiles.states[:, 1000:] = KEPT
    tiles.seconds[:500] = 2
    blocks = shrink_map(tiles, side)
    assert max(blocks.states.shape) <= side
    f = blocks.factor
    assert blocks.states[700 // f, 800 // f] == FAILED
    assert blocks.states[900 // f, 3 // f] == (RUNNING if side > 1 else FAILED)
    if side == 400:
        assert (blocks.states == FAILED).sum() == 1
        assert (blocks.states[0, :-2] == DONE).all()
        assert blocks.states[-1, -1] == KEPT
        assert blocks.seconds[0, 0] == 2
        assert np.isnan(blocks.seconds[-1, 0])
    assert blocks.share[-1, 0] == (0 if side > 1 else pytest.approx((500 * 1003 + 500 * 3) / 1_003_000))
