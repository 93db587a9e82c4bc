"""Engines against the module itself, and what they may not do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.engines.loading import compile_program, load_windows

from ...support.analysed import analysed
from ...support.zoo import ZOO, Finished

pytestmark = pytest.mark.system


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("name", ZOO)
def test_engines_agree_with_the_module_at_changing_sizes(name: str, engine: Any) -> None:
    network = analysed(name, torch.float32)
    loaded = load_windows(compile_program(network, engine, threads=2))
    for size in ((48, 64), (36, 60), (48, 64)):
        image = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
        with torch.no_grad():
            expected = network.module(torch.from_numpy(image)[None])[0].numpy()
        result = loaded.run(image)
        assert result.dtype == expected.dtype
        assert np.abs(result - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.float32, torch.float64])
def test_raw_pixels_go_in_and_finished_bytes_come_out_with_their_logits(engine: Any, dtype: torch.dtype) -> None:
    network = analyze_network(Finished().eval(), bands=3, dtype=dtype)
    assert network.graph.has_logits
    loaded = load_windows(compile_program(network, engine, threads=1))
    image = np.random.default_rng(0).integers(0, 250, (3, 33, 47)).astype(str(dtype).removeprefix("torch."))
    with torch.no_grad():
        logits = network.module.logits(torch.from_numpy(image)[None])[0].numpy()  # pyright: ignore[reportCallIssue]
        expected = network.module(torch.from_numpy(image)[None])[0].numpy()
    result, shown = (array.copy() for array in loaded.run_with_logits(image))
    assert np.abs(shown - logits).max() < 1e-4 * np.abs(logits).max()
    assert result.dtype == np.uint8
    assert np.abs(result.astype(int) - expected.astype(int)).max() <= 1
    assert np.array_equal(loaded.run(image), result)


def test_importing_an_engine_loads_nothing_that_reports_home() -> None:
    code = (
        "import sys, outsize.tiler.engines.openvino\n"
        "sys.exit(sys.modules['openvino_telemetry'] is not None or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
