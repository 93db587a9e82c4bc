"""Readers against rasterio, zarr and xarray."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.nodata import NodataRule, find_missing
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import open_mosaic, open_stack
from outsize.tiler.rasters.raster import read_filled
from outsize.tiler.system.file_state import states_of

from ...support.rasters import CRS, TRANSFORM, unique_pixels, write_geotiff

SHAPE = (3, 61, 83)


@pytest.fixture(scope="module")
def geotiff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geotiff(tmp_path_factory.mktemp("raster") / "unique.tif", unique_pixels(*SHAPE))


@given(st.integers(0, 60), st.integers(0, 82), st.data())
@settings(max_examples=40, deadline=None)
def test_geotiff_windows_equal_rasterio(geotiff: Path, y: int, x: int, data: st.DataObject) -> None:
    window = Window(
        y=y, x=x, height=data.draw(st.integers(1, SHAPE[1] - y)), width=data.draw(st.integers(1, SHAPE[2] - x))
    )
    raster = open_raster(geotiff)
    reader = raster.open_reader()
    with rasterio.open(geotiff) as dataset:
        expected = dataset.read(window=((y, y + window.height), (x, x + window.width)))
    assert np.array_equal(reader.read(window), expected)
    reader.close()


def test_a_geotiff_is_described_as_rasterio_does(geotiff: Path) -> None:
    raster = open_raster(geotiff)
    with rasterio.open(geotiff) as dataset:
        assert raster.shape == (dataset.count, dataset.height, dataset.width)
        assert raster.place.crs == dataset.crs
        assert raster.place.affine == dataset.transform
        assert raster.dtype == np.dtype(dataset.dtypes[0])
        assert raster.nodata is None


@pytest.mark.parametrize("axes", ["byx", "yxb", "ybx", "xyb"])
@pytest.mark.parametrize("version", [2, 3])
def test_zarr_of_any_axis_order_reads_the_same(tmp_path: Path, axes: str, version: int) -> None:
    image = unique_pixels(*SHAPE)
    stored = image.transpose(["byx".index(letter) for letter in axes])
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=stored.shape, chunks=(16, 16, 16), dtype=stored.dtype, zarr_format=version
    )
    array[:] = stored
    raster = open_raster(tmp_path / "a.zarr", axes=axes)
    window = Window(y=7, x=11, height=31, width=40)
    assert raster.shape == SHAPE
    assert np.array_equal(raster.open_reader().read(window), image[:, 7:38, 11:51])


@pytest.mark.parametrize("version", [2, 3])
def test_a_store_written_by_xarray_is_georeferenced(tmp_path: Path, version: int) -> None:
    image = unique_pixels(2, 20, 30)
    x = TRANSFORM.c + TRANSFORM.a * (np.arange(30) + 0.5)
    y = TRANSFORM.f + TRANSFORM.e * (np.arange(20) + 0.5)
    data = xarray.DataArray(image, dims=("band", "y", "x"), coords={"y": y, "x": x}, name="reflectance")
    dataset = data.to_dataset()
    dataset["spatial_ref"] = xarray.DataArray(0, attrs={"crs_wkt": rasterio.crs.CRS.from_string(CRS).to_wkt()})
    dataset["reflectance"].attrs["grid_mapping"] = "spatial_ref"
    dataset.to_zarr(tmp_path / "x.zarr", zarr_format=version, consolidated=version == 2)
    raster = open_raster(tmp_path / "x.zarr")
    assert raster.place.crs == rasterio.crs.CRS.from_string(CRS)
    assert raster.place.affine.almost_equals(TRANSFORM)
    assert np.array_equal(raster.open_reader().read(Window.whole((20, 30))), image)
    assert open_raster(tmp_path / "x.zarr" / "reflectance").place == raster.place


def test_what_is_no_raster_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.tif").write_text("not a raster")
    zarr.create_group(tmp_path / "empty.zarr")
    several = zarr.create_group(tmp_path / "several.zarr")
    for name in ("red", "green"):
        several.create_array(name, shape=(4, 4), dtype="u1")
    zarr.create_array(tmp_path / "nameless.zarr", shape=(3, 4, 5), dtype="u1")
    zarr.create_array(tmp_path / "line.zarr", shape=(3,), dtype="u1")
    write_geotiff(tmp_path / "complex.tif", unique_pixels(1, 4, 4, np.complex64))
    for name, words in {
        "missing.tif": "no such raster",
        "text.tif": "not a raster that GDAL can open",
        "empty.zarr": "must hold one raster array, it has none",
        "several.zarr": "it has green, red; name one",
        "nameless.zarr": "give --axes byx",
        "line.zarr": "2 or 3 dimensions",
        "complex.tif": "integers or real numbers",
        "": "not a raster",
    }.items():
        with pytest.raises(RasterError, match=words) as refusal:
            open_raster(tmp_path / name)
        assert "\n" not in str(refusal.value)
        assert str(tmp_path) in str(refusal.value)
    assert open_raster(tmp_path / "several.zarr/red").shape == (1, 4, 4)


def test_nodata_is_where_all_bands_hold_it() -> None:
    def nodata_mask(image: np.ndarray, value: float | None) -> np.ndarray | None:
        return find_missing(image, NodataRule(values=() if value is None else (value,)))

    image = np.array([[[0, 0, 5]], [[0, 1, 0]]])
    mask = nodata_mask(image, 0)
    assert mask is not None
    assert mask.tolist() == [[True, False, False]]
    assert nodata_mask(image, None) is None
    assert nodata_mask(image, 7) is None
    nan = np.array([[[np.nan, np.nan]], [[np.nan, 1]]])
    mask = nodata_mask(nan, float("nan"))
    assert mask is not None
    assert mask.tolist() == [[True, False]]
    assert nodata_mask(image, float("nan")) is None


def test_fill_stands_in_for_nodata_and_for_what_is_beyond_the_raster(tmp_path: Path) -> None:
    image = unique_pixels(2, 5, 6, np.uint16)
    image[:, 0, 0] = 0
    raster = open_raster(write_geotiff(tmp_path / "n.tif", image, nodata=0))
    filled = read_filled(raster.open_reader(), raster, Window(y=0, x=0, height=8, width=8), fill=(100, 200))
    expected = np.empty((2, 8, 8), np.uint16)
    expected[0], expected[1] = 100, 200
    expected[:, :5, :6] = image
    expected[:, 0, 0] = (100, 200)
    assert filled.image.dtype == np.uint16
    assert np.array_equal(filled.image, expected)
    assert filled.missing is not None
    missing = np.ones((8, 8), bool)
    missing[:5, :6] = False
    missing[0, 0] = True
    assert np.array_equal(filled.missing, missing)


def test_naip_and_sentinel_2_are_described_as_rasterio_does(shared_dir: Path) -> None:
    for path in [*shared_dir.glob("data/naip/*.tif"), *shared_dir.glob("data/sentinel2_rachel_carson/*.tif")]:
        raster = open_raster(path)
        with rasterio.open(path) as dataset:
            assert (raster.place.crs, raster.place.affine) == (dataset.crs, dataset.transform)
            window = Window(y=13, x=17, height=101, width=97)
            expected = dataset.read(window=((13, 114), (17, 114)))
        assert np.array_equal(raster.open_reader().read(window), expected)


def test_a_raster_is_found_again_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_geotiff(tmp_path / "a.tif", unique_pixels(1, 4, 4))
    group = zarr.create_group(tmp_path / "g.zarr")
    for name in ("red", "green"):
        group.create_array(name, shape=(4, 4), dtype="u1")
    monkeypatch.chdir(tmp_path)
    for source in ("a.tif", "g.zarr/red"):
        raster = open_raster(source)
        location = raster.location
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert open_raster(location).shape == raster.shape
        monkeypatch.chdir(tmp_path)


def test_one_file_has_one_identity_however_its_path_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_geotiff(tmp_path / "m.tif", unique_pixels(2, 20, 30))
    (tmp_path / "below").mkdir()
    (tmp_path / "link.tif").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    spellings = [str(path), "m.tif", "./m.tif", "below/../m.tif", "link.tif"]
    assert len({open_raster(spelling).identity for spelling in spellings}) == 1
    inside = ["GTIFF_DIR:1:m.tif", f"GTIFF_DIR:1:{path}"]
    assert len({open_raster(spelling).identity for spelling in inside}) == 1
    assert open_raster(inside[0]).identity != open_raster(path).identity
    for open_parts in (open_stack, open_mosaic):
        assert len({open_parts([spelling]).identity for spelling in spellings}) == 1
    before = open_raster(path).identity
    os.utime(path, (1, 1))
    assert open_raster(path).identity != before


def test_the_state_of_a_raster_changes_with_each_of_its_files(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "m.tif", unique_pixels(2, 20, 30))
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.create_group(tmp_path / "g.zarr")
        group.create_array(
            "image", data=unique_pixels(2, 20, 30), chunks=(2, 10, 10), dimension_names=("band", "y", "x")
        )
    for source, file in ((path, path), (tmp_path / "g.zarr", tmp_path / "g.zarr/image/c/0/1/2")):
        before, status = open_raster(source), file.stat()
        assert open_raster(source) == before
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        now = open_raster(source)
        assert now.identity == before.identity
        assert now.state != before.state
        for open_parts in (open_stack, open_mosaic):
            assert open_parts([path]).state == open_parts([path]).state != ""


def test_numbers_that_a_file_system_makes_up_count_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.touch()
    assert states_of([file])[0].endswith(f":{file.stat().st_ino}")
    disk = SimpleNamespace(mountpoint=str(tmp_path.resolve()), fstype="fuse.sshfs")
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: [disk])
    assert states_of([file]) == [f"{file.stat().st_ctime_ns}:"]
