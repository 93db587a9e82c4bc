"""Zarr stores as others leave them: damaged metadata, other conventions, masks that are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rioxarray
import xarray
import zarr
from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.raster import Raster

from ...support.rasters import CRS, TRANSFORM, unique_pixels, write_geotiff


def read(raster: Raster) -> tuple[np.ndarray, np.ndarray]:
    window = Window.whole(raster.shape_yx)
    reader = raster.open_reader()
    image = reader.read(window)
    missing = reader.read_missing(window, image)
    return image, np.zeros(window.shape, bool) if missing is None else missing


def store(folder: Path, **attributes: Any) -> Path:
    group = zarr.create_group(folder / "s.zarr")
    array = group.create_array(
        "image",
        shape=(2, 20, 30),
        chunks=(2, 10, 10),
        dtype="i4",
        dimension_names=("band", "y", "x"),
        attributes=attributes,
    )
    array[:] = unique_pixels(2, 20, 30)
    return folder / "s.zarr"


def change(path: Path, **values: Any) -> None:
    metadata = json.loads((path / "image/zarr.json").read_text())
    metadata.update(values)
    (path / "image/zarr.json").write_text(json.dumps(metadata))


DAMAGE: dict[str, dict[str, Any]] = {
    "codec": {"codecs": [{"name": "nonsense"}]},
    "dtype": {"data_type": "nonsense"},
    "fill": {"fill_value": "nonsense"},
    "negative shape": {"shape": [2, -20, 30]},
    "text shape": {"shape": "large"},
    "dimension names": {"dimension_names": ["y", "x"]},
    "chunk of 0": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 10, 10]}}},
    "no pixels": {"shape": [2, 0, 30]},
    "too many bands": {"shape": [100_000_000, 20, 30]},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_metadata_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = store(tmp_path)
    change(path, **DAMAGE[what])
    for source in (path, path / "image"):
        with pytest.raises(RasterError) as refusal:
            open_raster(source)
        assert "\n" not in str(refusal.value)
        assert str(path) in str(refusal.value)


def test_metadata_of_another_kind_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "nonsense", "{}"):
        (tmp_path / "z.zarr").mkdir(exist_ok=True)
        (tmp_path / "z.zarr/zarr.json").write_text(text)
        with pytest.raises(RasterError):
            open_raster(tmp_path / "z.zarr")


@pytest.mark.parametrize("value", ["nonsense", "1 2 3", None, {"a": 1}, [1, 2], True])
def test_a_transform_that_is_none_counts_as_none(tmp_path: Path, value: Any) -> None:
    path = store(tmp_path, **{"spatial:transform": value, "grid_mapping": "spatial_ref"})
    reference = zarr.open_group(path).create_array("spatial_ref", shape=(), dtype="i4")
    reference.attrs.update({"GeoTransform": value, "crs_wkt": "nonsense"})
    place = open_raster(path).place
    assert (place.crs_wkt, place.transform) == (None, None)
    copy_raster(open_raster(path), tmp_path / "c.zarr")


@pytest.mark.parametrize(
    "attributes",
    [
        {"proj:code": CRS},
        {"proj:epsg": 32633},
        {"proj:wkt2": rasterio.crs.CRS.from_string(CRS).to_wkt(version="WKT2_2019")},
        {"crs": CRS},
    ],
)
def test_every_spelling_of_a_crs_is_read(tmp_path: Path, attributes: dict[str, Any]) -> None:
    assert open_raster(store(tmp_path, **attributes)).place.crs == rasterio.crs.CRS.from_string(CRS)


def test_a_crs_by_code_in_the_grid_mapping_is_read(tmp_path: Path) -> None:
    path = store(tmp_path, grid_mapping="spatial_ref")
    zarr.open_group(path).create_array("spatial_ref", shape=(), dtype="i4").attrs["crs_wkt"] = CRS
    assert open_raster(path).place.crs == rasterio.crs.CRS.from_string(CRS)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("-9999", -9999),
        ("-9999.0", -9999),
        ([7], 7),
        (7, 7),
        (True, None),
        ("much", None),
        (10**400, None),
        (None, None),
    ],
)
def test_nodata_in_any_spelling(tmp_path: Path, value: Any, expected: float | None) -> None:
    assert open_raster(store(tmp_path, _FillValue=value)).nodata == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_rioxarrays_nodata_survives(tmp_path: Path, zarr_format: Any, masked: bool) -> None:
    image = unique_pixels(1, 20, 30, np.int16)
    image[0, 3:7] = -9999
    source = write_geotiff(tmp_path / "a.tif", image, nodata=-9999)
    opened = rioxarray.open_rasterio(source, masked=masked)
    assert isinstance(opened, xarray.DataArray)
    opened.to_dataset(name="image").to_zarr(tmp_path / "x.zarr", zarr_format=zarr_format, consolidated=False)
    raster = open_raster(tmp_path / "x.zarr")
    assert np.array_equal(read(raster)[1], (image == -9999).all(0))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_part_cut_out_lies_where_its_coordinates_say(tmp_path: Path) -> None:
    source = write_geotiff(tmp_path / "a.tif", unique_pixels(1, 60, 80, np.int16))
    opened = rioxarray.open_rasterio(source)
    assert isinstance(opened, xarray.DataArray)
    part = opened.isel(x=slice(20, 60), y=slice(10, 50))
    part.to_dataset(name="image").to_zarr(tmp_path / "x.zarr", consolidated=False)
    place = open_raster(tmp_path / "x.zarr").place
    assert np.allclose(place.transform, tuple(TRANSFORM * TRANSFORM.translation(20, 10))[:6])


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": (20, 30), "attributes": {"flag_values": [0, 1], "flag_meanings": "good bad"}},
        {"shape": (20, 30), "attributes": {}},
        {"shape": (5, 5), "attributes": {}},
        {"shape": (20, 30, 1), "attributes": {}},
    ],
)
def test_a_mask_of_another_meaning_is_not_taken_for_ours(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = store(tmp_path, ancillary_variables="mask")
    mask = zarr.open_group(path).create_array("mask", dtype="u1", **settings)
    mask[:] = 0
    assert not read(open_raster(path / "image"))[1].any()


def test_giant_coordinates_are_not_loaded(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "g.zarr")
    extent = 2_000_000_000
    for name, shape in (("image", (extent, 8)), ("y", (extent,)), ("x", (8,))):
        dims = ("y", "x") if name == "image" else (name,)
        group.create_array(name, shape=shape, chunks=(1000, 8)[: len(shape)], dtype="f8", dimension_names=dims)
    assert open_raster(tmp_path / "g.zarr").shape == (1, extent, 8)


@pytest.mark.parametrize("codec", ["gzip", "zstd", "blosc"])
def test_a_chunk_that_cannot_be_decoded_becomes_nodata(tmp_path: Path, codec: str) -> None:
    codecs = {
        "gzip": zarr.codecs.GzipCodec(),
        "zstd": zarr.codecs.ZstdCodec(checksum=True),
        "blosc": zarr.codecs.BloscCodec(),
    }
    array = zarr.create_array(
        tmp_path / "s.zarr",
        shape=(1, 40, 40),
        chunks=(1, 20, 20),
        dtype="u1",
        compressors=[codecs[codec]],
        dimension_names=("band", "y", "x"),
    )
    array[:] = np.random.default_rng(0).integers(1, 255, (1, 40, 40))
    chunk = tmp_path / "s.zarr/c/0/0/1"
    chunk.write_bytes(chunk.read_bytes()[:10])
    summary = copy_raster(open_raster(tmp_path / "s.zarr"), tmp_path / "c.zarr")
    assert [entry[:4] for entry in summary.unreadable] == [(0, 20, 20, 20)]
    image, missing = read(open_raster(tmp_path / "c.zarr"))
    assert missing[:20, 20:].all()
    assert missing.sum() == 400
    assert np.array_equal(image[:, 20:], array[:, 20:])


def test_one_band_twice(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "s.zarr", shape=(4, 5), dtype="u1", dimension_names=("y", "x"))
    array[:] = unique_pixels(1, 4, 5, np.uint8)[0]
    raster = open_raster(tmp_path / "s.zarr", bands=(1, 1))
    assert read(raster)[0].shape == raster.shape == (2, 4, 5)


def test_a_store_is_found_by_dots_from_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path)
    monkeypatch.chdir(path / "image")
    assert open_raster("../image").shape == (2, 20, 30)
