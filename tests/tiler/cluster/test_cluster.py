"""Clients of schedulers that others have started."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import pytest
from distributed import LocalCluster
from outsize.tiler.cluster.client import ClusterOptions, open_client

pytestmark = pytest.mark.system


def test_a_scheduler_that_is_lost_leaves_no_lines_of_dask() -> None:
    """Whoever needed it says that it is gone."""
    logged: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append("traceback" if record.exc_info else record.getMessage())

    logger, handler = logging.getLogger("distributed.client"), Kept()
    logger.addHandler(handler)
    try:
        with LocalCluster(
            n_workers=0, processes=False, host="127.0.0.1", protocol="tcp", dashboard_address="127.0.0.1:0"
        ) as cluster:
            options = ClusterOptions(scheduler=cluster.scheduler_address)
            with open_client(options, workers=1, threads=1, gdal_cache_bytes=1 << 20) as client:
                cluster.close()
                deadline = time.monotonic() + 20
                while client.status == "running" and time.monotonic() < deadline:
                    time.sleep(0.05)
                assert client.status != "running"
                # It looks for it.
                time.sleep(0.3)
                logger.error("other lines stay")
        assert logged == ["other lines stay"]
    finally:
        logger.removeHandler(handler)


LOST = """
import asyncio, logging, os, socket
from distributed import Scheduler, Worker
from outsize.tiler.cluster.client import follow

follow((socket.gethostname(), os.getppid() + {other}))

async def lose():
    async def gone(**_):
        raise OSError("it is gone")

    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler:
        async with Worker(scheduler.address, dashboard=False) as worker:
            worker.scheduler.heartbeat_worker = gone
            await worker.heartbeat()

asyncio.run(lose())
logging.getLogger("distributed.worker").error(ValueError("other lines stay"))
"""
"""A worker whose scheduler does not answer any more."""


@pytest.mark.parametrize("other", [0, 1])
def test_a_worker_of_the_command_says_nothing_of_a_scheduler_that_ended_first(other: int) -> None:
    """Others' workers log as they always do."""
    words = [sys.executable, "-W", "ignore", "-c", LOST.format(other=other)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ("it is gone" in done.stderr) == bool(other)
    assert "other lines stay" in done.stderr
