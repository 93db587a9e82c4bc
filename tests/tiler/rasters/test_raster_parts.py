"""Stacks and mosaics against the whole they were cut from, and against rasterio.merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.block_cache import BlockStore
from outsize.tiler.rasters.gdal_files import GdalReader
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import OPEN_FILES, open_mosaic, open_reference, open_stack, reference_to
from outsize.tiler.rasters.raster import Raster, ReadOptions
from rasterio.merge import merge

from ...support.rasters import CRS, TRANSFORM, unique_pixels, write_geotiff


def read(raster: Raster, window: Window | None = None) -> tuple[np.ndarray, np.ndarray]:
    window = window or Window.whole(raster.shape_yx)
    reader = raster.open_reader()
    image = reader.read(window)
    missing = reader.read_missing(window, image)
    reader.close()
    return image, np.zeros(window.shape, bool) if missing is None else missing


def write_piece(folder: Path, name: str, image: np.ndarray, y: int, x: int, **options: object) -> Path:
    return write_geotiff(folder / name, image, transform=TRANSFORM * Affine.translation(x, y), **options)


WHOLE = unique_pixels(3, 41, 53, np.uint16)


@pytest.fixture
def bands(tmp_path: Path) -> list[Path]:
    return [write_geotiff(tmp_path / f"B0{band}.tif", WHOLE[band : band + 1]) for band in range(3)]


def test_a_stack_is_its_files_in_order(bands: list[Path]) -> None:
    stack = open_stack(bands)
    assert stack.shape == WHOLE.shape
    assert stack.band_names == ("B00", "B01", "B02")
    assert (stack.place.crs, stack.place.affine) == (rasterio.crs.CRS.from_string(CRS), TRANSFORM)
    assert np.array_equal(read(stack)[0], WHOLE)
    window = Window(y=7, x=11, height=20, width=30)
    assert np.array_equal(read(stack, window)[0], WHOLE[:, 7:27, 11:41])
    chosen = open_stack(bands, ReadOptions(bands=(3, 1)))
    assert np.array_equal(read(chosen)[0], WHOLE[[2, 0]])
    assert np.array_equal(read(open_reference(reference_to(chosen)))[0], WHOLE[[2, 0]])


def test_files_of_several_bands_are_stacked_too(tmp_path: Path) -> None:
    pairs = [write_geotiff(tmp_path / f"{i}.tif", WHOLE[i : i + 2]) for i in (0, 1)]
    stack = open_stack(pairs)
    assert np.array_equal(read(stack)[0], WHOLE[[0, 1, 1, 2]])
    assert stack.band_names == ("0 1", "0 2", "1 1", "1 2")


@pytest.mark.parametrize("keeps", [0, 1 << 20])
def test_a_file_of_a_stack_is_asked_once_for_all_its_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: int
) -> None:
    """Bands that lie together in a file are decoded together, the mask band too."""
    together = write_geotiff(tmp_path / "together.tif", WHOLE, interleave="pixel")
    other = write_geotiff(tmp_path / "other.tif", WHOLE[:1])
    stack = open_stack([together, other], ReadOptions(bands=(3, 4, 1), mask_band=2, mask_values=(WHOLE[1, 20, 30],)))
    asked: list[tuple[str, int]] = []
    read_bands = GdalReader._read_bands

    def count(reader: GdalReader, window: Window, indexes: tuple[int, ...]) -> np.ndarray:
        asked.append((Path(reader._raster.path).stem, len(indexes)))
        return read_bands(reader, window, indexes)

    monkeypatch.setattr(GdalReader, "_read_bands", count)
    reader = stack.open_reader(BlockStore(keeps) if keeps else None)
    window = Window(y=18, x=20, height=7, width=30)
    image = reader.read(window)
    missing = reader.read_missing(window, image)
    assert sorted(asked) == [("other", 1), ("together", 3)]
    assert np.array_equal(image, WHOLE[[2, 0, 0], 18:25, 20:50])
    assert missing is not None
    assert np.argwhere(missing).tolist() == [[2, 10]]
    # Asked out of turn, the mask is that of the window that is named.
    elsewhere = Window(y=0, x=0, height=5, width=5)
    reader.read(window)
    assert reader.read_missing(elsewhere, WHOLE[[2, 0, 0], :5, :5]) is None


def test_a_stack_is_nodata_where_all_files_are(tmp_path: Path) -> None:
    image = np.array([[[0, 0, 3, 4]], [[9, 9, 0, 9]]], np.int16)
    one = write_geotiff(tmp_path / "one.tif", image[:1], nodata=0)
    other = write_geotiff(tmp_path / "other.tif", image[1:], nodata=9)
    assert read(open_stack([one, other]))[1].tolist() == [[True, True, False, False]]
    assert read(open_stack([one, other], ReadOptions(any_band=True)))[1].tolist() == [[True, True, False, True]]
    marked = open_stack([one, other], ReadOptions(mask_band=2, mask_values=(0,)))
    assert marked.bands == 1
    assert read(marked)[1].tolist() == [[True, True, True, False]]
    same = open_stack([one, write_geotiff(tmp_path / "same.tif", image[1:], nodata=0)])
    assert same.nodata_rule.is_plain
    assert read(same)[1].tolist() == [[False, False, False, False]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crs": "EPSG:32634"}, "EPSG:32633.*but .*EPSG:32634"),
        ({"transform": TRANSFORM * Affine.translation(1, 0)}, "corner 400000 5600000.*but .*corner 400002.5 5600000"),
        ({"transform": TRANSFORM * Affine.scale(1.001)}, "pixel 2.5 -2.5.*but .*pixel 2.5025 -2.5025"),
        ({"dtype": "int32"}, "one dtype: .* has uint16, .* has int32"),
    ],
)
def test_a_stack_of_other_grids_is_refused_with_both(
    tmp_path: Path, bands: list[Path], change: dict[str, object], words: str
) -> None:
    other = write_geotiff(tmp_path / "other.tif", WHOLE[:1], **change)
    with pytest.raises(RasterError, match=words) as refusal:
        open_stack([*bands, other])
    assert "\n" not in str(refusal.value)
    assert "other.tif" in str(refusal.value)


PIECES = ((0, 0, 20, 25), (0, 20, 24, 33), (18, 3, 23, 30), (30, 40, 11, 13))


def cut(folder: Path, image: np.ndarray, **options: object) -> list[Path]:
    """Overlapping pieces that leave holes; where they overlap, each has pixels of its own."""
    paths = []
    for number, (y, x, height, width) in enumerate(PIECES):
        piece = image[:, y : y + height, x : x + width] + number
        paths.append(write_piece(folder, f"piece{number}.tif", piece, y, x, **options))
    return paths


def expected_mosaic(order: list[int]) -> tuple[np.ndarray, np.ndarray]:
    whole, empty = np.zeros_like(WHOLE), np.ones(WHOLE.shape[1:], bool)
    for number in reversed(order):
        y, x, height, width = PIECES[number]
        whole[:, y : y + height, x : x + width] = WHOLE[:, y : y + height, x : x + width] + number
        empty[y : y + height, x : x + width] = False
    return whole, empty


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_a_mosaic_is_its_pieces_the_first_counts_and_holes_are_nodata(tmp_path: Path, order: list[int]) -> None:
    paths = cut(tmp_path, WHOLE)
    mosaic = open_mosaic([paths[i] for i in order])
    assert mosaic.shape == WHOLE.shape
    assert mosaic.place.affine == TRANSFORM
    whole, empty = expected_mosaic(order)
    assert empty.any()
    image, missing = read(mosaic)
    assert np.array_equal(image, whole)
    assert np.array_equal(missing, empty)
    window = Window(y=13, x=17, height=22, width=31)
    image, missing = read(mosaic, window)
    assert np.array_equal(image, whole[:, 13:35, 17:48])
    assert np.array_equal(missing, empty[13:35, 17:48])


def test_a_mosaic_equals_rasterio_merge(tmp_path: Path) -> None:
    image = WHOLE.copy()
    image[:, 10:22, 15:28] = 0
    paths = cut(tmp_path, image, nodata=0)
    merged, transform = merge(paths)
    mosaic = open_mosaic(paths)
    assert mosaic.nodata_rule.is_plain
    assert np.array_equal(read(mosaic)[0], merged)
    assert mosaic.place.affine == transform
    assert np.array_equal(read(mosaic)[1], (merged == 0).all(axis=0))


def test_a_mosaic_of_many_files_keeps_few_open(tmp_path: Path) -> None:
    count = OPEN_FILES + 9
    paths = [write_piece(tmp_path, f"{i}.tif", WHOLE[:, :1, i : i + 1] + 0, 0, i) for i in range(53)]
    paths += [
        write_piece(tmp_path, f"{i}.tif", WHOLE[:, 1:2, i - 53 : i - 52] + 0, 1, i - 53) for i in range(53, count)
    ]
    mosaic = open_mosaic(paths)
    image, missing = read(mosaic)
    assert np.array_equal(image[:, 0], WHOLE[:, 0])
    assert np.array_equal(image[:, 1, : count - 53], WHOLE[:, 1, : count - 53])
    assert missing.sum() == 2 * 53 - count


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crs": "EPSG:32634"}, "on one grid: .*EPSG:32633.*but .*EPSG:32634"),
        ({"transform": TRANSFORM * Affine.translation(10.5, 3)}, "on one grid: .*but .*corner 400026.25"),
        ({"transform": TRANSFORM * Affine.scale(1.001)}, "on one grid: "),
        ({"transform": TRANSFORM * Affine.rotation(1)}, "on one grid: .*rotation"),
        ({"crs": None, "transform": None}, "does not say where it lies"),
    ],
)
def test_pieces_of_other_grids_are_refused_with_both(tmp_path: Path, change: dict[str, object], words: str) -> None:
    paths = cut(tmp_path, WHOLE)
    other = write_geotiff(tmp_path / "other.tif", WHOLE, **change)
    with pytest.raises(RasterError, match=words) as refusal:
        open_mosaic([*paths, other])
    assert "other.tif" in str(refusal.value)


def test_rotated_pieces_of_one_grid_are_joined(tmp_path: Path) -> None:
    turned = TRANSFORM * Affine.rotation(30)
    paths = [
        write_geotiff(tmp_path / f"{x}.tif", WHOLE[:, 5:30, x : x + 20], transform=turned * Affine.translation(x, 5))
        for x in (0, 20)
    ]
    mosaic = open_mosaic(paths[::-1])
    assert np.array_equal(read(mosaic)[0], WHOLE[:, 5:30, :40])
    assert mosaic.place.affine.almost_equals(turned * Affine.translation(0, 5))


def test_no_files_are_refused() -> None:
    for opened in (open_stack, open_mosaic):
        with pytest.raises(RasterError, match="at least one file"):
            opened([])


@pytest.mark.system
def test_naip_pieces_with_and_without_holes(shared_dir: Path) -> None:
    folder = shared_dir / "data/naip"
    block = [folder / f"tile_{n}.tif" for n in (13476, 13477, 13846, 13847)]
    mosaic = open_mosaic(block)
    assert mosaic.shape == (4, 512, 512)
    merged, transform = merge(block)
    image, missing = read(mosaic)
    assert np.array_equal(image, merged)
    assert mosaic.place.affine.almost_equals(transform)
    assert not missing.any()
    everything = sorted(folder.glob("*.tif"))
    image, missing = read(open_mosaic(everything))
    merged, _ = merge(everything, masked=False)
    assert np.array_equal(image, merged)
    assert missing.sum() == missing.size - 8 * 256 * 256 > 0
    assert (image[:, missing] == 0).all()


def test_a_sentinel_2_stack(shared_dir: Path) -> None:
    folder = shared_dir / "data/sentinel2_rachel_carson"
    files = [next(folder.glob(f"*{band}.tif")) for band in ("B04", "B03", "B02", "B08")]
    stack = open_stack(files)
    window = Window(y=1001, x=503, height=77, width=131)
    image, _ = read(stack, window)
    for band, path in enumerate(files):
        with rasterio.open(path) as dataset:
            assert (stack.place.crs, stack.place.affine) == (dataset.crs, dataset.transform)
            assert np.array_equal(image[band], dataset.read(1, window=((1001, 1078), (503, 634))))


def test_a_stack_of_one_file_is_that_file(bands: list[Path]) -> None:
    assert np.array_equal(read(open_stack(bands[:1]))[0], read(open_raster(bands[0]))[0])
