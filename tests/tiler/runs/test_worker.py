"""Nodata of output pixels, for every ratio of output to input pixels; and the comparison of the start check."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from outsize.tiler.base.geometry import Window
from outsize.tiler.output.values import missing_in_output
from outsize.tiler.runs.check import compare_patches

from ...support.runs import class_network, run, scene

pytestmark = pytest.mark.system


@given(st.sampled_from(["1", "2", "3", "1/2", "1/3", "3/2", "2/3", "3/4", "5/2"]), st.integers(0, 2**31), st.data())
@settings(max_examples=150, deadline=None)
def test_an_output_pixel_is_nodata_where_every_pixel_under_it_is(ratio: str, seed: int, data: st.DataObject) -> None:
    scale = Fraction(ratio)
    missing = np.random.default_rng(seed).random((9, 11)) < 0.6
    # Windows start where input and output pixels meet.
    origin = scale.denominator * data.draw(st.integers(0, 3))
    window = Window(y=origin, x=0, height=9, width=11)
    first = int(origin * scale)
    rows = data.draw(st.integers(1, max(1, floor(9 * scale))))
    columns = data.draw(st.integers(1, max(1, floor(11 * scale))))
    core = Window(y=first, x=0, height=rows, width=columns)
    found = missing_in_output(missing, window, core, (scale, scale))
    for i in range(rows):
        for j in range(columns):
            y0, y1 = floor((first + i) / scale) - origin, ceil((first + i + 1) / scale) - origin
            x0, x1 = floor(j / scale), ceil((j + 1) / scale)
            assert found[i, j] == missing[y0:y1, x0:x1].all()


def pair(values: list[float], expected: list[float]) -> tuple[np.ndarray, ...]:
    ours, theirs = np.array([[values]], float), np.array([[expected]], float)
    return (ours > 0).astype(np.uint8), ours, (theirs > 0).astype(np.uint8), theirs


def test_differences_flips_and_agreements_are_counted() -> None:
    inf, nan = float("inf"), float("nan")
    check = compare_patches([pair([1, -inf, nan, 2], [1, -inf, nan, 2.25])], tiles=1, has_logits=True)  # pyright: ignore[reportArgumentType]
    assert (check.max_abs, check.largest, check.flipped, check.pixels) == (0.25, 2.25, 0, 4)
    assert not check.passed
    assert compare_patches([pair([1], [1 + 1e-6])], tiles=1, has_logits=True).passed  # pyright: ignore[reportArgumentType]
    assert compare_patches([pair([-1], [1])], tiles=1, has_logits=True).flipped == 1  # pyright: ignore[reportArgumentType]
    assert not compare_patches([pair([nan], [1])], tiles=1, has_logits=True).passed  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_tolerance_goes_with_the_logits(scale: float) -> None:
    good = compare_patches([pair([scale * (1 + 1e-5)], [scale])], tiles=1, has_logits=True)  # pyright: ignore[reportArgumentType]
    bad = compare_patches([pair([scale * 1.01], [scale])], tiles=1, has_logits=True)  # pyright: ignore[reportArgumentType]
    assert good.passed
    assert not bad.passed


def test_a_worker_never_imports_torch() -> None:
    # It costs 170 MB in each process. Tasks, plugins and patches are unpickled from these modules.
    code = (
        "import sys\n"
        "import outsize.tiler.runs.check, outsize.tiler.engines.openvino\n"
        "import outsize.tiler.cluster.jobs, outsize.tiler.cluster.schedule\n"
        "import outsize.tiler.copying.transfer, outsize.tiler.runs.worker\n"
        "print('torch' in sys.modules)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "False"


@pytest.mark.parametrize("method", ["window", "program"])
def test_openvinos_workers_never_import_torch(tmp_path: Path, method: str) -> None:
    """It would take a quarter of a small budget; nothing that a worker is sent may bring it."""
    source = scene(tmp_path, 200, 210)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None, processes=True) as cluster,
        Client(cluster) as client,
    ):
        run(source, class_network(), tmp_path / "o.zarr", client, engine="openvino", method=method)
        # By a builtin: a function of this module would be found by importing it.
        found = client.run(eval, "sorted({'torch', 'sympy'} & set(__import__('sys').modules))")
    assert list(found.values()) == [[]]
