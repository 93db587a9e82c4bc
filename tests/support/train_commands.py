"""`outsize train` in this process, a scene that it learns, and whether two trainings are the same."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outsize.pipelines.base.training_log import read_log
from outsize.pipelines.commands.cli import main
from safetensors.torch import load_file

from .rasters import write_geotiff

SHAPE = (211, 173)


def outsize(*words: str | Path) -> tuple[int, dict[str, Any], str]:
    """(exit code, its JSON, stderr) of the command in this process, which holds what the tests before have left."""
    roomy = ("--memory", "6GB") if words[0] == "train" and "--memory" not in words else ()
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(["--json", *map(str, (*words, *roomy))])
        except SystemExit as end:
            code = end.code or 0
    return code, json.loads(out.getvalue().splitlines()[-1]), err.getvalue()


def done(*words: str | Path) -> dict[str, Any]:
    code, values, err = outsize(*words)
    assert code == 0, err
    return values


def done_apart(*words: str | Path) -> dict[str, Any]:
    """As `done`, in a process of its own: its memory and its threads are no other test's."""
    call = [sys.executable, "-W", "ignore", "-m", "outsize", "--json", *map(str, words)]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def refusal(*words: str | Path) -> str:
    """The one line that says why not."""
    code, values, err = outsize(*words)
    assert code in (1, 2), err
    assert "Traceback" not in err
    assert "\n" not in values["error"]
    return values["error"]


def make_scene(folder: Path, seed: int = 0, name: str = "scene") -> tuple[Path, Path]:
    """Stripes of two widths in three bands, and which is which: classes that need context; with nodata and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    labels = ((y // 41 + x // 53 + seed) % 2).astype(np.uint8)
    period = np.where(labels == 1, 8, 3)
    bright = ((y + x) % period < period // 2) * 90
    image = np.clip(bright + rng.normal(60, 8, (3, *SHAPE)), 1, 255).astype(np.uint8)
    image[:, :9, 30:60] = 0
    labels[100:104] = 255
    folder.mkdir(exist_ok=True)
    return (
        write_geotiff(folder / f"{name}.tif", image, nodata=0),
        write_geotiff(folder / f"{name}-labels.tif", labels[None]),
    )


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_log(one: Path, other: Path) -> bool:
    def plain(path: Path) -> list[Any]:
        text = json.dumps(read_log(path / "train.jsonl"))
        return json.loads(re.sub(r'"(seconds|memory_bytes)": [\d.e-]+', r'"\1": 0', text))

    return plain(one) == plain(other)
