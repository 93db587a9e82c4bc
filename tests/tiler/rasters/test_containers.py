"""Rasters in containers: netCDF, archives, Zarr with axes of length 1 and pyramids; what is ambiguous is named."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.bands import select_bands
from outsize.tiler.rasters.notes import list_notes
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import open_reference, reference_to
from outsize.tiler.rasters.raster import Raster
from PIL import Image

from ...support.rasters import unique_pixels, write_geotiff

PIXELS = unique_pixels(3, 20, 30, np.uint16)


def read_all(raster: Raster) -> np.ndarray:
    reader = raster.open_reader()
    try:
        return reader.read(Window.whole(raster.shape_yx))
    finally:
        reader.close()


def write_array(path: Path, image: np.ndarray, dims: tuple[str, ...] | None = None) -> Path:
    chunks = tuple(min(extent, 11) for extent in image.shape)
    array = zarr.create_array(path, shape=image.shape, chunks=chunks, dtype=image.dtype, dimension_names=dims)
    array[...] = image
    return path


def test_variables_of_a_netcdf_file_are_listed_and_each_can_be_named(tmp_path: Path) -> None:
    dims = ("time", "lat", "lon")
    coords = {"lat": np.linspace(10, 0.5, 20), "lon": np.linspace(0, 14.5, 30)}
    data = xarray.Dataset(
        {"t2m": (dims, PIXELS.astype(np.int16)), "tp": (dims, PIXELS.astype(np.int16) + 7)}, coords=coords
    )
    path = tmp_path / "two.nc"
    data.to_netcdf(path, engine="scipy")
    with pytest.raises(RasterError, match=rf"holds 2 rasters, netcdf:{path}:t2m, .*:tp; name one of them in its place"):
        open_raster(path)
    raster = open_raster(f"netcdf:{path}:tp")
    assert np.array_equal(read_all(raster), PIXELS + 7)
    assert raster.place.transform == pytest.approx((0.5, 0, -0.25, 0, -0.5, 10.25))
    data[["t2m"]].to_netcdf(tmp_path / "one.nc", engine="scipy")
    assert np.array_equal(read_all(open_raster(tmp_path / "one.nc")), PIXELS)


@pytest.mark.parametrize(
    ("lead", "dims", "axes"),
    [
        ((1,), ("time", "band", "y", "x"), None),
        ((1, 1), ("t", "z", "c", "y", "x"), None),
        ((1,), None, "tbyx"),
        ((1, 1), None, "tsbyx"),
    ],
)
def test_an_axis_of_length_1_is_taken_out(
    tmp_path: Path, lead: tuple[int, ...], dims: tuple[str, ...] | None, axes: str | None
) -> None:
    raster = open_raster(write_array(tmp_path / "a.zarr", PIXELS.reshape(*lead, *PIXELS.shape), dims), axes=axes)
    assert raster.shape == PIXELS.shape
    assert np.array_equal(read_all(raster), PIXELS)
    assert np.array_equal(read_all(open_reference(reference_to(select_bands(raster, (3, 1))))), PIXELS[[2, 0]])


def test_a_time_of_length_1_without_bands_is_taken_out_wherever_it_lies(tmp_path: Path) -> None:
    for name, image, dims in (
        ("first", PIXELS[:1], ("time", "y", "x")),
        ("last", PIXELS[0][..., None], ("lat", "lon", "time")),
    ):
        raster = open_raster(write_array(tmp_path / f"{name}.zarr", image, dims))
        assert np.array_equal(read_all(raster), PIXELS[:1])
    data = xarray.DataArray(
        PIXELS[None], dims=("time", "band", "y", "x"), coords={"time": [0], "y": range(20), "x": range(30)}, name="v"
    )
    data.to_dataset().to_zarr(tmp_path / "x.zarr", zarr_format=2, consolidated=False)
    raster = open_raster(tmp_path / "x.zarr")
    assert np.array_equal(read_all(raster), PIXELS)
    assert raster.place.transform == (1, 0, -0.5, 0, 1, -0.5)


@pytest.mark.parametrize(
    ("shape", "dims", "words"),
    [
        ((3, 300, 260), None, "(3, 300, 260) are bands, y, x; give --axes byx"),
        ((300, 260, 3), None, "give --axes yxb"),
        ((300, 3, 260), None, "give --axes ybx"),
        ((1, 3, 30, 26), None, "give --axes tbyx"),
        ((1, 30, 26), None, "give --axes byx"),
        ((2, 3, 30, 26), None, "got dimensions of (2, 3, 30, 26); take one out"),
        ((5, 30, 26), ("time", "y", "x"), "its dimension time has 5 entries, which are no bands, y or x; take one out, "
         "such as with xarray's isel(time=0), or read them as bands: --axes byx"),
        ((2, 3, 30, 26), ("time", "band", "y", "x"), "its dimension time has 2 entries, .*isel(time=0)"),
        ((3, 30, 26), ("i", "j", "k"), "dimensions ['i', 'j', 'k'] of (3, 30, 26) are not bands, y, x; give --axes"),
    ],
)  # fmt: skip
def test_what_an_order_must_be_is_said_for_the_shape_at_hand(
    tmp_path: Path, shape: tuple[int, ...], dims: tuple[str, ...] | None, words: str
) -> None:
    path = write_array(tmp_path / "a.zarr", np.zeros(shape, np.uint8), dims)
    with pytest.raises(RasterError) as refused:
        open_raster(path)
    assert all(part in str(refused.value) for part in words.split(".*"))
    with pytest.raises(RasterError, match="--axes must order b, y and x"):
        open_raster(path, axes="bxx")


def write_levels(path: Path, order: tuple[int, ...], *, nested: bool, attributes: dict[str, Any]) -> Path:
    group = zarr.create_group(path, attributes=attributes)
    for number, factor in enumerate(order):
        parent = group.create_group(str(number)) if nested else group
        level = PIXELS[:, ::factor, ::factor]
        array = parent.create_array(
            "image" if nested else str(number), shape=level.shape, chunks=(3, 8, 8), dtype=level.dtype,
            dimension_names=("c", "y", "x"),
        )  # fmt: skip
        array[...] = level
    return path


LISTED = [{"path": str(number)} for number in range(3)]


@pytest.mark.parametrize("order", [(1, 2, 4), (4, 2, 1)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "attributes",
    [
        {"multiscales": [{"datasets": LISTED, "version": "0.4"}]},
        {"ome": {"version": "0.5", "multiscales": [{"datasets": LISTED}]}},
        {"multiscales": {"layout": [{"asset": str(number)} for number in range(3)]}},
    ],
)
def test_of_a_declared_pyramid_the_largest_level_is_read(
    tmp_path: Path, order: tuple[int, ...], nested: bool, attributes: dict[str, Any]
) -> None:
    raster = open_raster(write_levels(tmp_path / "p.zarr", order, nested=nested, attributes=attributes))
    assert np.array_equal(read_all(raster), PIXELS)
    assert np.array_equal(read_all(open_reference(reference_to(raster))), PIXELS)


def test_levels_that_nobody_declares_are_named(tmp_path: Path) -> None:
    path = write_levels(tmp_path / "p.zarr", (1, 2, 4), nested=True, attributes={})
    with pytest.raises(RasterError, match=r"no array of its own, but the groups 0, 1, 2; name one, such as .*p.zarr/0"):
        open_raster(path)
    assert open_raster(path / "1").shape == (3, 10, 15)
    flat = write_levels(tmp_path / "f.zarr", (1, 2, 4), nested=False, attributes={"multiscales": [{"datasets": 3}]})
    with pytest.raises(RasterError, match=r"one raster array, it has 0, 1, 2; name one, such as .*f.zarr/0"):
        open_raster(flat)
    zarr.create_group(tmp_path / "e.zarr")
    with pytest.raises(RasterError, match="must hold one raster array, it has none"):
        open_raster(tmp_path / "e.zarr")


def test_arrays_that_describe_another_are_no_rasters(tmp_path: Path) -> None:
    data = xarray.Dataset(
        {"image": (("band", "y", "x"), PIXELS)},
        coords={"lat": (("y", "x"), np.zeros((20, 30))), "lon": (("y", "x"), np.zeros((20, 30)))},
    )
    data.to_zarr(tmp_path / "x.zarr", zarr_format=2, consolidated=False)
    assert np.array_equal(read_all(open_raster(tmp_path / "x.zarr")), PIXELS)


@pytest.mark.parametrize(
    "name", ["zip://{0}!in/a.tif", "zip://{0}!/in/a.tif", "zip+file://{0}!/in/a.tif", "zip://in/a.tif::file://{0}"]
)
def test_files_in_archives_are_read_by_the_names_of_rasterio_and_fsspec(tmp_path: Path, name: str) -> None:
    path = write_geotiff(tmp_path / "a.tif", PIXELS)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as packed:
        packed.write(path, "in/a.tif")
        packed.write(path, "b.tif")
    raster = open_raster(name.format(tmp_path / "z.zip"))
    assert np.array_equal(read_all(raster), PIXELS)
    assert np.array_equal(read_all(open_reference(reference_to(raster.made_absolute()))), PIXELS)


def test_archives_say_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_geotiff(tmp_path / "a.tif", PIXELS)
    for name, inside in (("one.zip", ("a.tif",)), ("two.zip", ("a.tif", "b.tif")), ("z.zip", ("a.zarr/zarr.json",))):
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            for inner in inside:
                packed.write(path, inner)
    for name in ("one.zip", "zip://one.zip"):
        raster = open_raster(name)
        assert np.array_equal(read_all(raster), PIXELS)
        assert raster.path == f"/vsizip/{tmp_path}/one.zip/a.tif"
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        packed.add(path, "a.tif")
    assert np.array_equal(read_all(open_raster("tar://a.tar!a.tif")), PIXELS)
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    for name, words in (
        ("two.zip", r"two.zip holds a.tif, b.tif; name one raster in it, such as zip://two.zip!a.tif"),
        ("zip://two.zip!c.tif", "holds no c.tif, it holds a.tif, b.tif"),
        ("zip://none.zip!a.tif", "no such archive: none.zip; write zip://ARCHIVE!FILE"),
        ("z.zip", "holds a Zarr store, which is not read from archives; unpack it first"),
        ("bad.zip", "is no zip archive that can be read"),
    ):
        with pytest.raises(RasterError, match=words):
            open_raster(name)


def test_pages_of_a_tiff_beyond_the_first_are_told(tmp_path: Path) -> None:
    pages = [Image.fromarray(PIXELS[band].astype(np.uint8)) for band in range(3)]
    pages[0].save(tmp_path / "one.tif")
    assert list_notes(open_raster(tmp_path / "one.tif")) == []
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    raster = open_raster(tmp_path / "pages.tif")
    assert np.array_equal(read_all(raster), PIXELS[:1].astype(np.uint8))
    third = f"GTIFF_DIR:3:{tmp_path / 'pages.tif'}"
    assert list_notes(raster) == [("file", f"the first of 3 rasters in the file; others are named {third}")]
    assert np.array_equal(read_all(open_raster(third)), PIXELS[2:].astype(np.uint8))
