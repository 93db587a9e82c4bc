"""Submission: a bounded number of cells in flight on Dask, records coming back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dask.typing import Key
from distributed import Client, Future, as_completed
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from .jobs import run_cell

QUEUED_PER_THREAD = 2
"""Cells known to the scheduler for each worker thread: enough that none waits for this process."""

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Lost:
    """In place of a record: the cell's workers died."""

    reason: str


def run_cells(client: Client, run_id: str, cells: Sequence[Cell], label: str) -> Iterator[tuple[Cell, Any]]:
    """Run a job's cells in the given order; yields (cell, its record) as each ends.

    The scheduler never knows more than a few cells a thread, so that its memory does not grow with the raster. A cell
    whose worker dies is tried again elsewhere by Dask, and becomes `Lost` after
    `distributed.scheduler.allowed-failures` deaths.

    Args:
        label: the name of these tasks on Dask's pages.
    """
    threads = max(1, sum(count_threads(client).values()))
    waiting = iter(cells)
    at: dict[Key, Cell] = {}

    def submit() -> Future | None:
        cell = next(waiting, None)
        if cell is None:
            return None
        future = client.submit(run_cell, run_id, *cell, key=(f"{label}-{run_id}", *cell), pure=False)
        at[future.key] = cell
        return future

    first = [future for _ in range(QUEUED_PER_THREAD * threads) if (future := submit()) is not None]
    running = as_completed(first)
    del first
    try:
        for future in running:
            cell = at.pop(future.key)
            following = submit()
            if following is not None:
                running.add(following)
            yield cell, _result(future)
    finally:
        if at:
            client.cancel([Future(key, client) for key in at], force=True)


def count_threads(client: Client) -> dict[str, int]:
    """Worker addresses and their threads, of a client that is not asynchronous."""
    threads: Any = client.nthreads()
    return dict(threads)


def _result(future: Future) -> Any:
    try:
        return future.result()
    except (KilledWorker, FutureCancelledError) as error:
        return Lost(f"its worker process died ({type(error).__name__})")
