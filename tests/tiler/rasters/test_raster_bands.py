"""Bands of rasters by name: from descriptions, colours and Zarr's metadata; as a model's network wants them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import xarray
import zarr
from outsize.models import Scaling, SegmentationClass, SegmentationModel, as_tile_network
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.bands import match_bands, select_bands
from outsize.tiler.rasters.opening import open_raster, open_with
from outsize.tiler.rasters.parts import open_mosaic, open_reference, open_stack, reference_to
from outsize.tiler.rasters.raster import Raster, ReadOptions
from outsize.tiler.runs.inference import lazy_predict, predict_window
from rasterio.enums import ColorInterp
from torch import nn
from zarr.errors import UnstableSpecificationWarning

from ...support.rasters import TRANSFORM, unique_pixels, write_geotiff

S2 = ("B02", "B03", "B04", "B08")
PIXELS = unique_pixels(4, 37, 41, np.uint16)


def write_named(path: Path, image: np.ndarray, names: tuple[str, ...], **options: Any) -> Path:
    write_geotiff(path, image, **options)
    with rasterio.open(path, "r+") as dataset:
        dataset.descriptions = names
    return path


def read_all(raster: Raster) -> np.ndarray:
    reader = raster.open_reader()
    try:
        return reader.read(Window(y=0, x=0, height=raster.shape_yx[0], width=raster.shape_yx[1]))
    finally:
        reader.close()


def test_a_network_of_named_bands_gives_the_same_on_bands_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    model = SegmentationModel(
        name="named",
        network=network,
        bands=S2,
        scaling=Scaling.z_score(mean=(1, 2, 3, 4), stddev=(10, 20, 30, 40)),
        fill=(0, 0, 0, 0),
        classes=tuple(SegmentationClass(name=name, colour=(1, 2, 3)) for name in "ab"),
    )
    module = as_tile_network(model, "logits")
    analysed = analyze_network(module, 4, torch.uint16)
    with torch.no_grad():
        expected = module(torch.from_numpy(PIXELS.astype(np.int32))[None])[0].numpy()
    turned = open_raster(write_named(tmp_path / "turned.tif", PIXELS[::-1], S2[::-1]))
    window = Window(y=0, x=0, height=37, width=41)
    assert np.allclose(predict_window(turned, analysed, window, engine="torch"), expected, atol=1e-3)
    assert np.allclose(lazy_predict(turned, analysed, chunk=16, engine="torch").compute(), expected, atol=1e-3)
    other = open_raster(write_named(tmp_path / "other.tif", PIXELS, ("B05", "B06", "B07", "B08")))
    with pytest.raises(UsageError, match="B05 in the place of B02"):
        predict_window(other, analysed, window, engine="torch")
    # The user's own choice stands.
    chosen = select_bands(other, (1, 2, 3, 4))
    assert np.allclose(predict_window(chosen, analysed, window, engine="torch"), expected, atol=1e-3)


def test_a_file_of_more_bands_gives_those_of_the_model(tmp_path: Path) -> None:
    image = unique_pixels(7, 21, 23)
    path = write_named(tmp_path / "seven.tif", image, ("SCL", "B08", "B02", "AOT", "B04", "B03", "B8A"))
    match = match_bands(open_raster(path), S2)
    assert str(match) == "by name: B02 = 3 (B02), B03 = 6 (B03), B04 = 5 (B04), B08 = 2 (B08)"
    assert np.array_equal(read_all(match.raster), image[[2, 5, 4, 1]])
    again = open_reference(reference_to(match.raster))
    assert np.array_equal(read_all(again), image[[2, 5, 4, 1]])
    assert np.array_equal(read_all(select_bands(match.raster, ("B08", 1))), image[[1, 2]])


def test_bands_are_chosen_by_name_as_by_number(tmp_path: Path) -> None:
    path = write_named(tmp_path / "a.tif", PIXELS, ("B08", "B04", "B03", "B02"))
    for bands in (("b2", "B03", "red", "NIR"), ("B02", 3, 2, "B08")):
        raster = open_raster(path, bands=bands)
        assert np.array_equal(read_all(raster), PIXELS[::-1])
        assert raster.options == open_raster(path, bands=(4, 3, 2, 1)).options
    with pytest.raises(UsageError, match="has no one band B09, it has 1 B08, 2 B04, 3 B03, 4 B02"):
        open_raster(path, bands=("B09",))
    with pytest.raises(UsageError, match="has bands 1 to 4, got 5"):
        open_raster(path, bands=(5,))


def test_colours_are_names_where_there_are_no_others_and_alpha_is_none(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "bgr.tif", PIXELS.astype(np.uint8), photometric="minisblack")
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.alpha]
    assert open_raster(path).band_names == ("blue", "green", "red", "band 4")
    match = match_bands(open_raster(path), ("red", "green", "blue", "nir"))
    assert np.array_equal(read_all(match.raster), PIXELS.astype(np.uint8)[[2, 1, 0, 3]])
    # GDAL tags four bytes red, green, blue and alpha by itself: that speaks for red, and against nothing.
    default = open_raster(write_geotiff(tmp_path / "default.tif", PIXELS.astype(np.uint8)))
    assert default.band_names == ("band 1 (red)", "band 2 (green)", "band 3 (blue)", "band 4")
    turned = match_bands(default, ("blue", "green", "red", "nir"))
    assert np.array_equal(read_all(turned.raster), PIXELS.astype(np.uint8)[[2, 1, 0, 3]])
    assert match_bands(default, ("nir", "red", "green", "swir")).how == "in order"
    # What they are described as counts more.
    described = write_named(tmp_path / "described.tif", PIXELS.astype(np.uint8), S2[::-1])
    assert open_raster(described).band_names == S2[::-1]


@pytest.mark.parametrize("version", [2, 3])
def test_a_band_coordinate_of_a_zarr_store_names_bands(tmp_path: Path, version: int) -> None:
    data = xarray.DataArray(PIXELS, dims=("channel", "y", "x"), coords={"channel": list(S2[::-1])}, name="image")
    with warnings.catch_warnings():
        # Of texts of one length, which Zarr v3 has no name for yet.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        data.to_dataset().to_zarr(tmp_path / "x.zarr", zarr_format=version, consolidated=version == 2)
    raster = open_raster(tmp_path / "x.zarr")
    assert raster.band_names == S2[::-1]
    assert np.array_equal(read_all(match_bands(raster, S2).raster), PIXELS[::-1])


@pytest.mark.parametrize(
    "attributes",
    [
        {"bands": [{"name": "x", "eo:common_name": name} for name in ("nir", "red", "green", "blue")]},
        {"eo:bands": [{"name": name, "common_name": "any"} for name in S2[::-1]]},
        {"band_names": list(S2[::-1])},
        {"long_name": list(S2[::-1])},
    ],
)
@pytest.mark.parametrize("on", ["array", "group"])
def test_attributes_of_a_zarr_store_name_bands(tmp_path: Path, attributes: dict[str, Any], on: str) -> None:
    group = zarr.create_group(tmp_path / "a.zarr", attributes=attributes if on == "group" else {})
    array = group.create_array(
        "image",
        shape=PIXELS.shape,
        chunks=(4, 16, 16),
        dtype=PIXELS.dtype,
        dimension_names=("band", "y", "x"),
        attributes=attributes if on == "array" else {},
    )
    array[:] = PIXELS
    raster = match_bands(open_raster(tmp_path / "a.zarr"), S2).raster
    assert np.array_equal(read_all(raster), PIXELS[::-1])


def test_files_of_a_stack_are_matched_by_the_names_of_the_files(tmp_path: Path) -> None:
    names = ("S2A_20180101_B08_10m", "S2A_20180101_B04_10m", "S2A_20180101_B02_10m", "S2A_20180101_B03_10m")
    paths = [
        write_geotiff(tmp_path / f"{name}.tif", PIXELS[i : i + 1], photometric="minisblack")
        for i, name in enumerate(names)
    ]
    stack = open_stack(paths)
    match = match_bands(stack, ("red", "green", "blue", "nir"))
    assert np.array_equal(read_all(match.raster), PIXELS[[1, 3, 2, 0]])
    assert np.array_equal(read_all(open_reference(reference_to(match.raster))), PIXELS[[1, 3, 2, 0]])
    assert np.array_equal(read_all(open_stack(paths, ReadOptions(bands=("B04", "B02")))), PIXELS[[1, 2]])
    named = open_stack(paths, ReadOptions(names=("blue", "green", "red", "nir")))
    assert np.array_equal(read_all(match_bands(named, ("red", "green", "blue", "nir")).raster), PIXELS[[2, 1, 0, 3]])


def test_bands_of_a_mosaic_and_beside_a_mask_band_are_matched(tmp_path: Path) -> None:
    left = write_named(tmp_path / "left.tif", PIXELS[..., :20], S2[::-1])
    right = write_named(
        tmp_path / "right.tif", PIXELS[..., 20:], S2[::-1], transform=TRANSFORM @ TRANSFORM.translation(20, 0)
    )
    match = match_bands(open_mosaic([left, right]), S2)
    assert np.array_equal(read_all(match.raster), PIXELS[::-1])
    masked = write_named(tmp_path / "masked.tif", PIXELS, ("B04", "mask", "B03", "B02"))
    raster = open_with(masked, ReadOptions(mask_band=2, mask_values=(float(PIXELS[1, 0, 0]),)))
    match = match_bands(raster, ("B02", "B03", "B04"))
    assert np.array_equal(read_all(match.raster), PIXELS[[3, 2, 0]])
    window = Window(y=0, x=0, height=3, width=3)
    reader = match.raster.open_reader()
    missing = reader.read_missing(window, reader.read(window))
    reader.close()
    assert missing is not None
    assert missing.sum() == 1
    assert missing[0, 0]


def test_what_is_printed_says_how_bands_were_found(tmp_path: Path) -> None:
    plain = open_raster(write_geotiff(tmp_path / "plain.tif", PIXELS))
    assert str(match_bands(plain, S2)).startswith("in order, as the raster names none: B02 = 1, B03 = 2")
    named = open_raster(write_named(tmp_path / "named.tif", PIXELS, S2))
    assert str(match_bands(named, ("band 1", "band 2", "band 3", "band 4"))) == (
        "in order, as the model names none: 1 B02, 2 B03, 3 B04, 4 B08"
    )
    assert str(match_bands(named, ("blue", "green", "red", "nir"))).startswith("by name, Sentinel-2: blue = 1 (B02)")
    chosen = open_raster(tmp_path / "named.tif", bands=(4, 3, 2, 1))
    assert str(match_bands(chosen, S2)).startswith("as chosen: B02 = 4 (B08)")
