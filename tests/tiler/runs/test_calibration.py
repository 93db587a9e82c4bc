"""Calibration windows: spread over what is valid, the same each time, and of two parts that share none."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs import calibration
from outsize.tiler.runs.calibration import read_calibration, spread_windows
from torch import nn

from ...support.rasters import write_geotiff
from ...support.zoo import PlainUNet, alive


@pytest.fixture
def network() -> Network:
    return analyze_network(nn.Conv2d(3, 2, 3, padding=1).eval(), bands=3, dtype=torch.float32)


def positions(height: int, width: int) -> np.ndarray:
    """Each pixel tells where it is, and is nowhere 0."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([y + 1, x + 1, np.ones_like(x)])


def corner_of(image: np.ndarray) -> tuple[int, int]:
    return int(image[0, 0, 0]) - 1, int(image[1, 0, 0]) - 1


@pytest.mark.parametrize(
    "region", [Window(y=0, x=0, height=2003, width=1511), Window(y=701, x=97, height=311, width=900)]
)
def test_windows_lie_in_the_region_and_reach_its_every_part(network: Network, region: Window) -> None:
    windows = list(islice(spread_windows(network, (2003, 1511), region), 40))
    assert windows == list(islice(spread_windows(network, (2003, 1511), region), 40))
    assert all(region.contains(window) for window in windows)
    for axis in ("y", "x"):
        extent, first = (region.height, region.y) if axis == "y" else (region.width, region.x)
        places = sorted((getattr(window, axis) - first) / (extent - 256) for window in windows)
        assert places[0] < 0.1
        assert places[-1] > 0.9
        assert max(np.diff(places)) < 0.1


def test_windows_of_small_rasters_have_sizes_that_the_network_takes() -> None:
    network = analyze_network(alive(PlainUNet()).float(), bands=3)
    multiple = network.size_multiple
    assert multiple > 1
    for shape in ((9, 700), (101, 1), (multiple * 5 - 1, 255)):
        padded = network.padded_shape(shape)
        for window in islice(spread_windows(network, shape, Window.whole(shape)), 10):
            assert window.height % multiple == window.width % multiple == 0
            assert Window.whole(padded).contains(window)


def test_both_parts_are_spread_and_share_no_window(tmp_path: Path, network: Network) -> None:
    raster = open_raster(write_geotiff(tmp_path / "a.tif", positions(1009, 907)))
    found = read_calibration(raster, network, Window.whole(raster.shape_yx), (0, 0, 0))
    assert (len(found.calibrated), len(found.held_out)) == (32, 8)
    calibrated, held_out = ({corner_of(s.image) for s in part} for part in (found.calibrated, found.held_out))
    assert not calibrated & held_out
    assert len(calibrated) == 32
    assert {(y > 370, x > 320) for y, x in held_out} == {(a, b) for a in (False, True) for b in (False, True)}


def test_mostly_nodata_is_passed_over_and_what_is_left_is_filled(tmp_path: Path, network: Network) -> None:
    image = positions(1009, 907)
    image[:, 300:] = -1
    image[:, :, 500:550] = -1
    raster = open_raster(write_geotiff(tmp_path / "a.tif", image, nodata=-1))
    found = read_calibration(raster, network, Window.whole(raster.shape_yx), (7, 8, 9))
    samples = [*found.calibrated, *found.held_out]
    # Few windows lie in the upper part; all that are taken hold something valid first.
    assert sum(sample.missing_share <= 0.5 for sample in samples) >= 15
    assert all((sample.image != -1).all() for sample in samples)
    for sample in samples:
        if sample.missing is not None and sample.missing.any():
            assert (sample.image[:, sample.missing] == np.array([[7], [8], [9]])).all()


def test_a_raster_of_one_window_is_calibrated_on_and_leaves_none_over(tmp_path: Path, network: Network) -> None:
    raster = open_raster(write_geotiff(tmp_path / "a.tif", positions(97, 131)))
    found = read_calibration(raster, network, Window.whole(raster.shape_yx), (0, 0, 0))
    assert (len(found.calibrated), len(found.held_out)) == (1, 0)
    assert np.array_equal(found.calibrated[0].image, positions(97, 131))


def test_windows_that_cannot_be_read_are_passed_over(
    tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    raster, read = open_raster(write_geotiff(tmp_path / "a.tif", positions(607, 607))), calibration.read_filled

    def fail_above(*arguments: object) -> object:
        if arguments[2].y < 200:  # pyright: ignore[reportAttributeAccessIssue]
            raise RasterError("a damaged block")
        return read(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(calibration, "read_filled", fail_above)
    found = read_calibration(raster, network, Window.whole(raster.shape_yx), (0, 0, 0))
    assert len(found.calibrated) + len(found.held_out) == 40
    assert min(corner_of(sample.image)[0] for sample in found.calibrated) >= 200
    with pytest.raises(RasterError, match="a damaged block"):
        read_calibration(raster, network, Window(y=0, x=0, height=300, width=607), (0, 0, 0))
