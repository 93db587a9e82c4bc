"""Code in docs/training.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

from .rasters import write_geotiff

DOCUMENT = Path(__file__).parents[2] / "docs/training.md"
SHAPE = (53, 67)


def test_the_documented_loops_work_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, of_images, on_dask = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert "range(100)" in loop
    rng = np.random.default_rng(0)
    write_geotiff(tmp_path / "scene.tif", rng.integers(1, 255, (4, *SHAPE), np.uint8))
    write_geotiff(tmp_path / "labels.tif", rng.integers(0, 6, (1, *SHAPE), np.uint8))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(loop.replace("range(100)", "range(1)"), names)
    first = names["value"].item()
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as names["client"],
    ):
        exec(on_dask, names)
    spread = names["value"].item()
    assert spread < first  # by the loop's step
    exec("value = outsize.tile_loss(analysed, plan, loss, raster, labels)", names)
    assert spread == pytest.approx(names["value"].item(), rel=1e-6)
    exec(of_images, names)
    gradients = [parameter.grad for parameter in names["model"].parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
