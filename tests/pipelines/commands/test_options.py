"""Every option of the command line arrives: the call that a command makes differs when it is given."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from outsize.pipelines.base.console import Console
from outsize.pipelines.commands.cli import cli
from outsize.sample_data.small import small_scene_path

pytestmark = pytest.mark.system

SCENE = str(small_scene_path())
FACES = "faces"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A command, what it is given besides the option that is tried, and what it calls."""

    words: tuple[str, ...]
    calls: tuple[str, ...]


SEGMENT = Call(
    words=("segment", SCENE, "o.zarr"),
    calls=("segment.run:run_segment", "segment.run:run_plan", "segment.batch:run_batch"),
)
BATCH = Call(words=("segment", SCENE, "--out-dir", "maps"), calls=("segment.scenes:find_scenes",))
POLYGONS = {
    "train": Call(words=("train", SCENE, "--labels", "p.gpkg", "--out", "t"), calls=("train.run:run_train",)),
    "evaluate": Call(words=("evaluate", "o.zarr", "p.gpkg"), calls=("segment.evaluate:run_evaluate",)),
}
PICTURES = Call(words=("face", "train", "t", "--faces", "people"), calls=("faces.train:run_face_train",))
CALLS = {
    "sample": Call(words=("sample", "demo"), calls=("segment.sample:run_sample",)),
    "ingest": Call(words=("ingest", SCENE, "o.zarr"), calls=("segment.ingest:run_ingest",)),
    "plan": Call(words=("plan", SCENE), calls=("segment.run:run_plan", "segment.run:run_proof")),
    "segment": SEGMENT,
    "verify": Call(words=("verify", "o.zarr"), calls=("segment.verify:run_verify",)),
    "train": Call(words=("train", SCENE, "--labels", SCENE, "--out", "t"), calls=("train.run:run_train",)),
    "evaluate": Call(words=("evaluate", "o.zarr", SCENE), calls=("segment.evaluate:run_evaluate",)),
    "report": Call(words=("report", "o.zarr"), calls=("segment.report:run_report",)),
    "export": Call(words=("export", "o.zarr", "o.tif"), calls=("segment.export:run_export",)),
    "face benchmark": Call(
        words=("face", "benchmark", "--classes", "1000"), calls=("faces.benchmark:run_face_benchmark",)
    ),
    "face train": Call(words=("face", "train", "t", "--faces", "synthetic:20"), calls=("faces.train:run_face_train",)),
    "face sample": Call(words=("face", "sample", "demo"), calls=("faces.sample:run_face_sample",)),
    "face evaluate": Call(words=("face", "evaluate", FACES), calls=("faces.evaluate:run_face_evaluate",)),
    "face enroll": Call(words=("face", "enroll", "g", FACES, "--embedder", "e"), calls=("faces.gallery:run_enroll",)),
    "face identify": Call(
        words=("face", "identify", "g", FACES, "--embedder", "e"), calls=("faces.identify:run_identify",)
    ),
    "face calibrate": Call(
        words=("face", "calibrate", "g", FACES, "--embedder", "e"), calls=("faces.gallery:run_calibrate",)
    ),
    "face gallery": Call(words=("face", "gallery", "g"), calls=("faces.gallery:run_gallery",)),
    "model pack": Call(words=("model", "pack", "a.b:c", "o.json"), calls=("segment.model:run_pack",)),
    "model show": Call(words=("model", "show", "m.json"), calls=("segment.model:run_show",)),
}
VALUES = {
    "bands": "2,1",
    "nodata": "7",
    "mask_band": "2=3",
    "axes": "yxb",
    "memory": "3GB",
    "device_memory": "3GB",
    "device": "cpu",
    "region": "1,2,30,40",
    "bounds": "1,2,3,4",
    "scheduler": "tcp://127.0.0.1:8786",
    "dashboard_address": ":9999",
    "labels": "other.tif",
    "classes": "a,b",
    "label_encoding": "rgb",
    "class_values": "1=a,2=b",
    "class_weights": "1,2",
    "step": "tiles:2",
    "loss": "dice",
    "engine": "torch",
    "augment": "none",
    "widths": "8,16",
    "size": "64",
    "falls": "3,5",
    "margin": "cosface",
    "hyperparameter": "a=1",
    "sha256": "0" * 64,
    "far": "1e-2",
    "fpir": "0.3",
    "report": "page.html",
    "faces": "other",
    "scale": "3",
}
VALUES_OF = {
    "face sample": {"size": "64"},
    "sample": {"size": "700", "axes": "yxb"},
    "model pack": {"bands": "red", "classes": "water", "scale": "2"},
    "face train": {"scale": "30", "init": "other", "margin": "arcface", "augment": "flip"},
    "face benchmark": {"classes": "2000"},
}
BESIDE: dict[tuple[str, str], tuple[str, ...]] = {
    **{("*", name): ("--scheduler", "tcp://127.0.0.1:8786") for name in ("tls_ca_file", "tls_cert", "tls_key")},
    ("*", "halo_stride"): ("--halo", "8"),
    **{("train", name): ("--model", "a.b:c") for name in ("weights", "trust_model", "sha256")},
    ("train", "weights_key"): ("--model", "a.b:c", "--weights", "w.pt"),
}
"""What must be given with an option, and is given without it too."""


def commands() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []

    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                walk(inner, (*path, name))
        else:
            found.append((" ".join(path), command))

    walk(cli, ())
    return found


OPTIONS = [
    (name, parameter.name)
    for name, command in commands()
    for parameter in command.params
    if isinstance(parameter, click.Option)
]


class RecordedError(Exception):
    """Ends a command where its work would begin."""


def value_of(name: str, option: click.Option) -> list[str]:
    flag = max(option.opts, key=len)
    if option.is_flag:
        return [max(option.secondary_opts, key=len)] if option.default is True and option.secondary_opts else [flag]
    known = {**VALUES, **VALUES_OF.get(name, {})}
    if isinstance(option.type, click.Choice):
        value = [choice for choice in option.type.choices if choice != option.default][-1]
    elif option.name in known:
        value = known[option.name]
    elif isinstance(option.type, click.IntRange):
        value = str((option.default if isinstance(option.default, int) else option.type.min or 1) + 3)
    elif isinstance(option.type, click.FloatRange):
        value = "0.37"
        if option.type.min is not None and option.type.min >= 1:
            value = "7.5"
    elif option.type.name == "float":
        value = "7"
    else:
        value = "something"
    return [flag, str(value)]


def record(monkeypatch: pytest.MonkeyPatch, call: Call, words: list[str]) -> Any:
    """(what was called, with what), as the command called it."""
    seen: list[Any] = []
    for target in call.calls:
        module, function = target.split(":")

        def recorder(*args: Any, _function: str = function, **keywords: Any) -> None:
            seen.append((_function, [a for a in args if not isinstance(a, Console)], keywords))
            raise RecordedError

        monkeypatch.setattr(importlib.import_module(f"outsize.pipelines.{module}"), function, recorder)
    result = CliRunner().invoke(cli, words, catch_exceptions=True)
    assert isinstance(result.exception, RecordedError), f"{words}: {result.output}{result.exception!r}"
    return seen[0]


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[f"{name} {option}" for name, option in OPTIONS])
def test_an_option_arrives(name: str, option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    command = dict(commands())[name]
    (parameter,) = (p for p in command.params if p.name == option)
    assert isinstance(parameter, click.Option)
    call = CALLS[name]
    if name == "segment" and option in ("lists", "assets"):
        call = BATCH
    if option in ("label_field", "label_encoding"):
        call = POLYGONS[name]
    if (name, option) == ("face train", "resize"):
        call = PICTURES
    given = value_of(name, parameter)
    words = list(call.words)
    if given[0] in words:  # replaced where it is always given
        without = words
        at = words.index(given[0])
        with_it = [*words[:at], *given, *words[at + 2 :]]
    else:
        without = [*words, *BESIDE.get((name, option), BESIDE.get(("*", option), ()))]
        with_it = [*without, *given]
    assert record(monkeypatch, call, with_it) != record(monkeypatch, call, without)
