"""Masks of single bands, which a VRT may have: nodata by the same rules as a value, against rasterio and numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.output.fingerprint import fingerprint_raster
from outsize.tiler.rasters.block_cache import BlockStore
from outsize.tiler.rasters.opening import open_raster, open_with
from outsize.tiler.rasters.parts import count_pixel_bytes, open_mosaic, open_stack
from outsize.tiler.rasters.raster import Raster, ReadOptions

from ...support.rasters import CRS, TRANSFORM, unique_pixels, write_geotiff

HEIGHT, WIDTH = 77, 93


def write_masked_vrt(folder: Path, image: np.ndarray, valid: np.ndarray, *, masked: tuple[int, ...]) -> Path:
    """A VRT whose bands `masked` have masks of their own, and no mask of the dataset."""
    pixels = write_geotiff(folder / "pixels.tif", image)
    masks = write_geotiff(folder / "masks.tif", valid)

    def band(number: int) -> str:
        def source(file: Path) -> str:
            return (
                f'<SimpleSource><SourceFilename relativeToVRT="1">{file.name}</SourceFilename><SourceBand>{number}'
                "</SourceBand></SimpleSource>"
            )

        mask = f'<MaskBand><VRTRasterBand dataType="Byte">{source(masks)}</VRTRasterBand></MaskBand>'
        return (
            f'<VRTRasterBand dataType="Int16" band="{number}">{source(pixels)}{mask if number in masked else ""}'
            "</VRTRasterBand>"
        )

    a = TRANSFORM
    path = folder / "masked.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="{image.shape[2]}" rasterYSize="{image.shape[1]}"><SRS>{CRS}</SRS>'
        f"<GeoTransform>{a.c},{a.a},{a.b},{a.f},{a.d},{a.e}</GeoTransform>"
        + "".join(map(band, range(1, len(image) + 1)))
        + "</VRTDataset>"
    )
    return path


@pytest.fixture
def pixels() -> np.ndarray:
    return unique_pixels(3, HEIGHT, WIDTH, np.int16)


@pytest.fixture
def valid() -> np.ndarray:
    found = np.full((3, HEIGHT, WIDTH), 255, np.uint8)
    found[0, 10:40, 5:60] = 0
    found[1, 20:70, 30:90] = 0
    found[2, 15:35, 25:55] = 0
    return found


def read_missing(raster: Raster, cell: int = 32, blocks: BlockStore | None = None) -> np.ndarray:
    """By windows that fit no block."""
    found = np.zeros(raster.shape_yx, bool)
    reader = raster.open_reader(blocks)
    grid = Grid(shape=raster.shape_yx, cell=(cell, cell - 5))
    for at in grid:
        window = grid.window(*at)
        missing = reader.read_missing(window, reader.read(window))
        if missing is not None:
            found[window.slices()] = missing
    reader.close()
    return found


def test_masks_of_all_bands_are_nodata_where_all_say_so_or_one_does(
    tmp_path: Path, pixels: np.ndarray, valid: np.ndarray
) -> None:
    path = write_masked_vrt(tmp_path, pixels, valid, masked=(1, 2, 3))
    with rasterio.open(path) as dataset:
        everywhere = dataset.dataset_mask() == 0
    assert everywhere.sum() == 15 * 25
    store = BlockStore(1 << 20)
    assert np.array_equal(read_missing(open_raster(path), blocks=store), everywhere)
    assert np.array_equal(read_missing(open_raster(path)), everywhere)
    assert np.array_equal(read_missing(open_raster(path, any_band=True)), (valid == 0).any(0))
    assert np.array_equal(read_missing(open_raster(path, bands=(2,))), valid[1] == 0)
    assert np.array_equal(read_missing(open_raster(path, bands=(3, 1))), (valid[[2, 0]] == 0).all(0))
    assert count_pixel_bytes(open_raster(path)) == 3 * 2 + 3
    assert count_pixel_bytes(open_raster(path, bands=(2,))) == 2 + 1


def test_a_band_without_a_mask_keeps_a_pixel_and_values_count_beside_masks(
    tmp_path: Path, pixels: np.ndarray, valid: np.ndarray
) -> None:
    pixels[2, 30:60, 40:80] = -1
    path = write_masked_vrt(tmp_path, pixels, valid, masked=(1, 2))
    assert not read_missing(open_raster(path)).any()
    assert np.array_equal(read_missing(open_raster(path, any_band=True)), (valid[:2] == 0).any(0))
    hollow = np.stack([valid[0] == 0, valid[1] == 0, pixels[2] == -1])
    assert np.array_equal(read_missing(open_raster(path, nodata=-1)), hollow.all(0))
    assert hollow.all(0).any()
    assert np.array_equal(read_missing(open_raster(path, nodata=-1, any_band=True)), hollow.any(0))


def test_masks_of_bands_go_through_stacks_mosaics_and_copies(
    tmp_path: Path, pixels: np.ndarray, valid: np.ndarray
) -> None:
    path = write_masked_vrt(tmp_path, pixels, valid, masked=(1, 2, 3))
    expected = (valid == 0).all(0)
    copy_raster(open_raster(path), tmp_path / "copy.zarr")
    assert np.array_equal(read_missing(open_raster(tmp_path / "copy.zarr")), expected)
    plain = write_geotiff(tmp_path / "plain.tif", pixels[:1], nodata=3)
    assert np.array_equal(read_missing(open_stack([path])), expected)
    assert not read_missing(open_stack([path, plain])).any()
    for chosen, of in (((3, 1), [2, 0]), ((2,), [1])):
        stack = open_stack([path, plain], ReadOptions(bands=chosen))
        assert np.array_equal(read_missing(stack, blocks=BlockStore(1 << 20)), (valid[of] == 0).all(0))
    beside = write_geotiff(tmp_path / "beside.tif", pixels + 1, transform=TRANSFORM @ TRANSFORM.translation(WIDTH, 0))
    mosaic = open_mosaic([path, beside])
    assert np.array_equal(read_missing(mosaic), np.concatenate([expected, np.zeros_like(expected)], axis=1))


def test_a_mask_beside_the_file_with_masks_of_single_bands_counts(tmp_path: Path, pixels: np.ndarray) -> None:
    """INTERNAL_MASK_FLAGS_n without GMF_PER_DATASET: a .msk with a mask for each band."""
    path = write_geotiff(tmp_path / "a.tif", pixels)
    valid = np.full(pixels.shape, 255, np.uint8)
    valid[0, :30], valid[1, 10:50], valid[2, 20:] = 0, 0, 0
    masks = write_geotiff(tmp_path / "a.tif.msk", valid, photometric="minisblack")
    with rasterio.open(masks, "r+") as dataset:
        dataset.update_tags(**{f"INTERNAL_MASK_FLAGS_{band}": "0" for band in (1, 2, 3)})
    with rasterio.open(path) as dataset:
        assert np.array_equal(dataset.read_masks() == 0, valid == 0)
    assert np.array_equal(read_missing(open_with(path, ReadOptions())), (valid == 0).all(0))
    assert np.array_equal(read_missing(open_with(path, ReadOptions(any_band=True))), (valid == 0).any(0))


def test_windows_beyond_every_mask_have_no_nodata(tmp_path: Path, pixels: np.ndarray, valid: np.ndarray) -> None:
    raster = open_raster(write_masked_vrt(tmp_path, pixels, valid, masked=(1, 2, 3)), any_band=True)
    reader = raster.open_reader()
    window = Window(y=0, x=0, height=9, width=WIDTH)
    assert reader.read_missing(window, reader.read(window)) is None
    reader.close()


def test_a_run_of_masks_in_all_bands_does_not_go_on_with_those_in_any(
    tmp_path: Path, pixels: np.ndarray, valid: np.ndarray
) -> None:
    path = write_masked_vrt(tmp_path, pixels, valid, masked=(1, 2, 3))
    in_all, in_any = (fingerprint_raster(open_raster(path, any_band=any_band)) for any_band in (False, True))
    assert in_all != in_any
