"""A tile's result equals the whole image's, in float64, for every network of the zoo; with less halo it does not."""

from __future__ import annotations

import pytest
import torch
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.geometry import Interval, Window, align_down

from ...support.analysed import analysed
from ...support.windows import cores_of, padded_image, run_whole, run_window
from ...support.zoo import ZOO, without_onednn

CASES = (
    ((1, 1), (8, 8)),
    ((2, 3), (2, 2)),
    ((17, 31), (8, 8)),
    ((53, 67), (13, 29)),
    ((65, 129), (32, 64)),
)
"""(image, core): one pixel, primes, and one pixel more than the cores (last tiles of one pixel)."""


def fits(network: Network, shape: tuple[int, int]) -> bool:
    return all(extent >= smallest for extent, smallest in zip(shape, network.graph.smallest, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_every_tile_of_every_size_equals_the_whole_image(name: str) -> None:
    network = analysed(name)
    compared = 0
    for shape, cell in CASES:
        if not fits(network, shape):
            continue
        image = padded_image(network, shape)
        whole = run_whole(network, image)
        for core in cores_of(network, shape, cell):
            tile = run_window(network, image, core, network.input_window(core, shape))
            rows, columns = core.slices()
            assert tile.shape[1:] == core.shape
            assert (tile - whole[:, rows, columns]).abs().max() < 1e-10
            compared += core.pixels
    assert compared > 0


@pytest.mark.long
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("core", [16, 61, 128])
def test_tiles_of_a_larger_image_equal_the_whole(name: str, core: int) -> None:
    network = analysed(name)
    shape = (383, 397)
    image = padded_image(network, shape, seed=core)
    whole = run_whole(network, image)
    for wanted in cores_of(network, shape, (core, core)):
        tile = run_window(network, image, wanted, network.input_window(wanted, shape))
        rows, columns = wanted.slices()
        assert (tile - whole[:, rows, columns]).abs().max() < 1e-10


def cut_windows(network: Network, core: Window, shape: tuple[int, int]) -> dict[str, Window]:
    """The core's window with one pixel less at the end, or one alignment step less at the start, of each side that is
    not the image's edge."""
    window = network.input_window(core, shape)
    height, width = network.padded_shape(shape)
    multiple = network.size_multiple
    cuts: dict[str, Window] = {}
    for axis, extent in ((0, height), (1, width)):
        interval = (window.rows, window.columns)[axis]
        other = (window.columns, window.rows)[axis]
        step = max(network.stride[axis], multiple)
        shorter: dict[str, Interval] = {}
        if interval.start > 0:
            shorter["start"] = Interval(start=interval.start + step, stop=interval.stop)
        if interval.stop < extent:
            shorter["stop"] = Interval(start=interval.start, stop=interval.stop - multiple)
        for side, cut in shorter.items():
            pair = (cut, other) if axis == 0 else (other, cut)
            cuts[f"{side} of axis {axis}"] = Window.from_intervals(*pair)
    return cuts


@pytest.mark.parametrize("name", [name for name in ZOO if name != "pointwise"])
def test_the_halo_cut_by_one_fails_on_every_side(name: str) -> None:
    network = analysed(name)
    shape = (160, 176)
    image = padded_image(network, shape)
    whole = run_whole(network, image)
    caught: dict[str, float] = {}
    for core in cores_of(network, shape, (32, 32)):
        for side, window in cut_windows(network, core, shape).items():
            top, left = int(window.y * network.scale[0]), int(window.x * network.scale[1])
            if top > core.y or left > core.x:
                continue  # the cut reaches into the core itself, which no one could miss
            tile = run_window(network, image, core, window)
            rows, columns = core.slices()
            expected = whole[:, rows, columns]
            worst = float("inf") if tile.shape != expected.shape else float((tile - expected).abs().max())
            caught[side] = max(caught.get(side, 0.0), worst)
    assert set(caught) == {f"{side} of axis {axis}" for side in ("start", "stop") for axis in (0, 1)}
    assert min(caught.values()) > 1e-10, caught


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_nothing_outside_the_window_reaches_the_core(name: str, poison: float) -> None:
    """Independent of what the weights let through: NaN, or huge values where NaN could be swallowed."""
    network = analysed(name)
    shape = (96, 112)
    clean = padded_image(network, shape)
    with without_onednn():
        expected = run_whole(network, clean)
        for core in (Window(y=32, x=16, height=16, width=32), Window(y=0, x=0, height=5, width=7)):
            if not Window.whole(network.output_shape(shape)).contains(core):
                core = Window(y=8, x=8, height=8, width=8)
            needed = [
                axis.input_interval(interval).clamp(extent)
                for axis, interval, extent in zip(
                    network.axes, (core.rows, core.columns), network.padded_shape(shape), strict=True
                )
            ]
            rows, columns = Window.from_intervals(*needed).slices()
            poisoned = torch.full_like(clean, poison)
            poisoned[..., rows, columns] = clean[..., rows, columns]
            core_rows, core_columns = core.slices()
            got = run_whole(network, poisoned)[:, core_rows, core_columns]
            assert torch.isfinite(got).all()
            assert (got - expected[:, core_rows, core_columns]).abs().max() < 1e-10


def test_the_needed_interval_is_tight_for_the_unet() -> None:
    """NaN in the outermost needed row or column reaches the core: the halo is not larger than it must be."""
    network = analysed("unet depth 3")
    shape, core = (160, 160), Window(y=64, x=64, height=16, width=16)
    rows, columns = (
        axis.input_interval(interval) for axis, interval in zip(network.axes, (core.rows, core.columns), strict=True)
    )
    core_rows, core_columns = core.slices()
    with without_onednn():
        for y, x in ((rows.start, None), (rows.stop - 1, None), (None, columns.start), (None, columns.stop - 1)):
            image = padded_image(network, shape)
            if y is not None:
                image[..., y, :] = float("nan")
            else:
                image[..., x] = float("nan")
            assert torch.isnan(run_whole(network, image)[:, core_rows, core_columns]).any()


@pytest.mark.parametrize(("depth", "halo"), [(0, 2), (1, 8), (2, 22), (3, 46), (4, 94), (5, 190)])
def test_the_unets_halo_is_the_known_one(depth: int, halo: int) -> None:
    from outsize.models.segmentation.networks.unet import UNet
    from outsize.tiler.base.geometry import Halo

    network = analyze_network(UNet(1, 1, (2,) * (depth + 1)).eval(), bands=1)
    assert network.halo == Halo(top=halo, bottom=halo, left=halo, right=halo)
    assert network.stride == (2**depth, 2**depth)


def test_windows_start_on_the_stride_and_hold_the_footprint() -> None:
    network = analysed("strided")
    assert network.output_shape((100, 100)) == (34, 34)
    for core in cores_of(network, (100, 100), (7, 5)):
        window = network.input_window(core, (100, 100))
        assert window.y % network.stride[0] == 0
        assert window.y == align_down(window.y, 3)
        assert window.y <= 3 * core.y
        assert window.rows.stop >= min(100, 3 * core.rows.stop)
