"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed import Client, LocalCluster

from .object_server import ObjectServer, serve_objects


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectServer]:
    """One for each process: file systems of a store keep the endpoint that they began with."""
    with serve_objects() as server:
        yield server


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Of one worker with two threads, in this process; one for all tests that take it."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client
