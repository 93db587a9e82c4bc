"""`outsize face` as its user runs it: plans, refusals, equal losses for any ranks, what a training is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from outsize.tests.support import commands

pytestmark = pytest.mark.system


def outsize(*arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """(values, what stands on stderr) of a command."""
    completed = commands.outsize("--json", *arguments)
    assert completed.returncode == code, completed.stderr
    return (json.loads(completed.stdout.splitlines()[-1]) if completed.stdout.strip() else {}), completed.stderr


def test_the_benchmark_has_one_loss_for_any_number_of_ranks(tmp_path: Path) -> None:
    options = ("--classes", "140000", "--dim", "16", "--batch", "6", "--steps", "2", "--threads", "1")
    options += ("--product-seconds", "0.05")
    alone, said = outsize("face", "benchmark", *options, "--checkpoint", str(tmp_path / "layer"))
    assert "140,000 classes x 16" in said
    assert "step 2 of 2" in said
    two, _ = outsize("face", "benchmark", *options, "--ranks", "2")
    assert two["loss"] == alone["loss"]
    sampled, said = outsize("face", "benchmark", *options, "--sample", "0.1")
    assert f"{sampled['seen']:,} classes a step" in said
    assert abs(sampled["seen"] - 14_000) < 100
    assert sampled["flops"] < 0.11 * alone["flops"]
    assert sampled["loss"] != alone["loss"]
    assert 0 < alone["sgemm_share"] < 2
    assert alone["save_seconds"] > 0
    assert alone["load_seconds"] > 0
    assert alone["bytes_per_class"] < 38
    assert two["peak_bytes"] > alone["peak_bytes"] > alone["rows_bytes"]
    assert (tmp_path / "layer" / "LATEST").read_text() == "step-000000002"


def test_what_does_not_fit_is_refused_before_it_starts() -> None:
    _, said = outsize("face", "benchmark", "--classes", "10000000", "--memory", "4GB", code=2)
    last = said.strip().splitlines()[-1]
    assert last.startswith("outsize: error: 10,000,000 classes x 512 in float16 on 1 rank need 10.")
    assert "classes would fit" in last
    _, said = outsize("face", "benchmark", "--ranks", "4096", code=2)
    assert "ranks must be at most" in said


def test_what_was_trained_can_be_evaluated_and_enrolled(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--faces", "synthetic:40", "--held-out", "4", "--steps", "8", "--batch", "8", "--dim", "16")
    outsize("face", "train", str(folder), *words, "--save-every", "4", "--threads", "1")
    outsize("face", "sample", str(tmp_path / "people"), "--identities", "5", "--images", "2")
    measured, _ = outsize("face", "evaluate", str(tmp_path / "people"), "--embedder", str(folder))
    assert measured["verification"]["genuine_pairs"] == 5
    assert measured["embedder_source"].endswith("step-000000008")
    made, _ = outsize("face", "enroll", str(tmp_path / "g"), str(tmp_path / "people"), "--embedder", str(folder))
    assert (made["people"], made["dim"]) == (5, 16)
    _, said = outsize(
        "face",
        "enroll",
        str(tmp_path / "g"),
        str(tmp_path / "people"),
        "--embedder",
        str(folder / "step-000000004"),
        code=1,
    )
    assert "was made by another embedder" in said
