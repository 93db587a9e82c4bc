"""Programs share their weights: what a run takes does not grow with how many programs it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from outsize.tiler.analysis.axis_geometry import compute_geometry, geometry_key
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.geometry import Interval
from outsize.tiler.base.memory import EngineMemory, predict_memory
from outsize.tiler.engines.program_ir import ModelParts, join_models, split_model
from outsize.tiler.engines.programs import Converter

from ...support.large_weights import Fat


def measure(folder: Path, *arguments: object) -> Any:
    """What tests/support/large_weights.py prints, in a process of its own with a cache of its own."""
    completed = subprocess.run(
        [sys.executable, "-m", "outsize.tests.support.large_weights", *map(str, arguments)],
        env={**os.environ, "OUTSIZE_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.system
@pytest.mark.parametrize("cached", [False, True])
def test_programs_have_one_copy_of_the_weights(cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTSIZE_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    network = analyze_network(Fat(64).eval(), bands=3, dtype="float32")
    shape = (101, 101)
    for _ in range(2 if cached else 1):
        converter, kept = Converter(network, shape), dict[str, bytes]()
        graphs: dict[str, bytes] = {}
        for start in (0, 16, 80):
            axes = [compute_geometry(axis, Interval(start=start, stop=start + 21)) for axis in converter.axes]
            graphs["-".join(map(geometry_key, axes))] = converter.convert(axes[0], axes[1], kept)
    assert len(graphs) == 3
    held = sum(map(len, kept.values()))
    assert network.weight_bytes <= held < 1.05 * network.weight_bytes
    joined, weights = join_models(graphs, kept)
    assert not kept  # each went over as it was added
    assert len(joined) == 3
    assert len(weights) < 1.05 * network.weight_bytes


def test_constants_that_are_held_are_not_held_again() -> None:
    graph = b'<net><layer type="Const"><data offset="4" size="3"/></layer></net>'
    kept: dict[str, bytes] = {}
    first = split_model(graph, b"0000abc", kept)
    second = split_model(graph, memoryview(b"1111abcd"), kept)
    assert isinstance(first, ModelParts)
    assert list(first.constants.values()) == [b"abc"]
    assert next(iter(second.constants.values())) is next(iter(first.constants.values()))
    assert len(kept) == 1


@pytest.mark.long
def test_more_programs_take_no_more_memory_to_make(tmp_path: Path) -> None:
    few, many = measure(tmp_path, "pack", 2, 8)
    assert many < few + 1  # each copy would be one more
    assert many < 4


def test_every_worker_counts_the_weights_that_it_is_sent_and_those_that_its_engine_makes() -> None:
    engine = EngineMemory(worker_bytes=10, factor=1.0, constant_bytes=100, weights=2.0)
    known = {"engine": engine, "in_flight": 1, "client_bytes": 0, "activation_bytes": 0, "window_bytes": 0}
    rest = {"result_bytes": 0, "chunk_bytes": 0, "cache_bytes": 0}
    for workers in (1, 4):
        without, found = (
            predict_memory(**known, **rest, workers=workers, weight_bytes=weights) for weights in (0, 1_000)
        )
        assert found.total_bytes - without.total_bytes == workers * 3_000


@pytest.mark.long
def test_a_run_of_many_programs_and_much_weight_keeps_its_budget(tmp_path: Path) -> None:
    """24 million parameters: 98 MB for each copy."""
    few, many = (measure(tmp_path, "run", 64, side, 128, "2GB", tmp_path) for side in (500, 700))
    assert many["programs"] >= 36 > few["programs"] >= 16
    for run in (few, many):
        assert run["peak"] <= run["predicted"] <= 2_000_000_000
    assert many["peak"] < few["peak"] + 2 * many["weights"]
