"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if not os.environ.get("OUTSIZE_TEST_CUDA"):
    # Tests say what comes out on the CPU; those of CUDA devices alone (docs/engines.md) want to see them.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_beside_others() -> None:
    """Several processes run tests side by side: each takes one core."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs made by tests stay out of the user's cache."""
    os.environ["OUTSIZE_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real rasters that are not part of the project; SHARED_DIR says where."""
    folder = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[1] / "../shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder}; set SHARED_DIR")
    return folder
