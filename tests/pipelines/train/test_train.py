"""`outsize train` and `outsize evaluate`: trained, killed, continued, refused, scored."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from outsize.models import load_model
from outsize.models.segmentation.networks.scaling import Scaling
from outsize.models.segmentation.training.metrics import Confusion
from outsize.models.segmentation.training.split import BlockSplit
from outsize.models.segmentation.training.trainer import Trainer
from outsize.pipelines.base.training_log import TrainingLog, read_log
from outsize.pipelines.train import run as train
from outsize.pipelines.train.survey import Survey
from outsize.tests.support import commands
from outsize.tiler.base.errors import LabelError, OutputError
from outsize.tiler.output.store import open_array
from outsize.tiler.rasters.georeference import Georeference
from outsize.tiler.rasters.opening import open_raster
from rasterio.features import shapes

from ...support.rasters import CRS, TRANSFORM, write_geotiff
from ...support.train_commands import SHAPE, done, done_apart, make_scene, outsize, refusal, same_log, same_tensors

pytestmark = pytest.mark.system

SMALL = ("--widths", "4,6", "--core", "64", "--step", "tiles:2", "--warm-up", "2", "--val-every", "3", "--threads", "1")
"""A network with a reach of 10, and steps of a fraction of a second; threads would wait for those of other tests."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def trained(scene: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Six steps without a stop."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, done_apart("train", scene[0], "--labels", scene[1], "--out", out, "--steps", "6", *SMALL)


_DYING = """
import os, signal
from outsize.models.segmentation.training.trainer import Trainer
made, step = 0, Trainer.make_step
def dying(self):
    global made
    if made == {after}:
        os.kill(os.getpid(), signal.{signal})
    made += 1
    return step(self)
Trainer.make_step = dying
"""
_INTERRUPTED_IN_VALIDATION = """
import os, signal
from outsize.models.segmentation.training.step import StepEngine
made, predict = 0, StepEngine.predict
def interrupted(self, *arguments):
    global made
    made += 1
    if made == {tile}:
        os.kill(os.getpid(), signal.SIGINT)
    return predict(self, *arguments)
StepEngine.predict = interrupted
"""


def run_dying(after: int, how: str, words: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which gets a signal before the step after so many."""
    return commands.outsize(*words, first=_DYING.format(after=after, signal=how), timeout=300)


def test_a_killed_training_goes_on_to_the_same_bits(
    scene: tuple[Path, Path], trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, _ = trained
    out = tmp_path / "out"
    words = ["train", scene[0], "--labels", scene[1], "--out", out, "--steps", "6", *SMALL]
    killed = run_dying(4, "SIGKILL", words)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((out / "state.json").read_text())["step"] == 3
    assert len([line for line in read_log(out / "train.jsonl") if "validation" not in line]) == 4
    # The comparison sees something.
    assert not same_tensors(whole / "state-00000006.safetensors", out / "state-00000003.safetensors")
    code, continued, err = outsize(*words)
    assert code == 0, err
    assert "goes on after step 3" in err
    assert continued["steps"] == 6
    name = "state-00000006.safetensors"
    assert same_tensors(whole / name, out / name)
    for name in ("best", "last"):
        assert same_tensors(whole / f"{name}.safetensors", out / f"{name}.safetensors")
    assert same_log(whole, out)


def test_an_interrupted_training_says_how_to_go_on_and_loses_nothing(
    scene: tuple[Path, Path], trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["train", scene[0], "--labels", scene[1], "--out", out, "--steps", "6", *SMALL]
    stopped = run_dying(5, "SIGINT", words)
    assert stopped.returncode == 130
    assert "stopped after step 5" in stopped.stderr
    assert "the same command goes on where it stopped" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    done(*words)
    assert same_tensors(trained[0] / "last.safetensors", out / "last.safetensors")
    assert same_log(trained[0], out)
    # Once more: nothing is left to do, and nothing changes.
    again = done(*words)
    assert again["steps"] == 6
    assert same_log(trained[0], out)


TINY = ("--widths", "4", "--core", "48", "--step", "tiles:1", "--warm-up", "1", "--memory", "6GB", "--threads", "1")
"""Steps that take next to no time."""


def test_a_signal_inside_a_validation_changes_nothing_of_the_training(scene: tuple[Path, Path], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    words = ["train", scene[0], "--labels", scene[1], "--steps", "4", "--val-every", "2", *TINY]
    done(*words, "--out", whole)
    # At its second tile, after the second step.
    stopped = commands.outsize(*words, "--out", out, first=_INTERRUPTED_IN_VALIDATION.format(tile=2), timeout=300)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped after step 2" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert json.loads((out / "state.json").read_text())["step"] == 2
    assert [line["step"] for line in read_log(out / "train.jsonl")] == [1, 2]
    assert not (out / "best.json").exists()
    done(*words, "--out", out)
    assert same_log(whole, out)
    for name in ("state-00000004", "best", "last"):
        assert same_tensors(whole / f"{name}.safetensors", out / f"{name}.safetensors")


def test_a_validation_that_was_interrupted_is_made_when_the_training_goes_on(
    scene: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", scene[0], "--labels", scene[1], "--steps", "3", "--val-every", "2", *TINY]
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = done(*words, "--out", whole)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    add = TrainingLog.add

    def add_and_stop(self: TrainingLog, values: Any) -> None:
        if "validation" not in values:
            add(self, values)
            return
        # The best model is there; before the line, and with it.
        if not_yet:
            raise KeyboardInterrupt
        add(self, values)
        raise KeyboardInterrupt

    not_yet = True
    for place, stop in (("validate", interrupted), ("add", add_and_stop), ("add", add_and_stop)):
        monkeypatch.setattr(*((train, place) if place == "validate" else (TrainingLog, place)), stop)
        code, _, err = outsize(*words, "--out", out)
        monkeypatch.undo()
        assert code == 130
        assert "stopped after step 2" in err
        not_yet = stop is interrupted
    found = done(*words, "--out", out)
    assert [line["validation"]["step"] for line in read_log(out / "train.jsonl") if "validation" in line] == [2, 3]
    assert same_log(whole, out)
    assert found["best"] == expected["best"]
    assert same_tensors(whole / "best.safetensors", out / "best.safetensors")


def test_classes_of_weight_0_draw_no_tiles_and_an_error_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most tiles of this scene hold the class of weight 0 alone."""
    labels = np.zeros((1, *SHAPE), np.uint8)
    labels[:, 150:190, 120:160] = 1
    image = np.random.default_rng(0).integers(1, 255, (3, *SHAPE)).astype(np.uint8)
    place, truth = write_geotiff(tmp_path / "image.tif", image), write_geotiff(tmp_path / "labels.tif", labels)
    words = ["train", place, "--labels", truth, "--validation", "0", "--steps", "8", *TINY]
    out = tmp_path / "out"
    step = Trainer.make_step

    def failing(self: Trainer) -> Any:
        if self.step == 5:
            raise LabelError("nothing counts")
        return step(self)

    monkeypatch.setattr(Trainer, "make_step", failing)
    assert "nothing counts" in refusal(*words, "--out", out, "--class-weights", "0,1")
    monkeypatch.undo()
    assert json.loads((out / "state.json").read_text())["step"] == 5
    done(*words, "--out", out, "--class-weights", "0,1")
    steps = read_log(out / "train.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 9))
    # By whole scenes too, of which one holds that class alone: all tiles of the other.
    empty = write_geotiff(tmp_path / "empty.tif", labels * 0)
    other = tmp_path / "image"
    two = ["train", place, place, "--labels", truth, "--labels", empty, *words[4:]]
    done(*two, "--step", "image", "--steps", "2", "--out", other, "--class-weights", "0,1", "--classes", "a,b")
    assert [line["tiles"] for line in read_log(other / "train.jsonl")] == [20, 20]
    assert "no training pixel has a class whose weight is above 0, got --class-weights 0,0; weigh another" in refusal(
        *words, "--out", tmp_path / "none", "--class-weights", "0,0"
    )


class Killed(BaseException):
    """What no handler of errors sees."""


def test_a_survey_is_there_whole_or_not_at_all_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    survey = Survey(
        splits=(BlockSplit(share=0.2, block=32, guard=3, offset=0.25), None),
        scaling=Scaling.z_score(mean=(1.5, 2.5), stddev=(3.0, 4.0)),
        fill=(1.0, 2.0),
        means=(1.5, 2.5),
        deviations=(3.0, 4.0),
        cell=8,
        training=tuple(rng.integers(0, 9, (4, 5, 3)) for _ in range(2)),
        validation=tuple(rng.integers(0, 9, (4, 5, 3)) for _ in range(2)),
    )

    replace = Path.replace

    def dying_at(name: str) -> Callable[[Path, Path], Path]:
        def killed(self: Path, target: Path) -> Path:
            assert self.read_bytes()
            if target.name == name:
                raise Killed
            return replace(self, target)

        return killed

    for name in ("survey.safetensors", "survey.json"):
        monkeypatch.setattr(Path, "replace", dying_at(name))
        with pytest.raises(Killed):
            survey.save(tmp_path)
        assert Survey.load(tmp_path) is None
    monkeypatch.undo()
    survey.save(tmp_path)
    counts = tmp_path / "survey.safetensors"
    written = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(tmp_path.glob("survey*"))]
    found = Survey.load(tmp_path)
    assert found is not None
    assert (found.splits, found.scaling, found.cell) == (survey.splits, survey.scaling, survey.cell)
    for ours, theirs in ((survey.training, found.training), (survey.validation, found.validation)):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    found.save(tmp_path)
    assert written == [
        (path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(tmp_path.glob("survey*"))
    ]
    counts.write_bytes(counts.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"survey in .* cannot be read: .*; --overwrite begins anew"):
        Survey.load(tmp_path)


def test_what_differs_is_named(scene: tuple[Path, Path], trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = trained[0]
    words = ("train", scene[0], "--labels", scene[1], "--out", out)
    assert re.search(
        r"another training: rate 0.002 there, 0.01 now", refusal(*words, "--steps", "6", *SMALL, "--lr", "0.01")
    )
    assert "steps 6 there, 7 now" in refusal(*words, "--steps", "7", *SMALL)
    copy = tmp_path / "labels.tif"
    copy.write_bytes(scene[1].read_bytes())
    assert "labels 1" in refusal("train", scene[0], "--labels", copy, "--out", out, "--steps", "6", *SMALL)
    copy.unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds notes.txt and no training" in refusal("train", scene[0], "--labels", scene[1], "--out", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.long
def test_cores_follow_from_the_memory_once_and_for_all(scene: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("train", scene[0], "--labels", scene[1], "--steps", "1", "--widths", "16", "--step", "tiles:1")
    words = (*words, "--validation", "0", "--warm-up", "1", "--threads", "1")

    def tiles(out: Path) -> dict[str, Any]:
        return json.loads((out / "training.json").read_text())["data"]["tiles"]

    ample, tight = tmp_path / "ample", tmp_path / "tight"
    predicted = done_apart(*words, "--out", ample, "--memory", "6GB")["predicted_peak_bytes"]
    assert tiles(ample) == {"core": max(SHAPE), "cuts": []}
    # Going on keeps the core, though the memory would now allow a smaller one alone.
    assert f"for cores of {max(SHAPE)} px" in refusal(*words, "--out", ample, "--memory", "50MB")
    done_apart(*words, "--out", tight, "--memory", str(predicted - 20_000_000))
    assert tiles(tight)["core"] < max(SHAPE) or tiles(tight)["cuts"]
    chosen = tiles(tight)
    done(*words, "--out", tight, "--memory", "6GB")
    assert tiles(tight) == chosen


def test_the_log_the_model_and_the_page_are_there(trained: tuple[Path, dict[str, Any]]) -> None:
    out, values = trained
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "best.json", "best.safetensors", "last.json", "last.safetensors", "report.html", "state-00000006.safetensors",
        "state.json", "survey.json", "survey.safetensors", "train.jsonl", "training.json",
    ]  # fmt: skip
    lines = read_log(out / "train.jsonl")
    steps = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["pixels"] > 0 and line["gradient_norm"] > 0 for line in steps)
    validations = [line["validation"] for line in lines if "validation" in line]
    assert [line["step"] for line in validations] == [3, 6]
    best = max(validations, key=lambda line: line["mean_iou"])
    assert values["best"]["mean_iou"] == best["mean_iou"]
    assert values["peak_bytes"] <= values["predicted_peak_bytes"]
    confusion = Confusion(counts=np.array(best["confusion"]))
    assert confusion.mean_iou == best["mean_iou"]
    assert confusion.pixels == best["pixels"] > 1000
    model = load_model(out / "best.json")
    assert [entry.name for entry in model.classes] == ["class 0", "class 1"]
    assert model.fill == tuple(float(round(v)) for v in model.fill)
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<svg") == 4
    for text in ("Confusion matrix", "Worst tiles", "class 0", "--steps 6" if "--steps" in page else "choices"):
        assert text.lower() in page.lower()


def test_it_learns_classes_that_need_context_and_segment_takes_the_model(tmp_path: Path) -> None:
    scene, labels = make_scene(tmp_path)
    other, other_labels = make_scene(tmp_path, seed=1, name="other")
    values = done(
        "train", scene, "--labels", labels, "--out", tmp_path / "out", "--classes", "fine=#102030,coarse",
        "--steps", "70",
        "--widths", "8,12", "--core", "64", "--step", "tiles:3", "--lr", "0.01", "--warm-up", "5", "--val-every", "35",
        "--ema", "0.8", "--threads", "1",
    )  # fmt: skip
    assert values["best"]["mean_iou"] > 0.6
    out = tmp_path / "map.zarr"
    done("segment", other, out, "--model", tmp_path / "out" / "best.json", "--no-dashboard", "--memory", "3GB")
    scores = done("evaluate", out, other_labels)
    assert scores["mean_iou"] > 0.6
    assert scores["classes"] == ["fine", "coarse"]
    found = np.asarray(open_array(out, "class")[:])
    with rasterio.open(other_labels) as dataset:
        truth = dataset.read(1)
    counts = Confusion.count(truth, found, 2)
    assert scores["confusion"] == counts.counts.tolist()
    assert scores["precision"]["coarse"] == counts.counts[1, 1] / counts.counts[:, 1].sum()
    assert scores["recall"]["fine"] == counts.counts[0, 0] / counts.counts[0].sum()

    # Polygons drawn around the same labels score the same.
    place = Georeference(crs_wkt=rasterio.crs.CRS.from_user_input(CRS).to_wkt(), transform=tuple(TRANSFORM)[:6])  # pyright: ignore[reportArgumentType]
    drawn = [
        {"type": "Feature", "properties": {"cover": ["fine", "coarse"][int(value)]}, "geometry": shape}
        for shape, value in shapes(truth, mask=truth != 255, transform=place.affine)
    ]
    crs = {"type": "name", "properties": {"name": CRS}}
    polygons = tmp_path / "polygons.geojson"
    polygons.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": drawn}))
    assert done("evaluate", out, polygons)["confusion"] == scores["confusion"]

    # Several maps are scored one by one, and together.
    both = done("evaluate", out, other_labels, out, polygons)
    assert [entry["labels"] for entry in both["maps"]] == [str(other_labels), str(polygons)]
    assert both["maps"][0]["confusion"] == scores["confusion"]
    assert (np.array(both["confusion"]) == 2 * np.array(scores["confusion"])).all()
    assert "each OUT needs its LABELS" in refusal("evaluate", out, other_labels, out)

    # Going on from the model, on polygons and a whole scene a step, with another scene held out.
    tuned = done(
        "train", other, scene, "--labels", polygons, "--labels", labels, "--validate-on", scene, "--model",
        tmp_path / "out" / "best.json", "--out", tmp_path / "tuned", "--step", "image", "--core", "100", "--steps", "3",
        "--optimiser", "sgd", "--lr", "0.001", "--loss", "cross-entropy+dice", "--class-weights", "balanced",
        "--threads", "1",
    )  # fmt: skip
    assert tuned["classes"] == ["fine", "coarse"]
    assert tuned["best"]["mean_iou"] > 0.6
    with rasterio.open(labels) as dataset, rasterio.open(scene) as pixels:
        wanted = (dataset.read(1) != 255) & (pixels.read() != 0).any(0)
    assert tuned["best"]["pixels"] == wanted.sum()
    tiles = read_log(tmp_path / "tuned" / "train.jsonl")[0]["tiles"]
    assert tiles == 6


def test_what_cannot_be_trained_is_refused_in_one_line(scene: tuple[Path, Path], tmp_path: Path) -> None:
    image, labels = scene
    raster = open_raster(image)
    out = tmp_path / "out"

    def say(*words: str | Path, labels: Path = labels) -> str:
        return refusal("train", image, "--labels", labels, "--out", out, "--steps", "1", *TINY, *words)

    small = write_geotiff(tmp_path / "small.tif", np.zeros((2, 20, 20), np.uint8), photometric="minisblack")
    assert "one band on the grid" in say("--classes", "a,b", labels=small)
    stored = np.zeros((1, *SHAPE), np.uint8)
    beyond = write_geotiff(tmp_path / "beyond.tif", stored + 7)
    assert "is a file, not a folder" in say("--classes", "a,b", "--out", small)
    assert "labels must be 0..1, got 7" in say("--classes", "a,b", labels=beyond)
    moved = write_geotiff(tmp_path / "moved.tif", stored, transform=raster.place.affine @ Affine.translation(0.5, 0))
    assert "must lie on the grid of" in say("--classes", "a,b", labels=moved)
    empty = write_geotiff(tmp_path / "empty.tif", stored + 255)
    assert "no labelled pixel is left to train on" in say("--classes", "a,b", labels=empty)
    assert "no training pixel has the class c" in say("--classes", "a,b,c")
    assert "needs 2 to 4096 classes, the labels have 0" in say(labels=empty)
    assert "no labelled pixel is left to train on" in say("--block", "300", "--validation", "0.9")
    assert "--label-field is for polygons, but all labels are rasters" in say("--label-field", "cover")
    polygons = tmp_path / "labels.geojson"
    assert "--label-nodata is for rasters of labels" in say("--label-nodata", "3", labels=polygons)
    assert "--tls-ca-file, --tls-cert and --tls-key are for a running scheduler" in say("--tls-cert", "cert.pem")
    assert "a loss must be" in say("--loss", "hinge")
    assert "mse is a loss of numbers, and labels are classes here" in say("--loss", "mse")
    other = _described(image, tmp_path, ("red", "green", "nir"))
    last = _described(image, tmp_path, ("red", "swir16", "green"))
    again = ["--labels", labels, "--out", out, "--steps", "1", *TINY]
    assert re.search(
        r"has bands red, swir16, green: .* the first scene, .*red-green-nir.tif, takes 3 \(red, green, nir\); choose",
        refusal("train", other, last, "--labels", labels, *again),
    )
    assert "scenes must have the same bands, " in refusal("train", other, small, "--labels", labels, *again)
    assert "must be one for each of 2 classes, got 3" in say("--class-weights", "1,2,3")
    assert "--validate-on must be one of the scenes" in say("--validate-on", "other.tif")
    assert "leaves no scene to train on" in say("--validate-on", image)
    assert "give one of them" in say("--minutes", "2")
    assert "a step must be image, or tiles:N" in say("--step", "tiles:0")
    assert "a new network without --model" in say("--model", _shipped(), "--classes", "a,b", "--bands", "1,2,3,1")
    assert "has 3 bands, model sample-unet takes 4 (red, green, blue, nir)" in say("--model", _shipped())
    assert re.search(
        r"memory must be at least [\d.]+ [MG]B for cores of 48 px \(process .*\), got 50 MB; give as much",
        say("--memory", "50MB"),
    )
    nan = np.where(np.random.default_rng(0).random((3, *SHAPE)) < 0.01, np.nan, 1).astype(np.float32)
    floats = write_geotiff(tmp_path / "floats.tif", nan)
    answer = refusal("train", floats, "--labels", labels, "--out", out, "--steps", "1", *TINY)
    assert "networks get finite pixels" in answer
    # Nothing of all that is left to go on from.
    assert not (out / "training.json").exists()
    # A scene without names goes with one that has them; and every class against all others is learnt.
    done("train", image, other, "--labels", labels, *again, "--loss", "binary+dice")


def _described(image: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """A copy whose bands are named."""
    copy = folder / f"{'-'.join(names)}.tif"
    copy.write_bytes(image.read_bytes())
    with rasterio.open(copy, "r+") as dataset:
        dataset.descriptions = names
    return copy


def _shipped() -> Path:
    from outsize.models.segmentation.files.sources import default_model_path

    return default_model_path()


_WHOLE_IMAGE = """
from torch import nn
class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
    def forward(self, x):
        x = self.first(x)
        return self.last(x * x.mean((2, 3), keepdim=True).sigmoid())
"""


def test_a_network_that_looks_at_the_whole_image_is_refused(
    scene: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squeezed.py").write_text(_WHOLE_IMAGE)
    monkeypatch.chdir(tmp_path)
    answer = refusal(
        "train", scene[0], "--labels", scene[1], "--out", "out", "--model", "squeezed:Squeezed", "--steps", "1"
    )
    assert re.search(r"mean.*whole image|whole image.*mean|aten.mean", answer)
    assert not Path("out/training.json").exists()


def test_two_trainings_in_one_folder_are_refused(scene: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", scene[0], "--labels", scene[1], "--out", out, "--minutes", "5", *SMALL]
    with (tmp_path / "said").open("w+") as said:
        running = commands.Command(*words, stderr=said)
        try:
            deadline = time.monotonic() + 200
            while not (out / "training.json").exists():
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert "another training runs in" in refusal(*words)
        finally:
            running.send_signal(signal.SIGTERM)
        assert running.wait(200) == 130
    assert "goes on" in (tmp_path / "said").read_text()
