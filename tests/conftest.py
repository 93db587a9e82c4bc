"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

if not os.environ.get("OUTSIZE_TEST_CUDA"):
    # Tests say what comes out on the CPU; those of CUDA devices alone (docs/reference/engines.md) want to see them.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from dask import config
from distributed import Client, LocalCluster, SpecCluster
from distributed.utils import get_mp_context

WITH_PROCESSES = {"client", "server", "_warm_workers", "cluster", "workers"}
"""Fixtures that start Dask or a process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test is a unit test unless it, or its module, says that it is more than one."""
    for item in items:
        if WITH_PROCESSES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("system")
        if not any(item.get_closest_marker(name) for name in ("system", "long")):
            item.add_marker("unit")


@pytest.fixture(autouse=True)
def _unit_tests_start_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Dask nor a process: what does is a test of the system."""
    if request.node.get_closest_marker("unit") is None:
        return

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a unit test starts a process or Dask; mark its module: pytestmark = pytest.mark.system")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    monkeypatch.setattr(SpecCluster, "__init__", refuse)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    if os.environ.get("PYTEST_XDIST_WORKER"):
        # Several processes run tests side by side, each on one core; engines of the test before may have set more.
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _spare_the_collector() -> None:
    """Hundreds of runs collect garbage, and would look at all of torch each time, and at what tracing and OpenVINO have
    imported since."""
    if len(gc.get_objects(generation=2)) > 50_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs made by tests stay out of the user's cache; processes side by side share theirs."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    os.environ["OUTSIZE_CACHE_DIR"] = str(folder / "cache")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real rasters that are not part of the project; SHARED_DIR says where."""
    folder = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[1] / "../shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set SHARED_DIR")
    return folder


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Of one worker with two threads, in this process; one for all tests that take it."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def _warm_workers() -> Iterator[None]:
    """Worker processes are forked from one that has imported torch and traced, which takes each of them 4 s otherwise.
    Not where variables of their environment count, which is that one's."""
    with config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context()  # has a list of its own, once
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["distributed", "outsize.tests.support.warm_worker"]
        )
        yield
