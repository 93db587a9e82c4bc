"""Bands by name on the command line: in `plan`, `ingest` and `train`, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from outsize.models import SegmentationModel, load_model
from outsize.pipelines.segment import run as segment
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.opening import open_raster

from ...support.commands import outsize_here, result_of
from ...support.rasters import unique_pixels, write_geotiff
from ...support.small_model import save_small_model

S2 = ("B02", "B03", "B04", "B08")
PIXELS = unique_pixels(4, 40, 44, np.uint16) % 251


def write_named(path: Path, image: np.ndarray, names: tuple[str, ...]) -> Path:
    write_geotiff(path, image)
    with rasterio.open(path, "r+") as dataset:
        dataset.descriptions = names
    return path


@pytest.mark.system
def test_a_plan_says_which_bands_go_into_the_model_and_how_they_are_scaled(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model.json", S2)
    scene = write_named(tmp_path / "scene.tif", PIXELS, S2[::-1])
    shown = outsize_here("plan", scene, "--model", model).stdout
    assert "bands     by name: B02 = 4 (B02), B03 = 3 (B03), B04 = 2 (B04), B08 = 1 (B08)" in shown
    assert "scaling   min-max: (x - 0) / 255" in shown
    said = result_of(outsize_here("--json", "plan", scene, "--model", model))["bands"]
    assert (said["matched"], said["numbers"]) == ("by name", [4, 3, 2, 1])
    chosen = result_of(outsize_here("--json", "plan", scene, "--model", model, "--bands", "B08,4,green,b4"))["bands"]
    assert (chosen["matched"], chosen["numbers"]) == ("as chosen", [1, 4, 3, 2])


def test_a_file_whose_names_disagree_with_the_models_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model.json", S2)
    scene = write_named(tmp_path / "scene.tif", PIXELS, ("B02", "B03", "B04", "B11"))
    refused = outsize_here("segment", scene, tmp_path / "out.zarr", "--model", model, "--no-dashboard")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "B11 in the place of B08, model model takes 4 (B02, B03, B04, B08); choose them with --bands" in (
        refused.stderr
    )
    assert not (tmp_path / "out.zarr").exists()
    assert outsize_here("plan", scene, "--model", model, "--bands", "1,2,3,4").returncode == 0


def test_ingest_takes_bands_by_name_and_keeps_their_names(tmp_path: Path) -> None:
    scene = write_named(tmp_path / "scene.tif", PIXELS, S2)
    assert outsize_here("ingest", scene, tmp_path / "copy.zarr", "--bands", "B08,red").returncode == 0
    copy = open_raster(tmp_path / "copy.zarr")
    assert copy.band_names == ("B08", "B04")
    assert np.array_equal(copy.open_reader().read(Window(y=0, x=0, height=40, width=44)), PIXELS[[3, 2]])
    refused = outsize_here("ingest", scene, tmp_path / "more.zarr", "--bands", "B12")
    assert (refused.returncode, "has no one band B12, it has 1 B02" in refused.stderr) == (2, True)


def test_scenes_of_a_training_are_read_in_the_order_of_the_first(tmp_path: Path) -> None:
    first = write_named(tmp_path / "first.tif", PIXELS, S2)
    second = write_named(tmp_path / "second.tif", PIXELS[::-1], S2[::-1])
    labels = write_geotiff(tmp_path / "labels.tif", (PIXELS[:1] > 120).astype(np.uint8), photometric="minisblack")
    words = ["--labels", labels, "--labels", labels, "--classes", "low,high", "--steps", "1", "--widths", "4,4"]
    out = tmp_path / "out"
    done = outsize_here("train", first, second, "--out", out, *words, "--core", "32", "--validation", "0")
    assert done.returncode == 0, done.stderr
    assert f"{second}: bands by name: B02 = 4 (B02)" in done.stderr
    survey = json.loads((out / "survey.json").read_text())
    # Twice the same pixels, band by band.
    assert np.allclose(survey["means"], PIXELS.mean((1, 2)))
    described = json.loads((out / "best.json").read_text())
    assert [band["name"] for band in described["properties"]["mlm:input"][0]["bands"]] == list(S2)
    strange = write_named(tmp_path / "strange.tif", PIXELS, ("B02", "B03", "B04", "B05"))
    refused = outsize_here("train", first, strange, "--out", tmp_path / "no", *words)
    assert (refused.returncode, "B05 in the place of B08" in refused.stderr) == (2, True)


def test_a_model_is_loaded_once_though_a_raster_has_more_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_small_model(tmp_path / "model.json", S2)
    scene = write_named(tmp_path / "scene.tif", PIXELS[[3, 3, 2, 1, 0]], ("B11", *S2[::-1]))
    loaded: list[SegmentationModel] = []
    monkeypatch.setattr(segment, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1])
    shown = outsize_here("plan", scene, "--model", model)
    assert "by name: B02 = 5 (B02)" in shown.stdout
    assert len(loaded) == 1


def test_a_batch_says_which_bands_go_into_the_model_where_that_changes(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model.json", S2)
    for name, order in (("a", S2), ("b", S2), ("c", S2[::-1])):
        write_named(tmp_path / f"{name}.tif", PIXELS, order)
    scenes = [tmp_path / f"{name}.tif" for name in "abc"]
    shown = outsize_here("segment", *scenes, "--out-dir", tmp_path / "maps", "--model", model, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stderr.splitlines() if line.startswith("bands ")]
    assert [line.split(", ")[0] for line in lines] == [
        "bands     by name: B02 = 1 (B02)",
        "bands     by name: B02 = 4 (B02)",
    ]
    assert shown.stderr.count("scaling   min-max: (x - 0) / 255") == 2
    assert shown.stderr.count("task      multiclass") == 2
