"""Which pixels are nodata: by value, by any band, by every kind of mask."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import rasterio
import zarr
from affine import Affine
from outsize.pipelines.base.option_types import NodataValue
from outsize.tiler.base.errors import NotFiniteError, RasterError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.engines.openvino import enter
from outsize.tiler.output.fingerprint import fingerprint_raster
from outsize.tiler.rasters.nodata import NodataRule, find_missing, join_missing
from outsize.tiler.rasters.opening import open_raster, open_with
from outsize.tiler.rasters.parts import open_mosaic, open_reference, open_stack, reference_to
from outsize.tiler.rasters.raster import ReadOptions, fill_values
from rasterio.enums import ColorInterp

from ...support.rasters import TRANSFORM, missing_of, unique_pixels, write_geotiff

IMAGE = np.array([[[0, 0, 5, 9]], [[0, 1, 0, 9]]], np.int16)


def test_values_count_in_all_bands_or_in_any() -> None:
    def found(*values: float, any_band: bool = False) -> list[bool] | None:
        mask = find_missing(IMAGE, NodataRule(values=values, any_band=any_band))
        return None if mask is None else mask[0].tolist()

    assert found() is None
    assert found(7) is None
    assert found(0) == [True, False, False, False]
    assert found(0, any_band=True) == [True, True, True, False]
    assert found(0, 9) == [True, False, False, True]
    # A pixel of which every band holds one of the values, not all the same.
    assert found(0, 1) == [True, True, False, False]


@pytest.mark.parametrize("value", [-9999.0, 0.5, 300.0, float("nan"), float("inf"), -float("inf")])
def test_a_value_that_the_type_cannot_hold_is_no_pixels(value: float) -> None:
    assert find_missing(np.zeros((1, 2, 2), np.uint8), NodataRule(values=(value,))) is None


def test_a_float_value_matches_as_the_float_that_is_stored() -> None:
    lowest = -3.4028226550889045e38
    image = np.array([[[lowest, 1]]], np.float32)
    assert find_missing(image, NodataRule(values=(lowest,))) is not None
    tenth = np.array([[[0.1, 1]]], np.float32)
    mask = find_missing(tenth, NodataRule(values=(0.1,)))
    assert mask is not None
    assert mask.tolist() == [[True, False]]


def test_masks_are_joined() -> None:
    a, b = np.array([[True, False]]), np.array([[False, False]])
    assert join_missing(None, None) is None
    assert np.array_equal(join_missing(a, None, b), a)  # pyright: ignore[reportArgumentType]


def test_options_go_before_what_the_file_says(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", IMAGE, nodata=0)
    assert missing_of(open_raster(path)) == [[True, False, False, False]]
    assert missing_of(open_raster(path, any_band=True)) == [[True, True, True, False]]
    assert missing_of(open_raster(path, nodata=9)) == [[False, False, False, True]]
    assert missing_of(open_raster(path, nodata=(0, 9))) == [[True, False, False, True]]
    assert missing_of(open_raster(path, nodata=())) == [[False] * 4]
    assert open_raster(path, nodata=()).nodata is None


def test_a_mask_hidden_as_a_band_is_no_band(tmp_path: Path) -> None:
    mask = np.array([[[1, 2, 4, 1]]], np.int16)
    path = write_geotiff(tmp_path / "a.tif", np.concatenate([IMAGE, mask]))
    raster = open_raster(path, mask_band=3, mask_values=(2, 4))
    assert raster.shape == (2, 1, 4)
    assert missing_of(raster) == [[False, True, True, False]]
    both = open_raster(path, bands=(3, 1), mask_band=3, mask_values=(2,), nodata=0)
    assert np.array_equal(both.open_reader().read(Window.whole((1, 4))), np.concatenate([mask, IMAGE[:1]]))
    assert missing_of(both) == [[False, True, False, False]]
    with pytest.raises(UsageError, match="such as --mask-band"):
        open_raster(path, mask_band=3)
    with pytest.raises(UsageError, match="has bands 1 to 3, got 4"):
        open_raster(path, mask_band=4, mask_values=(1,))


def test_a_mask_of_the_dataset_counts_inside_and_beside_the_file(tmp_path: Path) -> None:
    valid = np.array([[255, 0, 255, 0]], np.uint8)
    for internal in (True, False):
        path = write_geotiff(tmp_path / f"{internal}.tif", IMAGE)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(path, "r+") as dataset:
            dataset.write_mask(valid)
        assert (tmp_path / "False.tif.msk").exists() is not internal
        assert missing_of(open_raster(path)) == [[False, True, False, True]]
        assert missing_of(open_raster(path, nodata=0)) == [[True, True, False, True]]


def test_an_alpha_tag_is_a_mask_only_when_asked_for(tmp_path: Path) -> None:
    image = unique_pixels(4, 1, 4, np.uint8)
    image[3] = (0, 255, 0, 255)
    path = write_geotiff(tmp_path / "rgba.tif", image)
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    raster = open_raster(path)
    assert raster.bands == 4
    assert missing_of(raster) == [[False] * 4]
    masked = open_raster(path, alpha=True)
    assert masked.bands == 3
    assert missing_of(masked) == [[True, False, True, False]]
    with pytest.raises(RasterError, match="no band tagged alpha"):
        open_raster(write_geotiff(tmp_path / "rgb.tif", image[:3]), alpha=True)


def test_naip_keeps_its_near_infrared(shared_dir: Path) -> None:
    # Its tag says alpha, and rasterio's dataset_mask takes it for one.
    path = shared_dir / "data/naip/tile_13477.tif"
    with rasterio.open(path) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
        expected = dataset.read(4)
    raster = open_raster(path)
    assert raster.bands == 4
    assert np.array_equal(raster.open_reader().read(Window.whole(raster.shape_yx))[3], expected)
    assert not np.any(missing_of(raster))


def test_bands_with_other_nodata_values_have_each_its_own_until_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "two.vrt").write_text(
        '<VRTDataset rasterXSize="4" rasterYSize="1">'
        + "".join(
            f'<VRTRasterBand dataType="Int16" band="{band}"><NoDataValue>{value}</NoDataValue><SimpleSource>'
            f'<SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource>'
            "</VRTRasterBand>"
            for band, value in ((1, 0), (2, 9))
        )
        + "</VRTDataset>"
    )
    write_geotiff(tmp_path / "a.tif", IMAGE)
    # IMAGE holds 0 0 5 9 and 0 1 0 9: band 1's value is 0, band 2's is 9.
    assert missing_of(open_raster(tmp_path / "two.vrt")) == [[False, False, False, False]]
    assert missing_of(open_raster(tmp_path / "two.vrt", any_band=True)) == [[True, True, False, True]]
    assert missing_of(open_raster(tmp_path / "two.vrt", bands=(2,))) == [[False, False, False, True]]
    assert missing_of(open_raster(tmp_path / "two.vrt", nodata=9)) == [[False, False, False, True]]
    assert missing_of(open_raster(tmp_path / "two.vrt", nodata=())) == [[False] * 4]


@pytest.mark.parametrize(
    ("dtype", "value", "near"),
    [
        ("uint64", 2**64 - 1, 2**64 - 2),
        ("int64", 2**63 - 1, 2**63 - 2),
        ("int64", -(2**63) + 1, -(2**63)),
        ("uint32", 2**32 - 1, 2**32 - 2),
    ],
)
@pytest.mark.parametrize("by", ["attribute", "option"])
def test_whole_numbers_of_64_bits_are_exact(tmp_path: Path, dtype: str, value: int, near: int, by: str) -> None:
    array = zarr.create_array(tmp_path / "s.zarr", shape=(1, 2, 3), dtype=dtype, dimension_names=("band", "y", "x"))
    array[:] = np.array([[[value, near, 1], [2, 3, value]]], dtype)
    if by == "attribute":
        array.attrs["_FillValue"] = value
    raster = open_raster(tmp_path / "s.zarr", nodata=value if by == "option" else None)
    assert missing_of(raster) == [[True, False, False], [False, False, True]]
    again = ReadOptions.from_json(raster.options.to_json())
    assert again == raster.options
    assert str(NodataRule(values=(value,))) != str(NodataRule(values=(near,)))


def test_the_largest_float_in_15_digits_is_the_largest_float(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "s.zarr", shape=(1, 1, 2), dtype="float32", dimension_names=("band", "y", "x"))
    array[:] = np.array([[[np.finfo(np.float32).min, 1]]], np.float32)
    array.attrs["_FillValue"] = -3.40282346638529e38
    assert missing_of(open_raster(tmp_path / "s.zarr")) == [[True, False]]


def test_every_option_of_reading_is_in_the_fingerprint(tmp_path: Path) -> None:
    """Of a file, a stack, a mosaic, and what their tags mean: pixels of two ways of reading make no map."""
    image = np.arange(1, 61, dtype=np.int16).reshape(1, 6, 10)
    files = []
    for number in range(2):
        path = write_geotiff(tmp_path / f"{number}.tif", np.concatenate([image, image]))
        with rasterio.open(path, "r+") as dataset:
            dataset.scales, dataset.offsets = (0.5, 0.25), (1, 2)
        files.append(path)
    ways = {
        "plain": ReadOptions(),
        "nodata 5": ReadOptions(nodata=(5,)),
        "nodata 6": ReadOptions(nodata=(6,)),
        "nodata 5, 6": ReadOptions(nodata=(5, 6)),
        "nodata 5, 8": ReadOptions(nodata=(5, 8)),
        "any": ReadOptions(nodata=(5,), any_band=True),
        "any 6": ReadOptions(nodata=(6,), any_band=True),
        "mask 1": ReadOptions(mask_band=2, mask_values=(1,)),
        "mask 2": ReadOptions(mask_band=2, mask_values=(2,)),
        "scaled": ReadOptions(apply_scale=True),
        "scaled 5": ReadOptions(apply_scale=True, nodata=(5,)),
    }
    for opened in (lambda o: open_with(files[0], o), lambda o: open_stack(files, o), lambda o: open_mosaic(files, o)):
        found = {
            name: json.dumps(fingerprint_raster(opened(options)), sort_keys=True) for name, options in ways.items()
        }
        same = [(a, b) for a in found for b in found if a < b and found[a] == found[b]]
        assert not same


def test_what_no_list_of_numbers_is_is_refused(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "s.tif", unique_pixels(3, 5, 6))
    assert open_raster(path, bands=np.array([3, 1]), nodata=np.int64(7)).bands == 2
    with pytest.raises(UsageError, match="bands must be a list of numbers or names, got 'B04'"):
        open_raster(path, bands="B04")
    with pytest.raises(UsageError, match="nodata must be a number or several, got 'x'"):
        open_raster(path, nodata="x")  # type: ignore[arg-type]
    for fill in (0, ("a", "b", "c")):
        with pytest.raises(UsageError, match="fill must be a number a band"):
            fill_values(fill, open_raster(path))  # type: ignore[arg-type]


def store(path: Path, image: np.ndarray, zarr_format: Literal[2, 3] = 3, **attributes: Any) -> Path:
    names = {"dimension_names": ("band", "y", "x")} if zarr_format == 3 else {}
    said = attributes if names else {**attributes, "_ARRAY_DIMENSIONS": ["band", "y", "x"]}
    zarr.create_array(path, data=image, zarr_format=zarr_format, attributes=said, **names)
    return path


@pytest.mark.parametrize(("dtype", "value"), [("int64", 2**63 - 1), ("uint64", 2**64 - 1), ("int64", 2**53 + 1)])
def test_a_value_of_64_bits_is_nodata_and_its_neighbour_is_not(tmp_path: Path, dtype: str, value: int) -> None:
    image = np.array([[[1, value, value - 1, 5]]], dtype)
    expected = [[False, True, False, False]]
    path = store(tmp_path / "a.zarr", image, _FillValue=value)
    assert missing_of(open_raster(path)) == expected
    plain = store(tmp_path / "b.zarr", image)
    given = open_raster(plain, nodata=np.dtype(dtype).type(value))
    assert missing_of(given) == expected
    assert missing_of(open_reference(json.loads(json.dumps(reference_to(given))))) == expected
    option = NodataValue().convert(str(value), None, None)
    assert missing_of(open_raster(plain, nodata=option)) == expected
    copy_raster(open_raster(path), tmp_path / "copy.zarr")
    assert missing_of(open_raster(tmp_path / "copy.zarr")) == expected


def test_gdals_own_mask_says_what_64_bits_mean(tmp_path: Path) -> None:
    value = 2**64 - 1
    write_geotiff(tmp_path / "a.tif", np.array([[[1, value, value - 1, 5]]], np.uint64))
    (tmp_path / "a.vrt").write_text(
        f'<VRTDataset rasterXSize="4" rasterYSize="1"><VRTRasterBand dataType="UInt64" band="1">'
        f"<NoDataValue>{value}</NoDataValue><SimpleSource><SourceFilename relativeToVRT='1'>a.tif</SourceFilename>"
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    assert missing_of(open_raster(tmp_path / "a.vrt")) == [[False, True, False, False]]


def test_the_largest_float_is_nodata_however_many_of_its_digits_are_given(tmp_path: Path) -> None:
    least = np.finfo(np.float32).min
    image = np.array([[[1, least, 3, 5]]], np.float32)
    expected = [[False, True, False, False]]
    # The shortest text that means it, as others write it, is a little beyond it.
    path = store(tmp_path / "a.zarr", image, _FillValue=float(str(least)))
    assert missing_of(open_raster(path)) == expected
    plain = write_geotiff(tmp_path / "a.tif", image)
    with pytest.raises(NotFiniteError) as caught:
        enter(image, np.dtype(np.float32))
    (said,) = re.findall(r"--nodata (\S+),", str(caught.value))
    assert missing_of(open_raster(plain, nodata=float(said))) == expected


def test_cf_says_nodata_by_two_attributes_and_several_values(tmp_path: Path) -> None:
    image = np.array([[[1, -9999, -8888, 5]]], np.float32)
    expected = [[False, True, True, False]]
    assert missing_of(open_raster(store(tmp_path / "a.zarr", image, _FillValue=-9999.0, missing_value=-8888.0))) == (
        expected
    )
    assert missing_of(open_raster(store(tmp_path / "b.zarr", image, missing_value=[-9999.0, -8888.0]))) == expected


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4"])
def test_the_order_of_a_stores_bytes_is_its_own_affair(tmp_path: Path, dtype: str) -> None:
    image = unique_pixels(2, 7, 9, dtype)
    raster = open_raster(store(tmp_path / "a.zarr", image, zarr_format=2))
    assert raster.dtype == image.dtype.newbyteorder("=")
    read = raster.open_reader().read(Window.whole(raster.shape_yx))
    assert read.dtype.isnative
    assert np.array_equal(read, image)


def test_two_values_are_never_one_to_a_run_that_goes_on(tmp_path: Path) -> None:
    image = unique_pixels(1, 4, 4)
    files = [
        write_geotiff(tmp_path / f"{name}.tif", image, transform=TRANSFORM * Affine.translation(x, 0))
        for name, x in (("a", 0), ("b", 4))
    ]
    for file in files:
        with rasterio.open(file, "r+") as dataset:
            dataset.scales, dataset.offsets = (2.0,), (1.0,)
    lists = [(1_000_001.0,), (1_000_002.0,), (1.0, 2.0), (1.0, 3.0)]
    for opened in (lambda options: open_with(files[0], options), lambda options: open_mosaic(files, options)):
        texts = {
            str(fingerprint_raster(opened(ReadOptions(nodata=values, any_band=any_band))))
            for values in lists
            for any_band in (False, True)
        }
        assert len(texts) == 2 * len(lists)


def test_a_mosaic_of_scaled_floats_is_another_input(tmp_path: Path) -> None:
    files = [
        write_geotiff(
            tmp_path / f"{x}.tif", unique_pixels(1, 4, 4, np.float32), transform=TRANSFORM * Affine.translation(x, 0)
        )
        for x in (0, 4)
    ]
    for file in files:
        with rasterio.open(file, "r+") as dataset:
            dataset.scales, dataset.offsets = (2.0,), (1.0,)
    stored, scaled = (fingerprint_raster(open_mosaic(files, ReadOptions(apply_scale=on))) for on in (False, True))
    assert stored != scaled
