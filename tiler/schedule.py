"""Submission: a bounded number of tiles in flight on Dask, records coming back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dask.typing import Key
from distributed import Client, Future, as_completed
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from .events import TileRecord
from .worker import run_tile

QUEUED_PER_THREAD = 2
"""Tiles known to the scheduler for each worker thread: enough that none waits for this process."""


def run_tiles(
    client: Client, run_id: str, tiles: Sequence[tuple[int, int]], pixels_of: dict[tuple[int, int], int]
) -> Iterator[TileRecord]:
    """Run tiles in the given order; yields each one's record as it ends.

    The scheduler never knows more than a few tiles a thread, so that its memory does not grow with the raster. A tile
    whose worker dies is tried again elsewhere by Dask, and becomes a failed record after
    `distributed.scheduler.allowed-failures` deaths.
    """
    threads = max(1, sum(count_threads(client).values()))
    waiting = iter(tiles)
    at: dict[Key, tuple[int, int]] = {}

    def submit() -> Future | None:
        tile = next(waiting, None)
        if tile is None:
            return None
        future = client.submit(run_tile, run_id, *tile, key=(f"tile-{run_id}", *tile), pure=False)
        at[future.key] = tile
        return future

    first = [future for _ in range(QUEUED_PER_THREAD * threads) if (future := submit()) is not None]
    running = as_completed(first)
    del first
    try:
        for future in running:
            tile = at.pop(future.key)
            following = submit()
            if following is not None:
                running.add(following)
            yield _record(future, tile, pixels_of[tile])
    finally:
        if at:
            client.cancel([Future(key, client) for key in at], force=True)


def count_threads(client: Client) -> dict[str, int]:
    """Worker addresses and their threads, of a client that is not asynchronous."""
    threads: Any = client.nthreads()
    return dict(threads)


def _record(future: Future, tile: tuple[int, int], pixels: int) -> TileRecord:
    try:
        return future.result()
    except (KilledWorker, FutureCancelledError) as error:
        reason = f"its worker process died ({type(error).__name__})"
    return TileRecord(
        row=tile[0],
        column=tile[1],
        state="failed",
        pixels=pixels,
        read_s=0,
        compute_s=0,
        write_s=0,
        worker="",
        error=reason,
    )
