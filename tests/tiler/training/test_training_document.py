"""Code in docs/how-to/training-loop.md runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest

from ...support.rasters import write_geotiff

pytestmark = pytest.mark.system

DOCUMENT = Path(__file__).parents[3] / "docs/how-to/training-loop.md"
SHAPE = (53, 67)
PROGRAM = """
import pytest
from distributed import Client, LocalCluster

{loop}
first = value.item()
with (
    LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
    Client(cluster) as client,
):
{on_dask}
spread = value.item()
assert spread < first, "the loop's step"
value = outsize.tile_loss(analysed, plan, loss, raster, labels)
assert spread == pytest.approx(value.item(), rel=1e-6)
{of_images}
gradients = [parameter.grad for parameter in model.parameters()]
assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
"""
"""In a process of its own: the documented budget is for one without what other tests leave."""


def test_the_documented_loops_work_as_they_are_written(tmp_path: Path) -> None:
    loop, of_images, on_dask = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert "range(100)" in loop
    rng = np.random.default_rng(0)
    write_geotiff(tmp_path / "scene.tif", rng.integers(1, 255, (4, *SHAPE), np.uint8))
    write_geotiff(tmp_path / "labels.tif", rng.integers(0, 6, (1, *SHAPE), np.uint8))
    program = PROGRAM.format(
        loop=loop.replace("range(100)", "range(1)"), on_dask=indent(on_dask, "    "), of_images=of_images
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
