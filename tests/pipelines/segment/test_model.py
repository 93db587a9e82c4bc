"""`outsize model`, and models by factory on `plan` and `segment`, as a user meets them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from outsize.models import load_model
from outsize.sample_data.small import small_scene_path
from outsize.tests.support.commands import outsize, outsize_here, result_of
from outsize.tiler.output.store import open_array, read_header
from safetensors.torch import load_file, save_file
from stac_model.schema import MLModelProperties
from torch import nn

pytestmark = pytest.mark.system

SCENE = small_scene_path()

TINY = """
from torch import nn
class Tiny(nn.Sequential):
    def __init__(self, width=4, bands=4):
        super().__init__(nn.Conv2d(bands, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1))
"""


def tiny(width: int = 4, bands: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(bands, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1)).eval()


def installed_outsize(folder: Path, *arguments: str | Path) -> Any:
    """The installed command, which does not look into the current folder by itself."""
    command = Path(sys.executable).with_name("outsize")
    return subprocess.run([command, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)


def refusal_of(completed: Any, code: int = 2) -> str:
    assert completed.returncode == code, completed.stderr
    assert "Traceback" not in completed.stderr
    last = completed.stderr.strip().splitlines()[-1]
    assert last.startswith("outsize: error: "), completed.stderr
    return last


def whole_image(network: nn.Module, subtract: Any, divide: Any) -> np.ndarray:
    """The class map as numpy and torch make it of the whole scene at once."""
    with rasterio.open(SCENE) as dataset:
        image = dataset.read()
    scaled = (image.astype(np.float64) - np.reshape(subtract, (-1, 1, 1))) / np.reshape(divide, (-1, 1, 1))
    with torch.inference_mode():
        logits = network.double()(torch.from_numpy(scaled)[None])[0].numpy()
    classes = logits.argmax(0).astype(np.uint8)
    classes[(image == 0).all(0)] = 255
    return classes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinymodule.py").write_text(TINY)
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": tiny(width=7).state_dict()}, tmp_path / "wide.pt")
    return tmp_path


def test_a_factory_of_the_current_folder_is_planned_and_segmented(folder: Path) -> None:
    options = ("--model", "tinymodule:Tiny", "--weights", "w.safetensors")
    plan = installed_outsize(folder, "plan", SCENE, *options)
    assert "model     tinymodule:Tiny" in plan.stdout, plan.stderr
    assert "halo      1 px" in plan.stdout
    values = result_of(outsize("--json", "segment", SCENE, "m.zarr", "--core", "256", "--no-dashboard", *options))
    assert values["start_check_flipped"] == 0
    network = tiny()
    network.load_state_dict(load_file(folder / "w.safetensors"))
    found, expected = open_array(folder / "m.zarr", "class")[:], whole_image(network, [0] * 4, [1] * 4)
    # In float32 and float64 two classes of one pixel may be equal to rounding.
    assert (found != expected).mean() < 1e-4
    header = read_header(folder / "m.zarr")
    assert header["model_sha256"] == hashlib.sha256((folder / "w.safetensors").read_bytes()).hexdigest()
    assert [entry["name"] for entry in header["classes"]] == ["class 0", "class 1", "class 2"]
    other = outsize_here("plan", SCENE, "--model", "tinymodule:Tiny", "--weights", "wide.pt")
    assert "0.weight is 7 x 4 x 3 x 3 there and 4 x 4 x 3 x 3 in the network" in refusal_of(other)
    assert refusal_of(outsize_here("plan", SCENE, "--weights", "w.safetensors")).endswith("by itself")


def test_pack_says_everything_and_show_repeats_it(folder: Path) -> None:
    packed = outsize(
        *("model", "pack", "tinymodule:Tiny", "wide.json", "--weights", "wide.pt", "--hyperparameter", "width=7"),
        *("--name", "wide one", "--band", "r", "--band", "g", "--band", "b", "--band", "n", "--fill", "0,1,2,3"),
        *("--scaling", "offset-scale", "--offset", "5,0,0,1000", "--scale", "1,10000,1,20"),
        *("--class", "water=#1f78b4", "--class", "a=b", "--class", "land"),
    )
    assert packed.returncode == 0, packed.stderr
    file_hash = hashlib.sha256((folder / "wide.json").read_bytes()).hexdigest()
    assert f"--sha256 {file_hash} (of wide.json)" in packed.stdout
    properties = json.loads((folder / "wide.json").read_text())["properties"]
    MLModelProperties.model_validate({key: value for key, value in properties.items() if key.startswith("mlm:")})
    values = result_of(outsize_here("--json", "model", "show", "wide.json"))
    assert values == {
        "model": "wide one",
        "architecture": "tinymodule:Tiny",
        "hyperparameters": {"width": 7},
        "task": "multiclass",
        "activation": "none",
        "threshold": None,
        "parameters": 7 * 4 * 9 + 7 + 3 * 7 + 3,
        "bands": ["r", "g", "b", "n"],
        "scaling": [
            {"type": "offset", "value": 5},
            {"type": "scale", "value": 10_000},
            {"type": "offset", "value": 0},
            {"type": "z-score", "mean": 1000, "stddev": 20},
        ],
        "fill": [0, 1, 2, 3],
        "classes": [
            {"name": "water", "colour": [0x1F, 0x78, 0xB4]},
            {"name": "a=b", "colour": [0x56, 0xB4, 0xE9]},
            {"name": "land", "colour": [0x00, 0x9E, 0x73]},
        ],
        "runs_code": True,
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("wide.json", "wide.safetensors")
        },
    }
    text = outsize_here("model", "show", "wide").stdout
    assert "tinymodule:Tiny(width=7)" in text
    assert "#1F78B4" in text
    refused = refusal_of(outsize_here("plan", SCENE, "--model", "wide.json"))
    assert "it names the factory tinymodule:Tiny, which would be imported and called; if you trust" in refused
    assert file_hash in refused
    assert outsize("plan", SCENE, "--model", "wide.json", "--sha256", file_hash).returncode == 0
    # Repacking keeps what is not said anew, and the name.
    again = outsize("model", "pack", "wide.json", "other.json", "--fill", "9", "--trust-model", "--scaling", "none")
    assert again.returncode == 0, again.stderr
    values = result_of(outsize_here("--json", "model", "show", "other.json"))
    assert (values["model"], values["fill"], values["scaling"]) == ("wide one", [9] * 4, None)
    assert "--overwrite" in refusal_of(outsize_here("model", "pack", "wide.json", "other.json", "--trust-model"), 1)


@pytest.mark.usefixtures("folder")
def test_the_other_scalings_are_packed() -> None:
    for scaling, first, second, entry in (
        ("z-score", "--mean", "--stddev", {"type": "z-score", "mean": 10, "stddev": 200}),
        ("min-max", "--minimum", "--maximum", {"type": "min-max", "minimum": 10, "maximum": 200}),
    ):
        packed = outsize_here(
            *("--json", "model", "pack", "tinymodule:Tiny", f"{scaling}.json", "--weights", "w.safetensors"),
            *("--scaling", scaling, first, "10", second, "200,200,200,200"),
        )
        assert result_of(packed)["scaling"] == [entry] * 4


def test_a_pickled_network_is_packed_as_a_program_that_needs_no_class(folder: Path) -> None:
    code = "import torch, tinymodule; torch.manual_seed(1); torch.save(tinymodule.Tiny(), 'whole.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(folder)})
    assert "it holds pickled Python objects" in refusal_of(outsize("model", "show", "whole.pt"))
    shown = result_of(outsize("--json", "model", "show", "whole.pt", "--trust-model"))
    assert (shown["architecture"], len(shown["bands"]), len(shown["classes"])) == ("Tiny", 4, 3)
    packed = result_of(outsize("--json", "model", "pack", "whole.pt", "p.json", "--trust-model"))
    assert packed["architecture"] == "torch.export.ExportedProgram"
    assert packed["model"] == "p"
    (folder / "tinymodule.py").unlink()
    whole = load_model(folder / "p.json", trust=True).network
    values = result_of(
        outsize("--json", "segment", SCENE, "m.zarr", "--model", "p.json", "--trust-model", "--no-dashboard")
    )
    assert values["failed_tiles"] == 0
    expected = whole_image(nn.Sequential(*map_to_float32(whole)), [0] * 4, [1] * 4)
    assert (open_array(folder / "m.zarr", "class")[:] != expected).mean() < 1e-4


def map_to_float32(network: nn.Module) -> list[nn.Module]:
    """A network of float32 only between two casts."""

    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network(x.float())

    return [Cast()]


PACK = ["model", "pack", "tinymodule:Tiny", "out.json", "--weights", "w.safetensors"]
ERRORS = {
    "no constants": ([*PACK, "--scaling", "z-score"], "--scaling z-score takes --mean and --stddev, got none"),
    "other constants": (
        [*PACK, "--scaling", "min-max", "--mean", "1"],
        "--scaling min-max takes --minimum and --maximum, got --mean",
    ),
    "constants without a scaling": ([*PACK, "--mean", "1"], "--scaling (not given) takes no constants, got --mean"),
    "too few": (
        [*PACK, "--scaling", "z-score", "--mean", "1,2", "--stddev", "1"],
        "--mean needs one number or one for each of 4 bands, got 2",
    ),
    "no numbers": ([*PACK, "--fill", "black"], "--fill must be numbers with commas between them, got 'black'"),
    "zero": ([*PACK, "--scaling", "offset-scale", "--offset", "1", "--scale", "0"], "must divide by numbers"),
    "bands": ([*PACK, "--band", "red"], "fails on images of 1 bands"),
    "classes": ([*PACK, "--class", "a"], "gives 3 channels, one for each class; got 1: a"),
    "colour": ([*PACK, *("--class", "a=#12") * 3], "six hexadecimal digits, #RRGGBB, got '#12'"),
    "hyperparameter": ([*PACK, "--hyperparameter", "width"], "must look like widths=[16,32], got 'width'"),
    "other hyperparameter": ([*PACK, "--hyperparameter", "depth=3"], "tinymodule:Tiny(depth=3) failed (TypeError"),
    "weights only": (["model", "show", "w.safetensors"], "w.safetensors holds weights only"),
    "nothing there": (["model", "show", "none.pt2"], "no model at none.pt2"),
    "hash": (["model", "show", "w.safetensors", "--sha256", "12"], "sha256 must be 64 hexadecimal digits"),
    "other bands": (
        ["plan", str(SCENE), "--model", "three:net"],
        "has 4 bands, model three:net takes 3 (band 1, band 2, band 3)",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line_with_code_2(what: str, folder: Path) -> None:
    arguments, words = ERRORS[what]
    (folder / "three.py").write_text("from tinymodule import Tiny\ndef net(): return Tiny(bands=3)\n")
    assert words in refusal_of(outsize_here(*arguments))
    assert not (folder / "out.json").exists()


def test_help_has_examples_and_the_shipped_model_is_shown() -> None:
    for command in (["model"], ["model", "pack"], ["model", "show"]):
        text = outsize_here(*command, "--help").stdout
        assert "outsize model show" in text or "outsize model pack mynet" in text, command
    values = result_of(outsize_here("--json", "model", "show"))
    assert (values["model"], values["runs_code"]) == ("sample-unet", False)
    assert values["sha256"]["sample-unet.safetensors"] == load_model().sha256


def test_config_and_variables_name_a_model_though_there_is_a_command_of_that_name(folder: Path) -> None:
    (folder / "run.toml").write_text('model = "tinymodule:Tiny"\nweights = "w.safetensors"\n')
    values = result_of(outsize_here("--json", "--config", "run.toml", "plan", SCENE))
    assert values["model"] == "tinymodule:Tiny"
    env = {"OUTSIZE_MODEL": "tinymodule:Tiny", "OUTSIZE_WEIGHTS": "w.safetensors"}
    assert result_of(outsize("--json", "plan", SCENE, env=env))["model"] == "tinymodule:Tiny"
