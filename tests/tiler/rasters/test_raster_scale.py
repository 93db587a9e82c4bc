"""Scale and offset tags: kept, said, and applied exactly, against numpy and xarray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray
import zarr
from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.output.fingerprint import fingerprint_raster
from outsize.tiler.rasters.bands import select_bands
from outsize.tiler.rasters.block_cache import BlockStore
from outsize.tiler.rasters.notes import list_notes
from outsize.tiler.rasters.opening import open_raster, open_with
from outsize.tiler.rasters.parts import count_pixel_bytes, open_mosaic, open_reference, open_stack, reference_to
from outsize.tiler.rasters.raster import Raster, ReadOptions, read_filled

from ...support.rasters import TRANSFORM, unique_pixels, write_geotiff

PIXELS = unique_pixels(3, 37, 41, np.uint16)
SAME = ((1e-4, -0.1),) * 3
OTHERS = ((1e-4, -0.1), (2.5, 0.0), (1.0, 7.25))


def write_tagged(path: Path, image: np.ndarray, tags: tuple[tuple[float, float], ...], **options: Any) -> Path:
    write_geotiff(path, image, **options)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = zip(*tags, strict=True)
    return path


def read_all(raster: Raster, blocks: BlockStore | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, and which of them are nodata."""
    image, missing = np.empty(raster.shape, raster.dtype), np.zeros(raster.shape_yx, bool)
    reader = raster.open_reader(blocks)
    grid = Grid(shape=raster.shape_yx, cell=(16, 13))
    for at in grid:
        window = grid.window(*at)
        image[(slice(None), *window.slices())] = read = reader.read(window)
        found = reader.read_missing(window, read)
        if found is not None:
            missing[window.slices()] = found
    reader.close()
    return image, missing


def apply_in_float64(image: np.ndarray, tags: tuple[tuple[float, float], ...]) -> np.ndarray:
    return np.stack(
        [band.astype(np.float64) * scale + offset for band, (scale, offset) in zip(image, tags, strict=True)]
    )


@pytest.mark.parametrize("tags", [SAME, OTHERS])
@pytest.mark.parametrize(
    ("dtype", "result"),
    [("uint8", "float32"), ("int16", "float32"), ("uint16", "float32"), ("float32", "float32"), ("int32", "float64"),
     ("uint32", "float64"), ("float64", "float64")],
)  # fmt: skip
def test_tags_are_applied_in_float64_and_rounded_once(
    tmp_path: Path, dtype: str, result: str, tags: tuple[tuple[float, float], ...]
) -> None:
    image = PIXELS.astype(dtype)
    path = write_tagged(tmp_path / "a.tif", image, tags)
    plain = open_raster(path)
    assert plain.scale_tags == tags
    assert np.array_equal(read_all(plain)[0], image)
    scaled = open_raster(path, apply_scale=True)
    assert (scaled.dtype, scaled.shape) == (np.dtype(result), image.shape)
    expected = apply_in_float64(image, tags).astype(result)
    for raster in (scaled, open_reference(reference_to(scaled)), scaled.made_absolute()):
        assert np.array_equal(read_all(raster, BlockStore(1 << 20))[0], expected)
    turned = open_raster(path, apply_scale=True, bands=(3, 1))
    assert np.array_equal(read_all(turned)[0], expected[[2, 0]])
    assert np.array_equal(read_all(select_bands(scaled, (3, 1)))[0], expected[[2, 0]])


def test_nodata_is_decided_on_stored_numbers(tmp_path: Path) -> None:
    image = PIXELS.copy()
    image[:, 5:9, 7:30], image[0, 20:25, 3:20] = 9, 9
    path = write_tagged(tmp_path / "a.tif", image, ((2.0, 0.0), (1.0, 3.0), (1.0, 0.0)), nodata=9)
    # 9 is also what the first band makes of no number, and the third of its own 9.
    for any_band in (False, True):
        scaled = open_raster(path, apply_scale=True, any_band=any_band)
        hollow = image == 9
        assert np.array_equal(read_all(scaled)[1], hollow.any(0) if any_band else hollow.all(0))
    reader = scaled.open_reader()
    filled = read_filled(reader, scaled, Window(y=0, x=0, height=40, width=44), (0.5, 0.5, 0.5))
    assert filled.missing is not None
    assert (filled.image[:, filled.missing] == 0.5).all()
    reader.close()


def test_a_scaled_raster_is_another_input_than_the_stored_numbers(tmp_path: Path) -> None:
    image = PIXELS.astype(np.float32)
    path = write_tagged(tmp_path / "a.tif", image, SAME)
    plain, scaled = open_raster(path), open_raster(path, apply_scale=True)
    assert fingerprint_raster(plain) != fingerprint_raster(scaled)
    assert "input_scale" not in fingerprint_raster(plain)
    again = write_tagged(tmp_path / "b.tif", image, OTHERS)
    assert fingerprint_raster(open_raster(again, apply_scale=True))["input_scale"] == [list(pair) for pair in OTHERS]
    assert count_pixel_bytes(scaled) == 12


@pytest.mark.parametrize("tags", [SAME, OTHERS])
@pytest.mark.parametrize("version", [2, 3])
def test_ingest_keeps_numbers_and_tags(tmp_path: Path, tags: tuple[tuple[float, float], ...], version: Any) -> None:
    image = PIXELS.copy()
    image[:, :4, :4] = 0
    path = write_tagged(tmp_path / "a.tif", image, tags, nodata=0)
    copy_raster(open_raster(path), tmp_path / "a.zarr", zarr_format=version)
    copy = open_raster(tmp_path / "a.zarr")
    assert copy.scale_tags == tags
    assert np.array_equal(read_all(copy)[0], image)
    expected = apply_in_float64(image, tags).astype(np.float32)
    assert np.array_equal(read_all(open_raster(tmp_path / "a.zarr", apply_scale=True))[0], expected)
    # What it means can be ingested too; a mask then says what is nodata.
    copy_raster(open_raster(path, apply_scale=True), tmp_path / "b.zarr", zarr_format=version)
    meant = open_raster(tmp_path / "b.zarr")
    assert (meant.scale_tags, meant.dtype) == ((), np.dtype(np.float32))
    pixels, missing = read_all(meant)
    assert np.array_equal(pixels, expected)
    assert np.array_equal(missing, (image == 0).all(0))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("version", [2, 3])
def test_xarray_understands_the_tags_of_a_copy_and_its_nodata(tmp_path: Path, version: Any, dtype: str) -> None:
    image = PIXELS.astype(dtype)
    image[:, :4, :4] = 0
    path = write_tagged(tmp_path / "a.tif", image, SAME, nodata=0)
    copy_raster(open_raster(path), tmp_path / "a.zarr", zarr_format=version)
    found = xarray.open_zarr(tmp_path / "a.zarr", consolidated=version == 2)["image"].to_numpy()
    expected = np.where(image == 0, np.nan, apply_in_float64(image, SAME))
    assert np.allclose(found, expected, rtol=1e-5, equal_nan=True)


def test_a_store_that_xarray_packed_says_what_its_numbers_mean(tmp_path: Path) -> None:
    values = (PIXELS * 0.02 - 3).astype(np.float64)
    data = xarray.DataArray(values, dims=("band", "y", "x"), name="t")
    encoding = {"t": {"dtype": "int16", "scale_factor": 0.02, "add_offset": -3.0, "_FillValue": -1}}
    data.to_dataset().to_zarr(tmp_path / "x.zarr", encoding=encoding, zarr_format=2, consolidated=False)
    raster = open_raster(tmp_path / "x.zarr", apply_scale=True)
    assert raster.parts[0].raster.scale_tags == ((0.02, -3.0),) * 3
    assert np.allclose(read_all(raster)[0], values, atol=0.011)


@pytest.mark.parametrize(
    ("attributes", "tags"),
    [
        ({"scale_factor": [0.1, 0.2, 0.3]}, ((0.1, 0), (0.2, 0), (0.3, 0))),
        ({"add_offset": 4}, ((1, 4),) * 3),
        ({"raster:bands": [{"scale": 0.5, "offset": -1}] * 3}, ((0.5, -1),) * 3),
        ({"scale_factor": "much"}, ()),
        ({"scale_factor": [1, 2]}, ()),
        ({"scale_factor": 1.0, "add_offset": 0.0}, ()),
        ({"bands": [{"raster:scale": None}] * 3}, ()),
    ],
)
def test_attributes_are_read_or_left_alone(
    tmp_path: Path, attributes: dict[str, Any], tags: tuple[tuple[float, float], ...]
) -> None:
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(3, 5, 7), chunks=(3, 5, 7), dtype="int16", dimension_names=("band", "y", "x"),
        attributes=attributes,
    )  # fmt: skip
    array[:] = 1
    assert open_raster(tmp_path / "a.zarr").scale_tags == tags


def test_stacks_keep_each_files_tags_and_mosaics_join_what_numbers_mean(tmp_path: Path) -> None:
    one = write_tagged(tmp_path / "one.tif", PIXELS[:1], ((0.5, 1.0),), nodata=4)
    two = write_geotiff(tmp_path / "two.tif", PIXELS[1:2])
    assert open_stack([one, two]).scale_tags == ((0.5, 1.0), (1.0, 0.0))
    for bands, tags in (((), ((0.5, 1.0), (1.0, 0.0))), ((2, 1), ((1.0, 0.0), (0.5, 1.0)))):
        scaled = open_stack([one, two], ReadOptions(apply_scale=True, bands=bands))
        stored = PIXELS[:2] if not bands else PIXELS[[1, 0]]
        for raster in (scaled, open_reference(reference_to(scaled))):
            assert np.array_equal(read_all(raster)[0], apply_in_float64(stored, tags).astype(np.float32))
    beside = {"transform": TRANSFORM @ TRANSFORM.translation(41, 0)}
    right = write_tagged(tmp_path / "right.tif", PIXELS[:1], ((0.25, 0.0),), **beside)
    with pytest.raises(RasterError, match=r"scale 0.5, offset 1, .*scale 0.25, offset 0; join .* --apply-scale"):
        open_mosaic([one, right])
    mosaic = open_mosaic([one, right], ReadOptions(apply_scale=True))
    expected = np.concatenate([PIXELS[:1] * 0.5 + 1, PIXELS[:1] * 0.25], axis=2).astype(np.float32)
    pixels, missing = read_all(mosaic)
    hollow = np.concatenate([PIXELS[:1] == 4, np.zeros_like(PIXELS[:1], bool)], axis=2)[0]
    assert np.array_equal(missing, hollow)
    assert np.array_equal(pixels[0][~hollow], expected[0][~hollow])
    same = write_tagged(tmp_path / "same.tif", PIXELS[:1], ((0.5, 1.0),), nodata=4, **beside)
    assert open_mosaic([one, same]).scale_tags == ((0.5, 1.0),)


def test_one_line_says_what_becomes_of_tags(tmp_path: Path) -> None:
    same = write_tagged(tmp_path / "same.tif", PIXELS, SAME)
    others = write_tagged(tmp_path / "others.tif", PIXELS, OTHERS)
    plain = write_geotiff(tmp_path / "plain.tif", PIXELS)
    assert list_notes(open_raster(plain)) == []
    for raster, line in (
        (open_raster(same), "scale 0.0001, offset -0.1: not applied, pixels are the stored numbers (--apply-scale)"),
        (open_raster(same, apply_scale=True), "scale 0.0001, offset -0.1: applied to the stored numbers, which gives "
         "float32"),
        (open_raster(others), "scale 0.0001, offset -0.1; scale 2.5, offset 0; scale 1, offset 7.25 (of bands in turn)"
         ": not applied, pixels are the stored numbers (--apply-scale)"),
        (open_raster(plain, apply_scale=True), "no scale or offset: --apply-scale changes nothing"),
    ):  # fmt: skip
        assert list_notes(raster) == [("tags", line)]


@pytest.mark.parametrize("tags", [(0.0, 1.0), (float("nan"), 0.0), (1.0, float("inf"))])
def test_tags_that_mean_nothing_are_refused_where_they_are_to_be_applied(
    tmp_path: Path, tags: tuple[float, float]
) -> None:
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(5, 7), chunks=(5, 7), dtype="int16",
        attributes={"scale_factor": tags[0], "add_offset": tags[1]},
    )  # fmt: skip
    array[:] = 1
    open_raster(tmp_path / "a.zarr")
    with pytest.raises(RasterError, match=r"scale must be a number other than 0 .*leave --apply-scale out"):
        open_with(tmp_path / "a.zarr", ReadOptions(apply_scale=True))


@pytest.mark.parametrize("any_band", [False, True])
def test_a_number_that_means_more_than_its_type_holds_means_nothing(tmp_path: Path, any_band: bool) -> None:
    """2 * 3e38 is no float32: in all bands, or in any, the pixel is nodata."""
    image = np.ones((2, 3, 4), np.float32)
    image[:, 1, 2], image[0, 2, 3] = 3e38, 3e38 if any_band else 1
    path = write_tagged(tmp_path / "s.tif", image, ((2.0, 0.0), (2.0, 0.0)))
    raster = open_raster(path, apply_scale=True, any_band=any_band)
    window = Window.whole(raster.shape_yx)
    filled = read_filled(raster.open_reader(), raster, window)
    assert filled.missing is not None
    assert np.argwhere(filled.missing).tolist() == [[1, 2], [2, 3]][: 1 + any_band]
    assert np.isfinite(filled.image).all()
