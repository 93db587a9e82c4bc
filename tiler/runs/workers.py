"""Workers of a run: those that are started for it, and how others differ from the plan's."""

from __future__ import annotations

import contextlib
from typing import Any

from distributed import Client

from ..base.text import format_bytes
from ..cluster.client import ClusterKeeper, ClusterOptions, open_client
from ..planning.plan import TilePlan
from ..rasters.reading import GDAL_CACHE_BYTES
from .worker import device_peak


def open_workers(
    client: Client | None, cluster: ClusterOptions | ClusterKeeper, plan: TilePlan
) -> contextlib.AbstractContextManager[Client]:
    """The client that was given, or one with the plan's workers."""
    if client is not None:
        return contextlib.nullcontext(client)
    settings: dict[str, Any] = {
        "workers": plan.workers,
        "threads": plan.in_flight,
        "gdal_cache_bytes": GDAL_CACHE_BYTES,
        "cuda": plan.device_indices,
    }
    if isinstance(cluster, ClusterKeeper):
        return cluster.open(**settings)
    return open_client(cluster, **settings)


def find_device_peak(client: Client, run_id: str) -> int:
    """A figure of the summary. Workers that have left or come meanwhile do not know it, and cost no finished run."""
    peaks: Any = {}
    with contextlib.suppress(Exception):
        peaks = client.run(device_peak, run_id, on_error="ignore")
    return max(peaks.values(), default=0)


def compare_workers(plan: TilePlan, threads: list[int]) -> str:
    """How workers that others have started differ from the plan's, and what that means; empty: they do not."""
    count, said = len(threads), list[str]()
    if count != plan.workers:
        # What each takes is known; all at once are here only where this is one machine.
        each = (plan.memory.total_bytes - plan.memory.client_bytes) // plan.workers
        processes = "1 worker process" if count == 1 else f"{count} worker processes"
        said.append(f"{processes}, planned for {plan.workers}: up to {format_bytes(each)} each")
    if max(threads, default=0) > plan.in_flight:
        said.append(f"of up to {max(threads)} threads no more than {plan.in_flight} work at once in each")
    if min(threads, default=plan.in_flight) < plan.in_flight:
        said.append(f"with less than {plan.in_flight} threads reading and writing wait for the computation")
    return "; ".join(said)


def find_dashboard(client: Client, *, with_map: bool) -> str | None:
    """Where to look: at the tile map, where there is one."""
    if "dashboard" not in client.scheduler_info().get("services", {}):
        return None
    link = client.dashboard_link
    if link is None or not with_map or not link.endswith("/status"):
        return link
    return f"{link.removesuffix('status')}tilemap"
