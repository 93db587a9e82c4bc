"""Classes of a training: what labels say by themselves, and what cannot be understood."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from outsize.models.segmentation.files.classes import find_classes, parse_classes
from outsize.sample_data.scene import CLASSES, Scene
from outsize.sample_data.write import write_scene
from outsize.tiler.base.errors import UsageError
from outsize.tiler.labels.labels import LabelOptions

from ....support.rasters import write_geotiff


def names_of(*paths: Path, options: LabelOptions | None = None) -> tuple[list[str], tuple[str, ...]]:
    found = find_classes([str(path) for path in paths], options or LabelOptions())
    return [entry.name for entry in found.classes], found.values


def write_polygons(path: Path, values: list[object]) -> Path:
    square = {"type": "Polygon", "coordinates": [[[0, 0], [0, 1], [1, 1], [1, 0], [0, 0]]]}
    features = [{"type": "Feature", "properties": {"cover": value}, "geometry": square} for value in values]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_values_of_rasters_are_classes_without_what_is_unlabelled(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).choice(np.array([0, 2, 5, 255], np.uint8), (1, 31, 37))
    plain = write_geotiff(tmp_path / "plain.tif", stored)
    assert names_of(plain) == (["class 0", "class 2", "class 5"], ("0", "2", "5"))
    assert names_of(plain, options=LabelOptions(nodata=(0, 255)))[1] == ("2", "5")
    other = write_geotiff(tmp_path / "other.tif", np.full((1, 31, 37), 3, np.uint8))
    assert names_of(plain, other)[1] == ("0", "2", "3", "5")
    with pytest.raises(UsageError, match="2 to 4096 classes, the labels have 1"):
        names_of(other)
    many = write_geotiff(tmp_path / "many.tif", np.arange(70 * 70, dtype=np.int16).reshape(1, 70, 70))
    with pytest.raises(UsageError, match="more than 4096 values"):
        names_of(many)
    floats = write_geotiff(tmp_path / "floats.tif", stored.astype(np.float32))
    with pytest.raises(UsageError, match="whole numbers"):
        names_of(floats)


def test_names_that_a_zarr_array_carries_are_taken(tmp_path: Path) -> None:
    write_scene(tmp_path, Scene(height=40, width=30, seed=1))
    assert names_of(tmp_path / "labels.zarr") == ([*CLASSES], tuple(map(str, range(len(CLASSES)))))


def test_values_of_polygons_are_classes_in_order(tmp_path: Path) -> None:
    texts = write_polygons(tmp_path / "texts.geojson", ["sand", "forest", None, "sand"])
    assert names_of(texts) == (["forest", "sand"], ("forest", "sand"))
    numbers = write_polygons(tmp_path / "numbers.geojson", [22531, 2100.0, 300])
    assert names_of(numbers)[1] == ("300", "2100", "22531")
    raster = write_geotiff(tmp_path / "plain.tif", np.zeros((1, 9, 9), np.uint8))
    with pytest.raises(UsageError, match="name them with --classes"):
        names_of(texts, raster)


def test_classes_are_named_and_coloured() -> None:
    found = parse_classes(("water=#2667B2", " land "))
    assert [entry.name for entry in found] == ["water", "land"]
    assert found[0].colour == (0x26, 0x67, 0xB2)
    for texts in (("water", "water"), ("", "land")):
        with pytest.raises(UsageError, match="names that differ"):
            parse_classes(texts)
    with pytest.raises(UsageError, match="six hexadecimal digits"):
        parse_classes(("water=#26",))
