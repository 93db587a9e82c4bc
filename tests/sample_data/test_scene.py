"""The sample scene: seamless, complete, and hard for whoever sees one pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from outsize.sample_data.noise import fractal_noise, hash_unit, value_noise
from outsize.sample_data.scene import BANDS, BUILT_UP, CLASSES, LABEL_NODATA, NODATA, ROAD, Scene, render_window
from outsize.sample_data.small import count_classes, small_scene_path, write_small_scene
from outsize.sample_data.write import write_scene
from outsize.tiler.base.errors import OutputError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.opening import open_raster

SCENE = Scene(height=700, width=900, seed=5)


@pytest.fixture(scope="module")
def whole() -> tuple[np.ndarray, np.ndarray]:
    return render_window(SCENE, Window.whole(SCENE.shape))


@given(st.integers(0, 699), st.integers(0, 899), st.integers(1, 130), st.integers(1, 130))
@settings(max_examples=25, deadline=None)
def test_any_window_equals_the_whole_scene(
    whole: tuple[np.ndarray, np.ndarray], y: int, x: int, height: int, width: int
) -> None:
    window = Window(y=y, x=x, height=height, width=width).clamp(SCENE.shape)
    image, labels = render_window(SCENE, window)
    rows, columns = window.slices()
    assert np.array_equal(image, whole[0][:, rows, columns])
    assert np.array_equal(labels, whole[1][rows, columns])


def test_far_corners_of_the_largest_scene_are_rendered() -> None:
    scene = Scene(height=30_000, width=30_000, seed=1)
    image, labels = render_window(scene, Window(y=29_900, x=29_900, height=100, width=100))
    assert image.shape == (4, 100, 100)
    assert set(np.unique(labels)) <= set(range(6))


def test_nodata_is_one_corner_of_all_bands_and_its_labels(whole: tuple[np.ndarray, np.ndarray]) -> None:
    image, labels = whole
    missing = (image == NODATA).all(0)
    assert np.array_equal(missing, (image == NODATA).any(0))
    assert np.array_equal(missing, labels == LABEL_NODATA)
    assert missing[0, 0]
    assert 0 < missing.mean() < 0.2


@pytest.mark.system
def test_every_class_occurs() -> None:
    _, labels = render_window(Scene(height=2048, width=2048, seed=0), Window(y=0, x=0, height=2048, width=2048))
    assert set(np.unique(labels)) == {*range(len(CLASSES)), LABEL_NODATA}


def test_seeds_give_other_scenes_and_the_same_seed_the_same() -> None:
    window = Window(y=300, x=300, height=50, width=50)
    first, again = (render_window(SCENE, window)[0] for _ in range(2))
    other = render_window(Scene(height=700, width=900, seed=6), window)[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_roof_and_a_road_share_their_colour() -> None:
    """Among asphalt-coloured pixels of a settlement both classes are common, and no band's threshold parts them."""
    image, labels = render_window(Scene(height=3000, width=3000, seed=2), Window(y=0, x=600, height=1500, width=1500))
    red, green, blue, nir = image.astype(int)
    grey = (abs(red - green) < 14) & (abs(green - blue) < 14) & (nir < red) & (red > 70)
    roofs, roads = grey & (labels == BUILT_UP), grey & (labels == ROAD)
    assert roofs.sum() > 5_000
    assert roads.sum() > 5_000
    for band in image:
        a, b = band[roofs], band[roads]
        edges = np.arange(257)
        cumulative = [np.cumsum(np.histogram(v, edges)[0]) / len(v) for v in (a, b)]
        # Best balanced accuracy of any threshold on this band.
        assert 0.5 + abs(cumulative[0] - cumulative[1]).max() / 2 < 0.65


def test_noise_is_uniform_smooth_and_repeatable() -> None:
    iy, ix = np.arange(300)[:, None], np.arange(300)[None]
    values = hash_unit(3, iy, ix)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.02
    smooth = value_noise(3, Window(y=-40, x=5, height=200, width=200), 32)
    assert np.abs(np.diff(smooth, axis=0)).max() < 0.06
    assert np.array_equal(
        fractal_noise(1, Window(y=10, x=20, height=5, width=6), 64, 4),
        fractal_noise(1, Window(y=0, x=0, height=40, width=40), 64, 4)[10:15, 20:26],
    )


def test_the_written_scene_equals_the_rendered_one(tmp_path: Path, whole: tuple[np.ndarray, np.ndarray]) -> None:
    done: list[int] = []
    write_scene(tmp_path, SCENE, advance=done.append)
    assert sum(done) == 700 * 900
    image, labels = open_raster(tmp_path / "scene.zarr"), open_raster(tmp_path / "labels.zarr")
    everything = Window.whole(SCENE.shape)
    assert np.array_equal(image.open_reader().read(everything), whole[0])
    assert np.array_equal(labels.open_reader().read(everything)[0], whole[1])
    assert (image.band_names, image.nodata, labels.nodata) == (BANDS, NODATA, LABEL_NODATA)
    assert image.place == labels.place
    assert image.place.crs is not None
    assert image.place.crs.to_epsg() == 32632
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["labels.zarr", "scene.zarr"]
    with pytest.raises(OutputError, match="exists; choose another folder"):
        write_scene(tmp_path, SCENE)
    write_scene(tmp_path, Scene(height=1, width=1), overwrite=True)
    assert open_raster(tmp_path / "scene.zarr").shape == (4, 1, 1)


def test_the_committed_scene_is_the_generators(tmp_path: Path) -> None:
    write_small_scene(tmp_path)
    for name in ("scene.tif", "labels.tif"):
        committed = small_scene_path().with_name(name)
        with rasterio.open(tmp_path / name) as ours, rasterio.open(committed) as theirs:
            assert np.array_equal(ours.read(), theirs.read())
            assert (ours.crs, ours.transform, ours.nodata) == (theirs.crs, theirs.transform, theirs.nodata)
    assert min(count_classes(tmp_path).values()) > 5_000
    assert sum(path.stat().st_size for path in small_scene_path().parent.iterdir()) < 1_000_000


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"must be 1\.\.200000 pixels, got 0 x 5"):
        Scene(height=0, width=5)
    with pytest.raises(UsageError, match="seed must be"):
        Scene(height=5, width=5, seed=-1)
    with pytest.raises(UsageError, match="is not inside the scene"):
        render_window(SCENE, Window(y=699, x=0, height=2, width=1))
