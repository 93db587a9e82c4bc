"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..support.object_server import ObjectServer, serve_objects


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectServer]:
    """One for each process: file systems of a store keep the endpoint that they began with."""
    with serve_objects() as server:
        yield server
