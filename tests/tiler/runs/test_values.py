"""Pixels of every type at its extremes, NaN, infinity, nodata: every engine against torch on the whole image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import EngineError, NotFiniteError, RasterError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.engines.pixel_types import find_refusal
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.nodata import NodataRule, find_missing
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import open_mosaic
from outsize.tiler.rasters.raster import Raster
from outsize.tiler.runs.inference import predict_window
from torch import Tensor, nn

from ...support.rasters import TRANSFORM, missing_of, write_geotiff
from ...support.runs import run, stored

SHAPE = (75, 91)
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")
BLOCK = (slice(30, 40), slice(20, 33))


class Scaled(nn.Module):
    """Casts its pixels to float32 first, as models with scaling do."""

    def __init__(self, bands: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(bands, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(torch.float32) / 1000)


@cache
def scaled(dtype: str, bands: int = 2) -> Network:
    return analyze_network(Scaled(bands).eval(), bands, dtype)


def extreme_image(dtype: str, bands: int = 2) -> np.ndarray:
    """Ordinary numbers, and a block of the least and the greatest that the type has."""
    kind = np.dtype(dtype)
    image = np.random.default_rng(0).integers(1, 120, (bands, *SHAPE)).astype(kind)
    if kind.kind == "f":
        limits = np.finfo(kind)
        image[0][BLOCK], image[1][BLOCK] = min(float(limits.max), 9e19), max(float(limits.min), -9e19)
        image[:, 50, 50] = limits.tiny
    else:
        image[0][BLOCK], image[1][BLOCK] = np.iinfo(kind).max, np.iinfo(kind).min
        image[:, 50, 50] = np.iinfo(kind).max - 1
    return image


def write(folder: Path, image: np.ndarray, **options: Any) -> Raster:
    """As GeoTIFF, or as Zarr where GDAL of any version has no such type."""
    if image.dtype.name in ("float16", "int8", "int64", "uint64"):
        array = zarr.create_array(
            folder / "s.zarr",
            shape=image.shape,
            chunks=(1, 64, 64),
            dtype=image.dtype,
            dimension_names=("band", "y", "x"),
        )
        array[:] = image
        return open_raster(folder / "s.zarr", nodata=options.get("nodata"))
    return open_raster(write_geotiff(folder / "s.tif", image, **options))


def by_torch(network: Network, image: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
    """The module on the whole image, in torch, its missing pixels 0 before and NaN after."""
    if missing is not None:
        image = np.where(missing, np.zeros((), image.dtype), image)
    with torch.no_grad():
        found = network.module(torch.from_numpy(image)[None])[0]
        found = (found.float() if found.dtype.itemsize == 2 else found).numpy().copy()
    if missing is not None:
        found[:, missing] = np.nan
    return found


def agrees(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal up to rounding, relative to the largest number around: extremes swallow their neighbours' digits."""
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    scale = np.nanmax(np.abs(wanted.astype(np.float64)))
    near = np.abs(np.nan_to_num(found.astype(np.float64) - wanted)) <= 1e-5 * np.maximum(
        np.nan_to_num(np.abs(wanted.astype(np.float64))), 10
    )
    ordinary = np.ones(SHAPE, bool)
    ordinary[26:44, 16:37] = False
    ordinary[46:55, 46:55] = False
    difference = np.nanmax(np.abs(found.astype(np.float64) - wanted))
    return bool(difference <= 1e-6 * scale and near[:, ordinary].all())


METHODS = [("openvino", "window"), ("openvino", "program"), ("torch", "window"), ("torch", "program")]
ALIKE = ("int8", "int32", "uint64")
"""Types that enter as others do: by windows only, but in the long run."""


@pytest.mark.parametrize(
    ("dtype", "engine", "method"),
    [
        pytest.param(dtype, *how, marks=pytest.mark.long if dtype in ALIKE and how[1] == "program" else ())
        for dtype in DTYPES
        for how in METHODS
    ],
)
def test_every_pixel_type_gives_what_torch_gives(
    tmp_path: Path, client: Client, dtype: str, engine: str, method: str
) -> None:
    """The least and the greatest numbers of the type, nodata, and of floats NaN and infinity, in one image."""
    image, network = extreme_image(dtype), scaled(dtype)
    missing = mark_missing(image)
    raster, out = write(tmp_path, image, nodata=0), tmp_path / "o.zarr"
    assert raster.dtype == np.dtype(dtype)
    summary = run(raster, network, out, client, engine=engine, method=method, core=64)
    assert agrees(stored(out), by_torch(network, image, missing))
    assert summary.undeclared_pixels == (40 if image.dtype.kind == "f" else 0)


IN_FEW = ("int16", "uint32", "float32")
"""Types that enter in another one, once did not enter at all, or have NaN."""
FEW_OR_LONG = [pytest.param(name, marks=() if name in IN_FEW else pytest.mark.long) for name in DTYPES]


def mark_missing(image: np.ndarray) -> np.ndarray:
    """Nodata, and of floats NaN and infinity in all bands, in an image; where they are."""
    missing = np.zeros(SHAPE, bool)
    image[:, 5:9, 70:75] = 0
    missing[5:9, 70:75] = True
    if image.dtype.kind == "f":
        image[:, 5:9, 60:64], image[0, 5:9, 64:70], image[1, 5:9, 64:70] = np.nan, np.inf, -np.inf
        missing[5:9, 60:70] = True
    return missing


def ordinary_image(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 120, (2, *SHAPE)).astype(dtype)


@pytest.mark.parametrize("dtype", FEW_OR_LONG)
def test_int8_counts_pixels_of_every_type(tmp_path: Path, client: Client, dtype: str) -> None:
    """In few bits nothing equals torch; the pixels that enter do, and those that are missing."""
    image = ordinary_image(dtype)
    missing = mark_missing(image)
    raster, out = write(tmp_path, image, nodata=0), tmp_path / "o.zarr"
    summary = run(raster, scaled(dtype), out, client, engine="openvino", precision="int8", core=64)
    assert summary.failed_tiles == ()
    wanted, found = by_torch(scaled(dtype), image, missing), stored(out)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.nanmax(np.abs(found - wanted)) < 0.1 * np.nanmax(np.abs(wanted))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", FEW_OR_LONG)
def test_fewer_bits_are_autocast_on_the_whole_image(tmp_path: Path, client: Client, dtype: str, precision: str) -> None:
    """Nodata, NaN, infinity, and the extremes that the precision itself can hold, once they are scaled."""
    image = ordinary_image(dtype)
    most = min(3e7, float(np.finfo(dtype).max if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max))
    image[0][BLOCK] = (
        np.nextafter(np.dtype(dtype).type(most), np.dtype(dtype).type(0)) if image.dtype.kind == "f" else int(most)
    )
    missing = mark_missing(image)
    raster, out = write(tmp_path, image, nodata=0), tmp_path / "o.zarr"
    summary = run(raster, scaled(dtype), out, client, engine="torch", precision=precision, core=64)
    with pytest.raises(UsageError, match=f"precision {precision} runs windows"):
        plan_tiles(raster, scaled(dtype), engine="torch", precision=precision, method="program")
    assert (summary.precision, summary.not_finite_pixels) == (precision, 0)
    bits: torch.dtype = getattr(torch, precision)
    with torch.autocast("cpu", bits):
        wanted = by_torch(scaled(dtype), image, missing)
    found = stored(out)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    rounding = 4 * torch.finfo(bits).eps
    assert np.nanmax(np.abs(found - wanted)) <= rounding * np.nanmax(np.abs(wanted))
    # What lies far from the extremes is no coarser for them.
    found, wanted = found[:, 46:], wanted[:, 46:]
    assert np.nanmax(np.abs(found - wanted)) <= rounding * np.nanmax(np.abs(wanted))


def test_results_that_are_not_finite_are_counted(tmp_path: Path, client: Client) -> None:
    """An index of two bands that are both 0 is no number; what no pixel is behind is not counted."""

    class Index(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :1] - x[:, 1:]) / (x[:, :1] + x[:, 1:])

    image = float_image()
    image[:, 10:12, 10:13], image[:, 60:70, 60:64], image[0, 30, 30], image[1, 30, 30] = 0, -9999, 1, -1
    raster = open_raster(write_geotiff(tmp_path / "s.tif", image, nodata=-9999))
    for engine in ("openvino", "torch"):
        network = analyze_network(Index().eval(), 2)
        summary = run(raster, network, tmp_path / f"{engine}.zarr", client, engine=engine, core=32)
        assert summary.not_finite_pixels == 7
        assert int(np.isnan(stored(tmp_path / f"{engine}.zarr")).sum()) == 6 + 40


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_pixels_of_yes_and_no_are_refused_by_name(tmp_path: Path, zarr_format: int) -> None:
    array = zarr.create_array(
        tmp_path / "s.zarr", shape=(2, 70, 90), chunks=(1, 64, 64), dtype=bool, zarr_format=zarr_format
    )
    array[:] = True
    said = "pixels must be integers or real numbers, got bool; convert them first"
    with pytest.raises(RasterError, match=f"s.zarr: {said}"):
        open_raster(tmp_path / "s.zarr", axes="byx")
    with pytest.raises(RasterError, match=f"^the array's {said}"):
        open_raster(np.ones((2, 70, 90), bool))


def float_image(*places: tuple[int, int, int, float], bands: int = 2) -> np.ndarray:
    """Ordinary numbers, but for some (band, y, x, value)."""
    image = np.random.default_rng(0).normal(60, 20, (bands, *SHAPE)).astype(np.float32)
    for band, y, x, value in places:
        image[band, y, x] = value
    return image


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize(
    ("value", "nodata", "at"),
    [(np.nan, None, (3, 4)), (np.inf, -9999.0, (70, 90)), (-np.inf, np.nan, (3, 90)), (np.nan, np.nan, (70, 4))],
)
def test_what_is_not_finite_in_one_band_is_refused_wherever_it_lies(
    tmp_path: Path, client: Client, engine: str, value: float, nodata: float | None, at: tuple[int, int]
) -> None:
    """The start check looks at corners of sampled tiles; every worker looks at every window."""
    raster = open_raster(write_geotiff(tmp_path / "s.tif", float_image((1, *at, value)), nodata=nodata))
    said = rf"row {at[0]}, column {at[1]} holds {value:g} in band 2 of 2 .*--nodata-any \(any_band=True\)"
    with pytest.raises(NotFiniteError, match=said):
        run(raster, scaled("float32"), tmp_path / "o.zarr", client, engine=engine, core=32)
    window = Window(y=at[0] // 2, x=at[1] // 2, height=37, width=45)
    with pytest.raises(NotFiniteError, match=said):
        predict_window(raster, scaled("float32"), window, engine=engine)


def test_a_tile_that_the_start_check_does_not_sample_stops_the_run_too(tmp_path: Path, client: Client) -> None:
    image = np.random.default_rng(0).normal(60, 20, (2, 40, 1200)).astype(np.float32)
    network = scaled("float32")
    refused = 0
    for column in range(16, 1200, 300):
        marked = image.copy()
        marked[0, 20, column] = np.nan
        with pytest.raises(NotFiniteError, match=f"row 20, column {column} holds nan in band 1 of 2"):
            run(write_geotiff(tmp_path / "s.tif", marked), network, tmp_path / f"{column}.zarr", client, core=32)
        refused += 1
    assert refused == 4


def test_any_band_makes_it_nodata_with_its_reach(tmp_path: Path, client: Client) -> None:
    image = float_image((1, 30, 40, np.nan), (0, 5, 6, np.inf), (0, 60, 9, -9999), (1, 60, 9, np.nan))
    source = write_geotiff(tmp_path / "s.tif", image, nodata=-9999)
    raster, out = open_raster(source, any_band=True), tmp_path / "o.zarr"
    summary = run(raster, scaled("float32"), out, client, core=64, mark_nodata_context=True)
    missing = np.zeros(SHAPE, bool)
    missing[[30, 5, 60], [40, 6, 9]] = True
    assert agrees_with(stored(out), by_torch(scaled("float32"), image, missing))
    assert summary.undeclared_pixels == 3
    context = np.asarray(zarr.open_array(out, path="nodata_context")[:])
    assert context[28, 38] == 1
    assert context[20, 20] == 0
    # Declared in one band and not finite in the other, a pixel holds nothing in either.
    without = float_image((0, 60, 9, -9999), (1, 60, 9, np.nan))
    rule = open_raster(write_geotiff(tmp_path / "t.tif", without, nodata=-9999)).nodata_rule
    assert np.argwhere(find_missing(without, rule)).tolist() == [[60, 9]]


def agrees_with(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.allclose(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True))


def test_declared_values_are_not_counted(tmp_path: Path, client: Client) -> None:
    image = float_image((0, 9, 9, np.nan), (1, 9, 9, np.nan), (0, 12, 9, np.inf), (1, 12, 9, np.inf))
    raster = open_raster(write_geotiff(tmp_path / "s.tif", image, nodata=np.nan))
    assert run(raster, scaled("float32"), tmp_path / "o.zarr", client).undeclared_pixels == 1


def test_numbers_whose_sum_overflows_are_numbers() -> None:
    image = np.full((1, 4, 4), 3e38, np.float32)
    assert find_missing(image, NodataRule()) is None
    image[0, 1, 2] = np.nan
    assert np.argwhere(find_missing(image, NodataRule())).tolist() == [[1, 2]]


def test_an_undeclared_nodata_value_is_not_computed_with_where_it_would_overflow(
    tmp_path: Path, client: Client
) -> None:
    image = float_image()
    image[:, 10:20, 10:20] = np.finfo(np.float32).min
    source, network = write_geotiff(tmp_path / "s.tif", image), scaled("float32")
    said = r"pixels up to 1e\+20, got one of -3.4028\d*e\+38; if it means nodata, say so with --nodata -3"
    with pytest.raises(NotFiniteError, match=said):
        run(source, network, tmp_path / "o.zarr", client, engine="openvino")
    run(source, network, tmp_path / "t.zarr", client, engine="torch")
    with np.errstate(over="ignore"):
        assert agrees_with(stored(tmp_path / "t.zarr"), by_torch(network, image))


class Wide(nn.Module):
    """Of float64 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(2, 3, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.double() - 5_600_000)


class Wrapping(nn.Module):
    """Adds pixels in their own type, where they wrap round."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :1] + x[:, 1:]).float()


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :1].half() / 3).float()


@pytest.mark.parametrize(
    ("module", "dtype", "numbers", "reason"),
    [
        (Wide(), "float64", "float64", "the network computes in float64, and OpenVINO in float32"),
        (Wrapping(), "uint8", "float32", r"the network reckons with uint8 pixels \(aten.add\) before it casts them"),
        (Halved(), "float32", "float32", "the network computes in float16, and OpenVINO in float32"),
    ],
)
def test_a_network_that_openvino_would_compute_otherwise_runs_by_torch(
    tmp_path: Path, client: Client, module: nn.Module, dtype: str, numbers: str, reason: str
) -> None:
    image = np.random.default_rng(0).integers(100, 250, (2, *SHAPE)).astype(dtype)
    if dtype == "float64":
        image += 5_600_000 + np.random.default_rng(1).random((2, *SHAPE))
    network, raster = analyze_network(module.eval(), 2, dtype), write(tmp_path, image)
    plan = plan_tiles(raster, network)
    assert (plan.engine, plan.numbers) == ("torch", numbers)
    assert f"torch in {numbers} on cpu" in plan.explain()
    assert plan.engine_reason in plan.explain()
    wanted = by_torch(network, image)
    summary = run(raster, network, tmp_path / "o.zarr", client, engine=None)
    assert summary.engine == "torch"
    assert np.allclose(stored(tmp_path / "o.zarr"), wanted, rtol=1e-12)
    window = Window(y=9, x=9, height=30, width=30)
    assert np.allclose(predict_window(raster, network, window), wanted[:, 9:39, 9:39], rtol=1e-12)
    for asked in ({"engine": "openvino"}, {"precision": "int8"}):
        with pytest.raises(EngineError, match=f"{reason}.*; use --engine torch"):
            plan_tiles(raster, network, **asked)
    with pytest.raises(EngineError, match=reason):
        predict_window(raster, network, window, engine="openvino")
    assert find_refusal(scaled("uint8")) == ""


@pytest.mark.parametrize(
    ("dtype", "fill", "said"),
    [
        ("uint8", (0, -1), "got -1 for band 2"),
        ("uint8", (300, 0), "got 300 for band 1"),
        ("int16", (0, 40_000), "give one from -32768 to 32767"),
        ("float32", (np.nan, 0), "got nan for band 1"),
        ("float32", (1e39, 0), r"got 1e\+39 for band 1"),
        ("uint8", (0,), "one value a band, 2 bands, got 1 values"),
    ],
)
def test_a_fill_that_pixels_cannot_have_is_refused(
    tmp_path: Path, client: Client, dtype: str, fill: tuple[float, ...], said: str
) -> None:
    raster = write(tmp_path, np.random.default_rng(0).integers(1, 99, (2, *SHAPE)).astype(dtype))
    with pytest.raises(UsageError, match=said):
        run(raster, scaled(dtype), tmp_path / "o.zarr", client, fill=fill)
    assert not (tmp_path / "o.zarr").exists()
    with pytest.raises(UsageError, match=said):
        predict_window(raster, scaled(dtype), Window(y=0, x=0, height=9, width=9), fill=fill)


def test_nothing_in_a_mosaic_of_floats_is_taken_for_a_zero(tmp_path: Path) -> None:
    image = float_image()
    image[:, 10:12, 10:12] = np.nan
    beside = TRANSFORM @ TRANSFORM.translation(SHAPE[1], 0)
    paths = [
        write_geotiff(tmp_path / "a.tif", image),
        write_geotiff(tmp_path / "b.tif", float_image(), transform=beside),
    ]
    raster = open_mosaic(paths)
    assert raster.shape_yx == (SHAPE[0], 2 * SHAPE[1])
    missing = missing_of(raster)
    assert np.argwhere(missing).tolist() == [[y, x] for y in (10, 11) for x in (10, 11)]
