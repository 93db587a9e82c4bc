"""Augmentation: augmenting and then tiling equals tiling and then augmenting."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from outsize.models.segmentation.training.augmentation import Augmentation, Turn, Variant
from outsize.models.segmentation.training.scene import SceneLabels, TrainingScene, VariantRaster
from outsize.models.segmentation.training.split import BlockSplit
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.labels.labels import UNLABELLED, LabelOptions, open_labels
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.raster import read_filled

from ....support.rasters import unique_pixels, write_geotiff

SHAPE = (37, 53)
TURNS = [Turn(transpose=t, mirror_y=y, mirror_x=x) for t, y, x in product((False, True), repeat=3)]


@pytest.mark.parametrize("turn", TURNS)
def test_a_window_of_a_turned_image_is_the_turned_window(turn: Turn) -> None:
    image = unique_pixels(3, *SHAPE)
    turned = turn.apply(image)
    assert turned.shape[1:] == turn.shape(SHAPE)
    grid = Grid(shape=turn.shape(SHAPE), cell=(11, 7))
    for at in grid:
        window = grid.window(*at)
        source = turn.source_window(window, SHAPE)
        assert np.array_equal(turn.apply(image[:, *source.slices()]), turned[:, *window.slices()])
        assert turn.turned_window(source, SHAPE) == window


def test_the_eight_turns_differ() -> None:
    image = unique_pixels(1, 5, 5)
    assert len({turn.apply(image).tobytes() for turn in TURNS}) == 8


def open_scene(folder: Path) -> TrainingScene:
    image = unique_pixels(2, *SHAPE, np.int16)
    image[:, 5:9, 10:30] = -1
    labels = (unique_pixels(1, *SHAPE) % 4).astype(np.uint8)
    raster = open_raster(write_geotiff(folder / "scene.tif", image, nodata=-1))
    path = write_geotiff(folder / "labels.tif", labels)
    options = LabelOptions(values=("0", "1", "2"), nodata=(3,))
    names = ("a", "b", "c")
    found = open_labels(str(path), raster.place, SHAPE, of="scene", names=names, options=options)
    return TrainingScene(raster=raster, labels=found, split=BlockSplit(share=0.2, block=9, guard=2, offset=0.4))


@pytest.mark.parametrize("turn", TURNS)
def test_augmenting_then_tiling_equals_tiling_then_augmenting(tmp_path: Path, turn: Turn) -> None:
    scene = open_scene(tmp_path)
    variant = Variant(turn=turn, gain=(1.25, 0.5), offset=(3.0, -2.0))
    fill = (7.0, 9.0)
    reader = scene.raster.open_reader()
    whole = reader.read(Window.whole(SHAPE)).astype(np.float64)
    missing = (whole == -1).all(0)
    adjusted = whole * np.array(variant.gain)[:, None, None] + np.array(variant.offset)[:, None, None]
    expected = turn.apply(np.where(missing, np.array(fill)[:, None, None], adjusted))
    view = VariantRaster.of(scene.raster, variant, np.dtype(np.float64))
    assert view.shape == expected.shape
    pixels = view.open_reader()
    labels = SceneLabels(scene=scene, part="training", turn=turn)
    classes = labels.open_reader()
    stored = scene.labels.open_reader().read(Window.whole(SHAPE))
    assert scene.split is not None
    counted = np.where(scene.split.find_training(Window.whole(SHAPE)) & ~missing, stored, UNLABELLED)
    assert 0 < (counted != UNLABELLED).mean() < 0.6
    grid = Grid(shape=view.shape_yx, cell=(13, 17))
    for at in grid:
        window = grid.window(*at)
        filled = read_filled(pixels, view, window, fill)
        assert np.array_equal(filled.image, expected[:, *window.slices()])
        assert np.array_equal(classes.read(window), turn.apply(counted)[window.slices()])


def test_labels_over_undeclared_nan_do_not_count(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((2, 16, 16), np.float32)
    image[:, :, 8:] = np.nan
    raster = open_raster(write_geotiff(tmp_path / "scene.tif", image))
    assert not raster.nodata_rule.values
    path = write_geotiff(tmp_path / "labels.tif", np.ones((1, 16, 16), np.uint8))
    found = open_labels(str(path), raster.place, (16, 16), of="scene", names=("a", "b"), options=LabelOptions())
    scene = TrainingScene(raster=raster, labels=found, split=None)
    classes = SceneLabels(scene=scene, part="training").open_reader().read(Window.whole((16, 16)))
    assert np.array_equal(classes == UNLABELLED, np.isnan(image[0]))


def test_variants_are_drawn_as_asked_and_do_not_disturb_each_other() -> None:
    def draw(text: str) -> list[Variant]:
        rng = np.random.default_rng(5)
        return [Augmentation.parse(text).draw(rng, (10.0, 20.0)) for _ in range(200)]

    everything = draw("flips,turns,radiometry=0.2")
    assert {variant.turn for variant in everything} == set(TURNS)
    gains = np.array([variant.gain for variant in everything])
    offsets = np.array([variant.offset for variant in everything])
    assert 0.8 <= gains.min() < 0.85 < 1.15 < gains.max() <= 1.2
    assert 3.5 < np.abs(offsets[:, 1]).max() <= 4.0
    assert [variant.turn for variant in draw("flips,turns")] == [variant.turn for variant in everything]
    assert all(not variant.turn.transpose for variant in draw("flips"))
    image = unique_pixels(1, 4, 4)
    quarter_turns = {np.rot90(image, k, (1, 2)).tobytes() for k in range(4)}
    assert {variant.turn.apply(image).tobytes() for variant in draw("turns")} == quarter_turns
    assert set(draw("none")) == {Variant(turn=Turn())}
    for text in ("flip", "flips=2", "none,flips", "radiometry=much", "radiometry=1.5"):
        with pytest.raises(UsageError, match=r"augmentations|radiometry"):
            Augmentation.parse(text)
