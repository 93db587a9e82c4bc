"""Regions, bounds and marked nodata context: parts of the whole image's result."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import Affine
from distributed import Client
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import OutputError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.output.store import CONTEXT, open_array, read_header
from outsize.tiler.output.values import touches_nodata
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.bounds import window_of_bounds
from outsize.tiler.rasters.georeference import Georeference
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.run import predict
from torch import Tensor, nn

from ...support.analysed import analysed
from ...support.rasters import TRANSFORM, has_all_chunks, write_geotiff
from ...support.zoo import alive


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 60, (3, height, width)).astype(np.float32)


def network_of(name: str) -> Network:
    return analysed(name, torch.float32)


NAMES = ["unet depth 2", "strided", "enlarged nearest"]
"""Of scale 1, less and more."""
REGIONS = [
    Window(y=0, x=0, height=1, width=1),
    Window(y=37, x=41, height=60, width=71),
    Window(y=100, x=0, height=67, width=151),
    Window(y=166, x=150, height=1, width=1),
]
"""The second begins off every stride; the third ends at two edges of the image. One pixel is hardest where the scale is
less than 1."""


@pytest.mark.parametrize(
    ("name", "regions"), [(name, REGIONS if name == "strided" else REGIONS[1:3]) for name in NAMES], ids=NAMES
)
def test_a_region_equals_the_same_pixels_of_the_whole(
    tmp_path: Path, client: Client, name: str, regions: list[Window]
) -> None:
    image = image_of(167, 151)
    source = write_geotiff(tmp_path / "s.tif", image)
    network = network_of(name)
    with torch.no_grad():
        whole = network.module(torch.from_numpy(image)[None])[0].numpy()
    scale = network.scale
    for number, region in enumerate(regions):
        out = tmp_path / f"{number}.zarr"
        summary = predict(source, network, out, client=client, engine="torch", core=64, region=region)
        y, x = int(region.y * scale[0] // 1), int(region.x * scale[1] // 1)
        stop_y = int(-(-(region.y + region.height) * scale[0] // 1))
        stop_x = int(-(-(region.x + region.width) * scale[1] // 1))
        got = open_array(out, "logits")[:]
        assert got.shape[1:] == (stop_y - y, stop_x - x)
        assert summary.pixels == got[0].size
        np.testing.assert_allclose(got, whole[:, y:stop_y, x:stop_x], rtol=0, atol=1e-5 * np.abs(whole).max())
        # A shifted region must not pass for the right one.
        if got[0].size > 1:
            assert not np.allclose(got[:, :-1], whole[:, y + 1 : stop_y, x:stop_x], atol=1e-3)
        place = open_raster(out / "logits").place
        corner = TRANSFORM * (x / float(scale[1]), y / float(scale[0]))
        assert np.allclose((place.affine.c, place.affine.f), corner)
        plan = TilePlan.from_json(read_header(out)["plan"])
        assert all(has_all_chunks(out, "logits", plan, plan.tile(*at)) for at in plan.grid)
        again = predict(source, network, out, client=client, engine="torch", core=64, region=region)
        assert again.tiles == 0


def test_another_region_does_not_continue_an_output(tmp_path: Path, client: Client) -> None:
    source = write_geotiff(tmp_path / "s.tif", image_of(90, 80))
    network = network_of("unet depth 2")
    region = Window(y=0, x=0, height=20, width=20)
    predict(source, network, tmp_path / "o.zarr", client=client, engine="torch", region=region)
    for other in (None, Window(y=1, x=0, height=20, width=20)):
        with pytest.raises(OutputError, match="region"):
            predict(source, network, tmp_path / "o.zarr", client=client, engine="torch", region=other)


@pytest.mark.parametrize(
    "region",
    [Window(y=0, x=0, height=91, width=1), Window(y=-1, x=0, height=5, width=5), Window(y=3, x=3, height=0, width=5)],
)
def test_a_region_outside_is_refused(region: Window) -> None:
    with pytest.raises(UsageError, match="inside the raster of 90 x 80 px, got"):
        plan_tiles((3, 90, 80), network_of("unet depth 2"), region=region)


def test_a_raster_of_absurd_extent_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="more than 50000 tiles along one side"):
        plan_tiles((3, 2_000_000_000, 512), network_of("unet depth 2"))
    region = Window(y=1_500_000_000, x=0, height=300, width=300)
    plan = plan_tiles((3, 2_000_000_000, 512), network_of("unet depth 2"), region=region)
    assert plan.tile(0, 0).core.y == 1_500_000_000


PLACE = Georeference(crs_wkt=None, transform=(2.5, 0, 1000, 0, -2.5, 9000))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((1000, 8750, 1250, 9000), Window(y=0, x=0, height=100, width=100)),
        ((1001, 8990, 1002, 8999), Window(y=0, x=0, height=4, width=1)),
        ((0, 8999.9, 1000.1, 99999), Window(y=0, x=0, height=1, width=1)),
        ((1010 + 1e-9, 8980 - 1e-9, 1020 + 1e-9, 8990 + 1e-9), Window(y=4, x=4, height=4, width=4)),
    ],
)
def test_bounds_are_the_pixels_that_they_touch(bounds: tuple[float, float, float, float], expected: Window) -> None:
    assert window_of_bounds(PLACE, bounds, (100, 100)) == expected


def test_bounds_on_a_south_up_and_on_a_rotated_grid() -> None:
    south_up = Georeference(crs_wkt=None, transform=(1, 0, 0, 0, 1, 0))
    assert window_of_bounds(south_up, (2, 3, 5, 7), (10, 10)) == Window(y=3, x=2, height=4, width=3)
    turn = Affine.rotation(90)
    turned = Georeference(crs_wkt=None, transform=(turn.a, turn.b, 0, turn.d, turn.e, 0))
    assert window_of_bounds(turned, (-4, 2, -1, 3), (10, 10)) == Window(y=1, x=2, height=3, width=1)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((2000, 8750, 2250, 9000), "touch the raster's 1000,8750,1250,9000, got 2000,8750"),
        ((1100, 8750, 1000, 9000), "west < east"),
    ],
)
def test_bounds_beside_the_raster_are_refused(bounds: tuple[float, float, float, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        window_of_bounds(PLACE, bounds, (100, 100))
    with pytest.raises(UsageError, match="needs a raster with a transform"):
        window_of_bounds(Georeference(), (0, 0, 1, 1), (100, 100))


def nodata_image(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    image = image_of(height, width)
    missing = np.zeros((height, width), bool)
    missing[40, 50] = missing[90:99, 60:64] = missing[-1, -1] = missing[0, 7] = True
    image[:, missing] = -1
    return image, missing


class Convolution(nn.Module):
    """A 5 x 3 window: its receptive field is known without any analysis."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 2, (5, 3), padding=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def test_context_of_a_convolution_is_the_dilated_nodata(tmp_path: Path, client: Client) -> None:
    image, missing = nodata_image(150, 130)
    source = write_geotiff(tmp_path / "s.tif", image, nodata=-1)
    network = analyze_network(alive(Convolution()).float(), bands=3)
    predict(source, network, tmp_path / "o.zarr", client=client, engine="torch", core=64, mark_nodata_context=True)
    padded = np.pad(missing, ((2, 2), (1, 1)))
    dilated = np.logical_or.reduce([padded[i : i + 150, j : j + 130] for i in range(5) for j in range(3)])
    expected = np.where(missing, 255, dilated.astype(np.uint8))
    assert np.array_equal(open_array(tmp_path / "o.zarr", CONTEXT)[:], expected)
    with pytest.raises(OutputError, match="nodata context"):
        predict(source, network, tmp_path / "o.zarr", client=client, engine="torch", core=64)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_marked_does_not_depend_on_nodata(tmp_path: Path, client: Client, name: str) -> None:
    image, _ = nodata_image(150, 130)
    source = write_geotiff(tmp_path / "s.tif", image, nodata=-1)
    network = network_of(name)
    results = []
    for number, fill in enumerate(((0.0, 0.0, 0.0), (5000.0, -3000.0, 900.0))):
        out = tmp_path / f"{number}.zarr"
        predict(source, network, out, client=client, engine="torch", core=64, fill=fill, mark_nodata_context=True)
        results.append(open_array(out, "logits")[:])
    context = open_array(tmp_path / "0.zarr", CONTEXT)[:]
    differs = (np.nan_to_num(results[0]) != np.nan_to_num(results[1])).any(0)
    assert differs.any()
    assert (context[differs] == 1).all()
    assert np.array_equal(context == 255, np.isnan(results[0]).all(0))
    assert (context == 0).any()
    # Not everything within sight is marked: at most some pixels more than those that really change.
    assert (context == 1).sum() <= 2.5 * differs.sum()


def test_context_ignores_what_lies_beyond_the_raster() -> None:
    network = analyze_network(alive(Convolution()).float(), bands=3)
    plan = plan_tiles((3, 30, 30), network, core=64, mark_nodata_context=True)
    tile = plan.tile(0, 0)
    missing = np.zeros(tile.window.shape, bool)
    assert touches_nodata(None, tile, plan).sum() == 0
    assert touches_nodata(missing, tile, plan).sum() == 0
    missing[29, 29] = True
    assert touches_nodata(missing, tile, plan).sum() == 3 * 2
    assert plan.scale == (str(Fraction(1)), str(Fraction(1)))
    assert TilePlan.from_json(plan.to_json()) == plan
