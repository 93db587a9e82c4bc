"""Clients of schedulers that others have started."""

from __future__ import annotations

import logging
import time

from distributed import LocalCluster
from outsize.tiler.cluster import ClusterOptions, open_client


def test_a_scheduler_that_is_lost_leaves_no_traceback() -> None:
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
        assert "traceback" not in logged
        logger.error("other lines stay")
        assert logged[-1] == "other lines stay"
    finally:
        logger.removeHandler(handler)
