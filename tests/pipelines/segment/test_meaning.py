"""Outputs that mean what the network does: runs against torch on the whole image, and what commands say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from distributed import Client
from outsize.models import SegmentationClass, SegmentationModel, as_tile_network, describe_output, load_model
from outsize.models.segmentation.networks.meaning import Activation, Task
from outsize.models.segmentation.networks.palette import default_colour
from outsize.models.segmentation.networks.scaling import Scaling
from outsize.tests.support.commands import outsize_here, result_of
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.choices import EngineName
from outsize.tiler.output.store import open_array, read_header
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.run import predict
from torch import Tensor, nn

from ...support.rasters import write_geotiff

pytestmark = pytest.mark.system

SHAPE = (150, 131)
NODATA = 0

ANSWERS = """
import torch
from torch import nn

class Answer(nn.Module):
    def __init__(self, channels=1, end="", spread=30.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(channels)
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, channels, 1))
        with torch.no_grad():
            self.body[2].weight *= spread
        self.end = end

    def forward(self, x):
        z = self.body(x / 100)
        if self.end == "softmax":
            return z.softmax(1)
        if self.end == "sigmoid":
            return z.sigmoid()
        if self.end == "argmax":
            return z.argmax(1)
        return z

def yes():
    return Answer()

def soft():
    return Answer(3, "softmax")

def best():
    return Answer(3, "argmax")

def many():
    return Answer(300)
"""
namespace: dict[str, Any] = {"__name__": "answers"}
exec(ANSWERS, namespace)
Answer: type[nn.Module] = namespace["Answer"]


def draw() -> np.ndarray:
    image = np.random.default_rng(5).integers(1, 250, (1, *SHAPE)).astype(np.float32)
    image[:, 60:75, 40:52] = NODATA
    return image


def whole(network: nn.Module) -> Tensor:
    with torch.no_grad():
        result = network.eval()(torch.from_numpy(draw())[None])
    return result[0] if result.dim() == 4 else result


def model_of(network: nn.Module, classes: int, **said: Any) -> SegmentationModel:
    return SegmentationModel(
        name="answer",
        network=network.eval(),
        bands=("pan",),
        scaling=Scaling.none(1),
        fill=(0.0,),
        classes=tuple(SegmentationClass(name=f"c{v}", colour=default_colour(v)) for v in range(classes)),
        **said,
    )


CASES: dict[str, tuple[int, str, Task, Activation, str]] = {
    "yes or no": (1, "", "binary", "none", "class"),
    "probability of yes": (1, "", "binary", "none", "probability"),
    "sigmoid in the network": (1, "sigmoid", "binary", "sigmoid", "class"),
    "softmax in the network": (3, "softmax", "multiclass", "softmax", "probability"),
    "argmax in the network": (3, "argmax", "multiclass", "argmax", "class"),
    "300 classes": (300, "", "multiclass", "none", "class"),
    "argmax of 300 classes": (300, "argmax", "multiclass", "argmax", "class"),
    "questions of their own": (3, "sigmoid", "multilabel", "sigmoid", "probability"),
    "values": (2, "", "regression", "none", "values"),
}


def expect(network: nn.Module, end: str, task: str, output: str) -> np.ndarray:
    """By torch on the whole image, in float64 after the network."""
    values = whole(network).double()
    if output == "values" or end == "argmax":
        return values.numpy()
    if output == "class" and task == "multiclass":
        return values.argmax(0, keepdim=True).numpy()
    share = values if end else values.sigmoid() if task == "binary" else values.softmax(0)
    return (share > 0.3).numpy() if output == "class" else (254 * share).round().numpy()


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_run_equals_torch_on_the_whole_image(
    case: tuple[int, str, Task, Activation, Any], engine: EngineName, client: Client, tmp_path: Path
) -> None:
    channels, end, task, activation, output = case
    network = Answer(channels, end)
    classes = 2 if task == "binary" else channels
    threshold = 0.3 if task == "binary" else None
    model = model_of(network, classes, threshold=threshold, task="multilabel" if task == "multilabel" else None)
    if task == "regression":
        model = model_of(network, classes, task=task)
    path = write_geotiff(tmp_path / "s.tif", draw(), nodata=NODATA)
    analysed = analyze_network(as_tile_network(model, output), bands=1, dtype=torch.float32)
    description = describe_output(model, output)
    assert (description.task, description.activation) == (task, activation)
    out = tmp_path / "o.zarr"
    predict(open_raster(path), analysed, out, description=description, client=client, core=64, engine=engine)
    found = np.asarray(open_array(out, output)[...]).reshape(-1, *SHAPE)
    expected = expect(network, end, task, output)
    missing = draw()[0] == NODATA
    assert found.shape == expected.shape
    if output == "class":
        assert found.dtype == (np.uint16 if channels > 255 else np.uint8)
        nodata = np.iinfo(found.dtype).max
        assert np.array_equal(found == nodata, missing[None])
        assert (found[:, ~missing] != expected[:, ~missing]).mean() < 1e-4
        assert len(np.unique(found)) > 2
    elif output == "probability":
        assert np.array_equal((found == 255).all(0), missing)
        assert np.abs(found[:, ~missing].astype(int) - expected[:, ~missing]).max() <= 1
        assert found[:, ~missing].max() > 250
    else:
        assert np.array_equal(np.isnan(found).all(0), missing)
        assert np.allclose(found[:, ~missing], expected[:, ~missing], rtol=1e-4, atol=1e-3)
    assert np.asarray(open_array(out, "class" if output != "values" else "channel")[...]).size in (channels, found.size)
    # Whatever it holds, it can be read again: by the same run, and by all that comes after.
    assert read_header(out)["kind"] == output


def test_numbers_that_are_no_class_stop_a_run_before_it_writes(client: Client, tmp_path: Path) -> None:
    class Off(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 100).long()

    model = model_of(Off(), 0, activation="argmax")
    analysed = analyze_network(as_tile_network(model), bands=1, dtype=torch.float32)
    path, out = write_geotiff(tmp_path / "s.tif", draw()), tmp_path / "o.zarr"
    with pytest.raises(Exception, match=r"must be 0..65534, got -1..149"):
        predict(open_raster(path), analysed, out, description=describe_output(model), client=client, core=64)
    assert not out.exists()


# Commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "answers.py").write_text(ANSWERS)
    write_geotiff(tmp_path / "s.tif", draw(), nodata=NODATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*words: str) -> dict[str, Any]:
    return result_of(outsize_here("--json", "plan", "s.tif", "--core", "64", *words))


def test_the_plan_says_what_was_taken_for_granted_and_takes_a_word(folder: Path) -> None:
    del folder
    shown = outsize_here("plan", "s.tif", "--core", "64", "--model", "answers:yes").stdout
    assert "task      binary: one channel of logits, yes where its sigmoid is above 0.5 (assumed: one channel;" in shown
    shown = outsize_here("plan", "s.tif", "--core", "64", "--model", "answers:soft").stdout
    assert "3 channels of probabilities (softmax is in the network)" in shown
    said = plan("--model", "answers:yes", "--task", "binary", "--activation", "none", "--threshold", "0.2")
    assert (said["task"], said["activation"], said["threshold"], said["assumed"]) == ("binary", "none", 0.2, None)
    assert plan("--model", "answers:yes", "--task", "regression")["plan"]["output_dtype"] == "float32"
    assert plan("--model", "answers:many")["plan"]["output_dtype"] == "uint16"
    refused = outsize_here("plan", "s.tif", "--model", "answers:soft", "--task", "binary")
    assert refused.returncode == 2
    assert "answers:soft gives 3; channels that exclude each other are multiclass" in refused.stderr
    refused = outsize_here("plan", "s.tif", "--model", "answers:best", "--output", "probability")
    assert "leave the argmax out of the network" in refused.stderr


def test_a_model_file_says_what_its_values_mean(folder: Path) -> None:
    words = ("model", "pack", "answers:yes", "yes.json", "--task", "binary", "--threshold", "0.3", "--class", "cloud")
    packed = outsize_here("--json", *words)
    values = result_of(packed)
    assert [entry["name"] for entry in values["classes"]] == ["not cloud", "cloud"]
    assert (values["task"], values["activation"], values["threshold"]) == ("binary", "none", 0.3)
    properties = json.loads((folder / "yes.json").read_text())["properties"]
    assert properties["outsize:task"] == "binary"
    assert properties["mlm:output"][0]["result"]["shape"] == [1, 1, -1, -1]
    assert "binary, activation none, yes above 0.3" in outsize_here("model", "show", "yes.json").stdout
    model = load_model(folder / "yes.json", trust=True)
    assert (model.task, model.threshold, model.meaning and model.meaning.assumed) == ("binary", 0.3, "")
    assert plan("--model", "yes.json", "--trust-model")["threshold"] == 0.3
    assert plan("--model", "yes.json", "--trust-model", "--threshold", "0.6")["threshold"] == 0.6
    result_of(
        outsize_here("--json", "model", "pack", "answers:yes", "r.json", "--task", "regression", "--class", "height")
    )
    model = load_model(folder / "r.json", trust=True)
    assert (model.task, [entry.name for entry in model.classes]) == ("regression", ["height"])
    properties = json.loads((folder / "r.json").read_text())["properties"]
    assert properties["mlm:tasks"] == ["regression"]
    # A file from before there was a task: as a network without a file.
    old = json.loads((folder / "yes.json").read_text())
    for name in ("outsize:task", "outsize:activation", "outsize:threshold"):
        del old["properties"][name]
    old["properties"]["mlm:output"][0]["classification:classes"] = [{"value": 0, "name": "cloud"}]
    (folder / "old.json").write_text(json.dumps(old))
    model = load_model(folder / "old.json", trust=True)
    assert (model.task, model.threshold, [entry.name for entry in model.classes]) == (
        "binary",
        0.5,
        ["not cloud", "cloud"],
    )


def test_a_map_of_yes_and_no_is_verified_exported_and_scored_as_one(folder: Path) -> None:
    how = ("--core", "64", "--no-dashboard", "--workers", "1", "--model", "answers:yes")
    result_of(outsize_here("--json", "segment", "s.tif", "map.zarr", "--threshold", "0.3", *how))
    header = read_header(folder / "map.zarr")
    assert (header["task"], header["activation"], header["threshold"]) == ("binary", "none", 0.3)
    other = outsize_here("segment", "s.tif", "map.zarr", "--threshold", "0.4", *how)
    assert other.returncode == 1
    assert "threshold 0.3 there, 0.4 now" in other.stderr
    assert result_of(outsize_here("--json", "verify", "map.zarr", "--model", "answers:yes"))["sampled_pixels"] > 0
    missing = draw()[0] == NODATA
    truth = np.where(missing, 255, (whole(Answer()).double().sigmoid()[0] > 0.3).numpy()).astype(np.uint8)
    write_geotiff(folder / "truth.tif", truth[None], nodata=255)
    scores = result_of(outsize_here("--json", "evaluate", "map.zarr", "truth.tif"))
    assert scores["pixels"] == int((~missing).sum())
    assert scores["accuracy"] > 0.9999
    result_of(outsize_here("--json", "segment", "s.tif", "p.zarr", "--output", "probability", *how))
    result_of(outsize_here("--json", "export", "p.zarr", "p.tif"))
    with rasterio.open("p.tif") as dataset:
        assert (dataset.count, dataset.nodata, dataset.descriptions) == (1, 255, ("class 1",))
    result_of(outsize_here("--json", "export", "p.zarr", "p.png"))
    result_of(outsize_here("--json", "report", "p.zarr", "p.html"))
    assert "binary, activation none, yes above 0.5" in (folder / "p.html").read_text()


def test_classes_of_two_bytes_reach_every_command(folder: Path) -> None:
    how = ("--core", "64", "--no-dashboard", "--workers", "1", "--model", "answers:many")
    result_of(outsize_here("--json", "segment", "s.tif", "map.zarr", *how))
    missing = draw()[0] == NODATA
    truth = np.where(missing, 65535, whole(Answer(300)).argmax(0).numpy()).astype(np.uint16)
    assert truth[~missing].max() > 255
    found = np.asarray(open_array(folder / "map.zarr", "class")[...])
    assert found.dtype == np.uint16
    assert (found != truth).mean() < 1e-3
    result_of(outsize_here("--json", "export", "map.zarr", "map.tif"))
    with rasterio.open("map.tif") as dataset:
        assert (dataset.dtypes, dataset.nodata) == (("uint16",), 65535)
        assert np.array_equal(dataset.read(1), found)
        colours = dataset.colormap(1)
        assert all(colours[value][:3] == default_colour(value) for value in (0, 254, 255, 299))
        assert colours[65535] == (0, 0, 0, 0)
    result_of(outsize_here("--json", "export", "map.zarr", "map.png"))
    result_of(outsize_here("--json", "report", "map.zarr", "map.html"))
    largest = np.bincount(found[~missing]).argmax()
    assert f"class {largest}" in (folder / "map.html").read_text()
    assert result_of(outsize_here("--json", "verify", "map.zarr", "--model", "answers:many"))["state"] == "sound"
    # Labels of two bytes, with and without a nodata value of their own.
    for name, options in (("said", {"nodata": 65535}), ("unsaid", {})):
        write_geotiff(folder / f"{name}.tif", truth[None], **options)
        scores = result_of(outsize_here("--json", "evaluate", "map.zarr", f"{name}.tif"))
        assert scores["pixels"] == int((~missing).sum())
        assert scores["accuracy"] > 0.999


def test_left_over_weights_are_listed_and_copies_are_chosen(folder: Path) -> None:
    one, other = Answer().state_dict(), Answer(spread=1.0).state_dict()
    lightning = {f"model.{name}": value for name, value in one.items()} | {"criterion.weight": torch.ones(2)}
    torch.save({"state_dict": lightning}, folder / "l.ckpt")
    shown = outsize_here("plan", "s.tif", "--core", "64", "--model", "answers:yes", "--weights", "l.ckpt").stdout
    assert "weights   the names of state_dict.model in l.ckpt are the network's; left over: criterion.weight" in shown
    torch.save({"state_dict": one, "state_dict_ema": other}, folder / "e.ckpt")
    words = ("plan", "s.tif", "--core", "64", "--model", "answers:yes", "--weights", "e.ckpt")
    refused = outsize_here(*words)
    assert refused.returncode == 2
    assert "2 times, under state_dict, state_dict_ema, and they differ; choose with --weights-key" in refused.stderr
    assert outsize_here(*words, "--weights-key", "state_dict_ema").returncode == 0
    model = load_model("answers:yes", weights="e.ckpt", weights_key="state_dict_ema")
    assert torch.equal(model.network.state_dict()["body.2.weight"], other["body.2.weight"])
