"""The command line as a user meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import zarr
from affine import Affine
from outsize.models import as_tile_network, load_model
from outsize.pipelines.commands.cli import main
from outsize.sample_data.small import small_scene_path
from outsize.tests.support.commands import Command, fresh_outsize, outsize, result_of
from outsize.tiler.base.geometry import Window
from outsize.tiler.base.text import parse_bytes
from outsize.tiler.output.store import open_array, read_header
from outsize.tiler.rasters.opening import open_raster
from rio_cogeo.cogeo import cog_validate

from ...support.small_model import save_small_model

pytestmark = pytest.mark.system

SCENE = small_scene_path()
LABELS = SCENE.with_name("labels.tif")
PLACE = Affine(2, 0, 1000, 0, -2, 5000)


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small scene's map in a folder of its own, made once by the real command, whose memory is measured."""
    folder = tmp_path_factory.mktemp("segmented")
    words = ("--json", "segment", SCENE, folder / "map.zarr", "--core", "128", "--no-dashboard")
    values = result_of(fresh_outsize(*words))
    (folder / "summary.json").write_text(json.dumps(values))
    return folder


def test_help_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys, outsize\n"
        "from outsize.pipelines.commands.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'dask', 'distributed', 'zarr', 'rasterio', 'numpy')))"
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - began)
        assert completed.returncode == 0
        assert "segment" in completed.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("command", ["sample", "ingest", "plan", "segment", "verify", "evaluate", "export", "doctor"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    completed = outsize(command, "--help")
    assert completed.returncode == 0
    text = completed.stdout.split("Options:")[0].replace("Usage: outsize", "")
    assert re.search(rf"outsize {command}\s", text)


def test_the_map_equals_the_model_on_the_whole_scene(segmented: Path) -> None:
    with rasterio.open(SCENE) as dataset:
        image = dataset.read()
    missing, model = (image == 0).all(0), load_model()
    image[:, missing] = np.reshape(model.fill, (-1, 1))
    with torch.inference_mode():
        expected = as_tile_network(model)(torch.from_numpy(image)[None])[0, 0].numpy()
    expected[missing] = 255
    assert np.array_equal(open_array(segmented / "map.zarr", "class")[:], expected)


def test_the_summary_has_every_promised_number(segmented: Path) -> None:
    values = json.loads((segmented / "summary.json").read_text())
    assert values["pixels"] == 401 * 389
    assert values["tiles"] == 16
    assert values["failed_tiles"] == 0
    assert values["mpx_per_s"] == pytest.approx(values["pixels"] / values["seconds"] / 1e6, rel=0.01)
    assert 0 < values["peak_bytes"] <= values["predicted_peak_bytes"] <= 2e9
    assert 0 <= values["start_check_max_abs"] < 1e-3
    assert values["startup_s"] > 0
    assert values["read_amplification"] == values["predicted_read_amplification"] == 1  # all blocks are kept
    assert 0 < values["check_read_amplification"] < 1


def test_the_same_command_has_nothing_left_to_do(segmented: Path) -> None:
    completed = outsize("segment", SCENE, segmented / "map.zarr", "--core", "128")
    assert completed.returncode == 0
    assert "all 16 tiles are there" in completed.stdout


def test_the_doctor_tries_a_run_and_prints_no_values_of_variables() -> None:
    done = outsize("--json", "doctor", env={"AWS_SECRET_ACCESS_KEY": "hush-hush"})
    found = result_of(done)
    assert found["passed"]
    assert "0 of 147456 pixels differ" in found["self_test"]["text"]
    assert {"torch", "gdal", "zarr", "dask"} <= set(found["versions"])
    assert "COG" in found["gdal"]["drivers"]
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert "hush-hush" not in done.stdout + done.stderr


def test_damage_is_found_and_repaired(tmp_path: Path, segmented: Path) -> None:
    out = tmp_path / "map.zarr"
    for name in ("map.zarr", "map.zarr.run"):
        shutil.copytree(segmented / name, tmp_path / name)
    sound = result_of(outsize("--json", "verify", out, "--samples", "2"))
    assert (sound["sound"], sound["damaged_tiles"], sound["sampled_tiles"]) == (True, 0, 2)
    chunk = out / "class/c/0/0"
    value = chunk.read_bytes()
    chunk.write_bytes(value[:-1])
    found = outsize("verify", out, "--samples", "0")
    assert found.returncode == 1
    assert "1 tile DAMAGED (--repair computes them again)" in found.stdout
    assert "tile 0,0: class/c/0/0 has" in found.stderr
    repaired = result_of(outsize("--json", "verify", out, "--repair", "--samples", "1", "--no-dashboard"))
    assert (repaired["sound"], repaired["repaired_tiles"]) == (True, 1)
    assert chunk.read_bytes() == value


def test_the_map_scores_well_against_the_labels(segmented: Path) -> None:
    values = result_of(outsize("--json", "evaluate", segmented / "map.zarr", LABELS))
    assert values["accuracy"] > 0.98
    assert set(values["iou"]) == {"water", "forest", "cropland", "grass", "built-up", "road"}
    table = outsize("evaluate", segmented / "map.zarr", LABELS).stdout
    assert "mean IoU" in table
    assert "built-up" in table


def test_the_export_is_a_strict_cog_with_everything_in_its_place(segmented: Path) -> None:
    target = segmented / "map.tif"
    completed = outsize("export", segmented / "map.zarr", target, "--overwrite")
    assert completed.returncode == 0, completed.stderr
    valid, errors, warnings = cog_validate(target, strict=True)
    assert valid, (errors, warnings)
    with rasterio.open(target) as cog, rasterio.open(SCENE) as source:
        assert (cog.crs, cog.transform, cog.shape) == (source.crs, source.transform, source.shape)
        assert cog.nodata == 255
        assert np.array_equal(cog.read(1), open_array(segmented / "map.zarr", "class")[:])
        colours = cog.colormap(1)
        for value, entry in enumerate(load_model().classes):
            assert colours[value] == (*entry.colour, 255)
        names = json.loads(cog.tags(1)["CLASS_NAMES"])
        assert names["4"] == "built-up"
        assert cog.tags()["OUTSIZE_MODEL"] == "sample-unet"
    refused = outsize("export", segmented / "map.zarr", target)
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert sorted(path.name for path in segmented.iterdir() if path.name.startswith(".")) == []


def test_overviews_hold_the_most_common_class(tmp_path: Path, segmented: Path) -> None:
    """A class map of 1024 x 1024: in the overview no class appears that was not in the 2 x 2 pixels below."""
    from outsize.pipelines.base.console import Console
    from outsize.pipelines.segment.export import run_export
    from outsize.tiler.analysis.network import analyze_network
    from outsize.tiler.output.store import OutputDescription, create_output, writable
    from outsize.tiler.planning.planner import plan_tiles
    from outsize.tiler.rasters.opening import open_raster

    class Argmax(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(1, keepdim=True).to(torch.uint8)

    plan = plan_tiles((3, 1024, 1024), analyze_network(Argmax(), bands=3))
    description = OutputDescription(kind="class", classes=("a", "b", "c", "d"), colours=((1, 1, 1),) * 4)
    place = open_raster(SCENE).place
    source = {"kind": "file", "paths": ["nowhere"], "options": {}}
    create_output(tmp_path / "o.zarr", plan=plan, description=description, place=place, header={"source": source})
    classes = np.random.default_rng(0).choice([0, 3], (1024, 1024)).astype(np.uint8)
    writable(zarr.open_array(tmp_path / "o.zarr", path="class", mode="r+"))[:] = classes
    run_export(Console(), tmp_path / "o.zarr", tmp_path / "o.tif", overwrite=False)
    with rasterio.open(tmp_path / "o.tif") as cog:
        assert cog.overviews(1) == [2]
        small = cog.read(1, out_shape=(512, 512))
    assert set(np.unique(small)) == {0, 3}
    counts = classes.reshape(512, 2, 512, 2).astype(int).sum((1, 3)) // 3
    assert (small[counts > 2] == 3).all()
    assert (small[counts < 2] == 0).all()
    del segmented


def test_the_quicklook_shows_input_and_result(segmented: Path) -> None:
    from PIL import Image

    target = segmented / "map.png"
    completed = outsize("export", segmented / "map.zarr", target, "--overwrite")
    assert completed.returncode == 0, completed.stderr
    picture = np.asarray(Image.open(target).convert("RGB"))
    assert picture.shape[1] > 2 * 389
    pixels = picture.reshape(-1, 3)
    for entry in load_model().classes:
        assert (pixels == entry.colour).all(1).sum() > 200, entry.name


def test_ingest_is_pixel_equal_and_keeps_the_place(tmp_path: Path) -> None:
    values = result_of(outsize("--json", "ingest", SCENE, tmp_path / "s.zarr"))
    assert values["shape"] == [4, 401, 389]
    raster = open_raster(tmp_path / "s.zarr")
    with rasterio.open(SCENE) as source:
        assert np.array_equal(raster.open_reader().read(Window.whole(raster.shape_yx)), source.read())
        assert (raster.place.crs, raster.place.affine) == (source.crs, source.transform)
        assert raster.band_names == source.descriptions
        assert raster.nodata == source.nodata
    refused = outsize("ingest", SCENE, tmp_path / "s.zarr")
    assert refused.returncode == 1
    assert "exists" in refused.stderr


def test_an_ingest_keeps_what_it_can_read_and_else_leaves_nothing(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 255, (2, 900, 700), dtype=np.uint8)
    with rasterio.open(
        tmp_path / "damaged.tif", "w", driver="GTiff", count=2, height=900, width=700, dtype="uint8", transform=PLACE
    ) as dataset:
        dataset.write(image)
    data = (tmp_path / "damaged.tif").read_bytes()
    (tmp_path / "damaged.tif").write_bytes(data[: 3 * len(data) // 4])
    partly = outsize("ingest", tmp_path / "damaged.tif", tmp_path / "d.zarr")
    assert partly.returncode == 3
    (line,) = (line for line in partly.stderr.splitlines() if line.startswith("unreadable"))
    assert line.startswith("unreadable 670,0,230,700: ")
    assert "damaged.tif: window 670,0,5,700 cannot be read" in line
    copy = open_raster(tmp_path / "d.zarr")
    reader, window = copy.open_reader(), Window.whole((900, 700))
    read = reader.read(window)
    assert np.array_equal(read[:, :670], image[:, :670])
    missing = reader.read_missing(window, read)
    assert missing is not None
    assert not missing[:670].any()
    assert missing[670:].all()
    (tmp_path / "damaged.tif").write_bytes(data[: len(data) - 900 * 700 * 2 + 100])
    failed = outsize("ingest", tmp_path / "damaged.tif", tmp_path / "e.zarr")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("outsize: error: ")
    assert "can be read" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.zarr", "damaged.tif"]


def test_probability_and_logits_are_written_and_exported(tmp_path: Path) -> None:
    for kind in ("probability", "logits"):
        out = tmp_path / f"{kind}.zarr"
        words = ("segment", SCENE, out, "--output", kind, "--region", "100,50,150,170", "--no-dashboard")
        assert outsize(*words).returncode == 0
        assert outsize("export", out, tmp_path / f"{kind}.tif").returncode == 0
        with rasterio.open(tmp_path / f"{kind}.tif") as cog:
            assert cog.descriptions == ("water", "forest", "cropland", "grass", "built-up", "road")
            assert np.array_equal(cog.read(), open_array(out, kind)[...], equal_nan=kind == "logits")
        assert cog_validate(tmp_path / f"{kind}.tif", strict=True)[0]


def test_ingest_keeps_its_budget(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 9, (4, 4200, 4200), dtype=np.uint8)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=4, height=4200, width=4200, dtype="uint8", transform=PLACE
    ) as dataset:
        dataset.write(image)
    for memory, options in (("600MB", ["--workers", "1"]), ("1GB", []), ("2GB", [])):
        out = tmp_path / f"{memory}.zarr"
        command = ("--json", "ingest", tmp_path / "a.tif", out, "--memory", memory, "--no-dashboard", *options)
        values = result_of(fresh_outsize(*command))
        assert values["peak_bytes"] <= values["predicted_peak_bytes"] <= parse_bytes(memory)
        assert np.array_equal(zarr.open_array(out, path="image")[:], image)
    refused = outsize("ingest", tmp_path / "a.tif", tmp_path / "b.zarr", "--memory", "250MB", "--workers", "1")
    assert refused.returncode == 2
    assert "memory must be at least" in refused.stderr


ERRORS = {
    "missing file": (["plan", "nowhere.tif"], 1, "no such raster: nowhere.tif"),
    "not a raster": (["plan", __file__], 1, "not a raster that GDAL can open"),
    "wrong bands": (["plan", str(LABELS)], 2, "has 1 band, model sample-unet takes 4 (red, green, blue, nir)"),
    "budget too small": (["plan", str(SCENE), "--memory", "50MB"], 2, "memory must be at least"),
    "no size": (["plan", str(SCENE), "--memory", "much"], 2, "must look like 2GB"),
    "no model": (["plan", str(SCENE), "--model", "none.json"], 2, "no model at none.json"),
    "axes of a file": (["plan", str(SCENE), "--axes", "yxb"], 2, "--axes is for Zarr"),
    "not an output": (["evaluate", str(SCENE.parent), str(LABELS)], 1, "not an output of outsize"),
    "foreign output": (["segment", str(SCENE), str(Path(__file__).parent)], 1, "not an output of outsize"),
    "output around the source": (["segment", str(SCENE), str(SCENE.parent)], 1, "lie in one another"),
    "not a store's name": (["segment", str(SCENE), "map.tif"], 2, "outsize export map.zarr map.tif"),
    "no scheduler": (
        ["segment", str(SCENE), "unused.zarr", "--scheduler-file", "/nonexistent/scheduler.json"],
        1,
        "no Dask scheduler at",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line_with_the_right_code(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, code, words = ERRORS[what]
    monkeypatch.chdir(tmp_path)
    completed = outsize("--json", *arguments)
    assert completed.returncode == code, completed.stderr
    said = json.loads(completed.stdout.splitlines()[-1])
    assert said["exit_code"] == code
    assert words in said["error"]
    last = completed.stderr.strip().splitlines()[-1]
    assert last.startswith("outsize: error: ")
    assert words in last
    assert "Traceback" not in completed.stderr
    assert not (tmp_path / "unused.zarr").exists()
    assert not (SCENE.parent.parent / "small.run").exists()


def test_a_traceback_only_with_debug() -> None:
    assert "Traceback" in outsize("plan", "nowhere.tif", "--debug").stderr


def test_an_output_without_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = "/proc/outsize/map.zarr"  # root may write anywhere else
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        target = str(tmp_path / "closed" / "map.zarr")
    completed = outsize("segment", SCENE, target)
    assert completed.returncode == 1
    last = completed.stderr.strip().splitlines()[-1]
    assert last.startswith("outsize: error: ")
    assert "unexpected" not in last


def test_options_go_before_variables_before_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: five starts would take their seconds each."""
    config = tmp_path / "run.toml"
    config.write_text('memory = "3GB"\n[plan]\ncore = 256\n')

    def planned(*options: str) -> dict[str, Any]:
        main(["--json", "--config", str(config), "plan", str(SCENE), *options])
        return json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]

    configured = planned()
    assert configured["memory_budget_bytes"] == 3e9
    assert configured["core"] == [256, 256]
    monkeypatch.setenv("OUTSIZE_MEMORY", "4GB")
    assert planned()["memory_budget_bytes"] == 4e9
    assert planned("--memory", "5GB")["memory_budget_bytes"] == 5e9
    config.write_text("[plan]\nmemroy = 1\n")
    with pytest.raises(SystemExit) as ended:
        planned()
    assert ended.value.code == 2
    assert "memroy" in capsys.readouterr().err


def test_an_interrupt_ends_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    scene = tmp_path / "scene"
    assert outsize("sample", scene, "--size", "1000").returncode == 0
    out, page = tmp_path / "map.zarr", tmp_path / "map.html"
    words = ("segment", scene / "scene.zarr", out, "--core", "128", "--no-dashboard")
    records = tmp_path / "map.zarr.run/records-1.jsonl"
    with (tmp_path / "errors").open("wb") as errors:
        # A session of its own: as in a terminal, Ctrl-C reaches workers too.
        command = Command(*words, "--report", page, stderr=errors, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (records.exists() and records.read_text().count("\n") >= 5) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(command.pid, signal.SIGINT)
        code = command.wait(timeout=60)
    said = (tmp_path / "errors").read_text()
    assert code == 130, said
    assert "the same command goes on" in said.splitlines()[-1]
    assert "Traceback" not in said
    told = page.read_text()
    assert "The run was interrupted" in told
    assert "of 64 tiles are done" in told
    assert "<img" not in told  # whoever interrupts does not want to wait for pictures
    values = result_of(outsize("--json", *words))
    assert values["resumed_tiles"] >= 5
    assert values["tiles"] + values["resumed_tiles"] == 64
    assert (open_array(out, "status")[:] == 1).all()
    assert not (open_array(out, "class")[500:, 500:] == 255).any()


@pytest.mark.long
def test_naip_and_sentinel_2_go_through_with_their_place_kept(shared_dir: Path, tmp_path: Path) -> None:
    naip = shared_dir / "data/naip/tile_13477.tif"
    sentinel = shared_dir / "data/sentinel2_rachel_carson/S2B_L1C_20181013_B04.tif"
    for source, options in (
        (naip, []),
        (sentinel, ["--model", str(save_small_model(tmp_path / "one-band.json", ("B04",)))]),
    ):
        out, cog = tmp_path / f"{source.stem}.zarr", tmp_path / f"{source.stem}.tif"
        completed = outsize("--json", "segment", source, out, "--no-dashboard", *options)
        assert result_of(completed)["start_check_flipped"] == 0
        assert outsize("export", out, cog).returncode == 0
        with rasterio.open(cog) as ours, rasterio.open(source) as theirs:
            assert (ours.crs, ours.transform, ours.shape) == (theirs.crs, theirs.transform, theirs.shape)
        assert cog_validate(cog, strict=True)[0]
        assert read_header(out)["source"]["paths"] == [str(source)]


def test_evaluate_leaves_out_what_is_masked_and_refuses_other_grids(segmented: Path, tmp_path: Path) -> None:
    with rasterio.open(LABELS) as dataset:
        labels, profile = dataset.read(), dataset.profile
    valid = np.zeros(labels.shape[1:], np.uint8)
    valid[:200] = 255
    profile.update(nodata=None)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(tmp_path / "masked.tif", "w", **profile) as dataset,
    ):
        dataset.write(labels)
        dataset.write_mask(valid)
    half = result_of(outsize("--json", "evaluate", segmented / "map.zarr", tmp_path / "masked.tif"))
    whole = result_of(outsize("--json", "evaluate", segmented / "map.zarr", LABELS))
    assert 0.4 < half["pixels"] / whole["pixels"] < 0.6
    moved = {**profile, "transform": profile["transform"] * Affine.translation(5.5, 0)}
    for name, settings, image, words in (
        ("moved", moved, labels, "must lie on the grid of"),
        ("float", {**profile, "dtype": "float32"}, labels.astype(np.float32), "labels must be whole numbers"),
        ("high", profile, np.full_like(labels, 200), "labels must be 0..5, got 200"),
        ("negative", {**profile, "dtype": "int16"}, np.full(labels.shape, -2, np.int16), "no pixel in common"),
        ("nothing", profile, np.full_like(labels, 255), "no pixel in common"),
    ):
        with rasterio.open(tmp_path / f"{name}.tif", "w", **settings) as dataset:
            dataset.write(image)
        refused = outsize("evaluate", segmented / "map.zarr", tmp_path / f"{name}.tif")
        assert refused.returncode == 2, name
        assert words in refused.stderr.splitlines()[-1]


def test_a_map_of_a_part_is_scored_with_the_labels_of_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "part.zarr"
    assert outsize("segment", SCENE, out, "--region", "100,50,200,300", "--no-dashboard").returncode == 0
    values = result_of(outsize("--json", "evaluate", out, LABELS))
    assert values["pixels"] <= 200 * 300
    assert values["accuracy"] > 0.95
    assert outsize("export", out, tmp_path / "part.png").returncode == 0
    assert outsize("export", out, tmp_path / "part.tif").returncode == 0
    with rasterio.open(tmp_path / "part.tif") as part, rasterio.open(SCENE) as scene:
        assert part.shape == (200, 300)
        assert part.transform.almost_equals(scene.transform * Affine.translation(50, 100))


def test_pictures_of_thin_rasters_are_whole(tmp_path: Path) -> None:
    from PIL import Image

    image = np.full((4, 3000, 1), 100, np.uint8)
    with rasterio.open(
        tmp_path / "thin.tif", "w", driver="GTiff", count=4, height=3000, width=1, dtype="uint8", transform=PLACE
    ) as dataset:
        dataset.write(image)
    assert outsize("segment", tmp_path / "thin.tif", tmp_path / "m.zarr", "--no-dashboard").returncode == 0
    assert outsize("export", tmp_path / "m.zarr", tmp_path / "m.png").returncode == 0
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.height > 400


def test_options_for_reading_come_from_variables_and_config_too(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('nodata = 9\nbands = "4,3,2,1"\n')
    out = tmp_path / "c.zarr"
    # --config may stand behind the command.
    assert outsize("ingest", SCENE, out, "--config", config).returncode == 0
    copy = open_raster(out)
    assert (copy.nodata, copy.band_names[0]) == (9, "nir")
    assert outsize("ingest", SCENE, out, env={"OUTSIZE_OVERWRITE": "1", "OUTSIZE_BANDS": "2"}).returncode == 0
    assert open_raster(out).band_names == ("green",)
    for words, text in (
        (["--nodata", "none", "--nodata", "9"], "give it alone"),
        (["--bands", "1.5"], "numbers between commas"),
        (["--bands", "9"], "has bands 1 to 4, got 9"),
        (["--region", "1,2,3"], "4 numbers between commas"),
    ):
        refused = outsize("plan", SCENE, *words)
        assert refused.returncode == 2, refused.stderr
        assert text in refused.stderr
