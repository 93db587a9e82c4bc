"""What labels leave open is said: values that mean no class, and pixels beyond their extent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from outsize.tiler.output.store import open_array
from outsize.tiler.rasters.opening import open_raster

from ...support.commands import outsize_here, result_of
from ...support.rasters import TRANSFORM, unique_pixels, write_geotiff
from ...support.small_model import save_small_model

PIXELS = unique_pixels(4, 40, 44, np.uint16) % 251


def test_a_training_leaves_out_minus_100_and_what_labels_do_not_cover(tmp_path: Path) -> None:
    scene = write_geotiff(tmp_path / "scene.tif", PIXELS)
    values = (PIXELS[:1, :30] > 120).astype(np.int16)
    values[0, :7, :9] = -100
    labels = write_geotiff(tmp_path / "labels.tif", values)
    words = ["--steps", "1", "--widths", "4,4", "--core", "32", "--validation", "0"]
    done = outsize_here("train", scene, "--labels", labels, "--out", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert f"{labels}: labels below 0 are of no class, and left out: 63 px of -100" in done.stderr
    assert "labels of 30 x 44 px on the grid of" in done.stderr
    assert "cover 75 % of it, the rest is unlabelled" in done.stderr
    described = json.loads((tmp_path / "out/training.json").read_text())["data"]
    assert [entry["name"] for entry in described["classes"]] == ["class 0", "class 1"]
    assert sum(described["training_pixels"]) == 30 * 44 - 63


@pytest.mark.system
def test_an_evaluation_counts_pixels_that_labels_know_and_says_which_they_leave_out(tmp_path: Path) -> None:
    scene = write_geotiff(tmp_path / "scene.tif", PIXELS.astype(np.uint8))
    out = tmp_path / "map.zarr"
    model = save_small_model(tmp_path / "model.json")
    assert outsize_here("segment", scene, out, "--model", model, "--no-dashboard").returncode == 0
    found = np.asarray(open_array(out, "class")[:])
    # Of a larger grid, whose corner lies 5 rows above and 3 columns to the right.
    values = np.zeros((1, 50, 60), np.int32)
    values[0, 5:45, :41] = found[:, 3:]
    values[0, 10:14, 6:16] = -100
    place = open_raster(scene).place.moved(-5, 3)
    labels = write_geotiff(tmp_path / "labels.tif", values, transform=place.affine)
    assert place.affine == TRANSFORM @ TRANSFORM.translation(3, -5)
    said = outsize_here("--json", "evaluate", out, labels)
    scores = result_of(said)
    assert (scores["pixels"], scores["accuracy"]) == (40 * 41 - 40, 1.0)
    assert "cover 93.2 % of it, the rest is unlabelled" in said.stderr
    assert f"{labels}: labels below 0 are of no class, and left out: 40 px of -100" in said.stderr
