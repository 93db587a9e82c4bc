"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if not os.environ.get("OUTSIZE_TEST_CUDA"):
    # Tests say what comes out on the CPU; those of CUDA devices alone (docs/engines.md) want to see them.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from dask import config
from distributed import Client, LocalCluster
from distributed.utils import get_mp_context


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
