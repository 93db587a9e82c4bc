"""Submission: a bounded number of cells in flight on Dask, records coming back; cells that kill or hang set aside."""

from __future__ import annotations

import contextlib
import itertools
import queue
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from dask.typing import Key
from dask.utils import key_split
from distributed import Client, Future
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from .cluster import ClusterError
from .dashboard import Watch, watch_run
from .jobs import Job, JobPlugin, run_cell
from .records import log
from .tile_map import Message

QUEUED_PER_THREAD = 2
"""Cells known to the scheduler for each worker thread: enough that none waits for this process."""
FORGET_EVERY = 10_000
"""Cells, after which Dask is made to forget the names of those that have ended: it would remember 100,000."""
LOOK_EVERY_S = 5.0
"""How often cells that do not come back are looked for."""
HANGS_FACTOR = 20
"""A worker hangs when a cell takes this many times the longest one so far, and at least `patience`."""
FETCH_S = 30.0
"""What a worker gets to hand over a record."""
RESTART_S = 30
"""What a worker gets to restart."""

REGISTRATIONS = 5
"""How often all workers are told of a job; one that dies just then fails it for all."""
FIRST_WORKER_S = 120

LOST = "the Dask scheduler was lost; when it is there again, the same command goes on"

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Lost:
    """In place of a record: alone on a worker, the cell killed it or did not come back."""

    reason: str


@contextlib.contextmanager
def job_on(client: Client, job: Job, begin: Message | None = None) -> Iterator[Watch]:
    """All workers, and those to come, know the job while this is open; gives the line to its tile map.

    Args:
        begin: what the map is told first; None: no map.

    Raises:
        ClusterError: the scheduler is gone, or has no workers.
    """
    with _told_when_lost(client):
        try:
            client.wait_for_workers(1, timeout=FIRST_WORKER_S)
        except TimeoutError as error:
            raise ClusterError(f"the Dask scheduler has no workers after {FIRST_WORKER_S} s; start some") from error
        with watch_run(client, begin) as watch:
            plugin = JobPlugin(job, watched=watch.is_on)
            _register(client, plugin)
            try:
                yield watch
            finally:
                with contextlib.suppress(Exception):
                    client.unregister_worker_plugin(plugin.name)


def _register(client: Client, plugin: JobPlugin) -> None:
    for attempt in range(1, REGISTRATIONS + 1):
        try:
            client.register_plugin(plugin)
        except CommClosedError as error:
            # A worker died while it was told. Its successor will be told by the scheduler.
            log.warning("a worker was lost as the run began: %s", error)
            if attempt == REGISTRATIONS or client.status != "running":
                raise
            time.sleep(attempt)
        else:
            return


@contextlib.contextmanager
def _told_when_lost(client: Client) -> Iterator[None]:
    """In place of what Dask raises of a scheduler or of workers that are gone, one line."""
    try:
        yield
    except (ClosedClientError, CommClosedError) as error:
        raise ClusterError(LOST) from error
    except FutureCancelledError as error:
        if client.status == "running" and not (error.reason or "").startswith("scheduler"):
            raise
        raise ClusterError(LOST) from error
    except KilledWorker as error:
        raise ClusterError(f"worker processes die over {error.task}; is there enough memory?") from error


def cells_of(todo: npt.NDArray[np.int32]) -> Iterator[Cell]:
    """The cells of a (cells, 2) array, one by one: a million of them take 8 MB so, and 100 as a list."""
    for row, column in todo:
        yield int(row), int(column)


def run_cells(
    client: Client, run_id: str, cells: Iterable[Cell], label: str, *, patience: float = 300.0
) -> Iterator[tuple[Cell, Any]]:
    """Run a job's cells in the given order; yields (cell, its record) as each ends.

    The scheduler never knows more than a few cells a thread, of the workers that are there by then, so that neither its
    memory nor this process's grows with the raster. A cell
    whose worker dies is tried again elsewhere by Dask, up to `distributed.scheduler.allowed-failures` deaths; then it,
    and what shared those workers, is set aside until all others are done, and tried alone. What kills or hangs its
    worker alone too becomes `Lost`.

    Args:
        label: the name of these tasks on Dask's pages.
        patience: seconds before a worker that does not answer is restarted.

    Raises:
        ClusterError: the scheduler is gone, or all workers are; within `job_on`, also where Dask raises it.
        whatever a cell raises that is no record: the run cannot go on.
    """
    flight = _Flight(client, run_id, label, patience)
    try:
        aside: list[Cell] = []
        waiting = iter(cells)
        flight.fill(waiting)
        while flight.cells:
            ended = flight.wait()
            flight.fill(waiting)
            for cell, outcome in ended:
                if isinstance(outcome, Lost):
                    log.warning("cell %d,%d is set aside: %s", *cell, outcome.reason)
                    aside.append(cell)
                else:
                    yield cell, outcome
        for cell in aside:
            flight.submit(cell, alone=True)
            while flight.cells:
                yield from flight.wait()
    finally:
        flight.cancel()


class _Flight:
    """The cells that the scheduler knows."""

    def __init__(self, client: Client, run_id: str, label: str, patience: float) -> None:
        self._client, self._run_id, self._label, self._patience = client, run_id, label, patience
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.cells: dict[Key, tuple[Cell, Future]] = {}
        self._longest = 0.0
        self._looked = self._peopled = time.monotonic()
        self._room = self._count_room()
        self._submitted = 0
        self._since: dict[Key, tuple[str, float]] = {}
        """Worker that a cell was first seen at, and when."""

    def _count_room(self) -> int:
        """Cells that the workers which are there by now are kept busy with."""
        return QUEUED_PER_THREAD * max(1, sum(count_threads(self._client).values()))

    def fill(self, waiting: Iterator[Cell]) -> None:
        """Submit as many as there is room for."""
        for cell in itertools.islice(waiting, max(0, self._room - len(self.cells))):
            self.submit(cell)

    def submit(self, cell: Cell, *, alone: bool = False) -> None:
        self._submitted += 1
        if self._submitted % FORGET_EVERY == 0:
            self._forget_names()
        key = (f"{self._label}-{self._run_id}{'-alone' if alone else ''}", *cell)
        future = self._client.submit(run_cell, self._run_id, *cell, key=key, pure=False)
        self.cells[future.key] = cell, future
        future.add_done_callback(self._ended.put)

    def _forget_names(self) -> None:
        # By a function of Dask's own: a scheduler need not have this package.
        with contextlib.suppress(Exception):
            self._client.run_on_scheduler(key_split.cache_clear)
            self._client.run(key_split.cache_clear, on_error="ignore")

    def wait(self) -> list[tuple[Cell, Any]]:
        """What has ended, or hangs, after a moment."""
        try:
            future = self._ended.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            return self._look()
        found: list[tuple[Cell, Any]] = []
        if future.key in self.cells:  # else it was given up
            cell, _ = self.cells.pop(future.key)
            _, since = self._since.pop(future.key, ("", time.monotonic()))
            self._longest = max(self._longest, time.monotonic() - since)
            found.append((cell, self._result(future)))
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            found += self._look()
        return found

    def _result(self, future: Future) -> Any:
        try:
            # A record is small, but lies with the worker that made it, which may hang by now.
            return future.result(timeout=min(self._patience, FETCH_S))
        except TimeoutError:
            holders: Any = self._client.who_has([future])
            self._client.cancel([future], force=True)
            self._restart({address for addresses in holders.values() for address in addresses})
            return Lost("its worker did not hand over its record")
        except KilledWorker:
            return Lost("its worker process died")
        except FutureCancelledError as error:
            if error.reason and error.reason.startswith("scheduler"):
                raise ClusterError(LOST) from error
            return Lost(f"its task was cancelled ({error.reason})")

    def _look(self) -> list[tuple[Cell, Any]]:
        """Cells that have been at one worker for too long; their workers are restarted."""
        now = self._looked = time.monotonic()
        if self._client.status != "running":
            raise ClusterError(LOST)
        self._room = self._count_room()
        processing: Any = self._client.processing()
        if processing:
            self._peopled = now
        elif now - self._peopled > self._patience:
            raise ClusterError(
                f"no worker for {self._patience:.0f} s; when there are some again, the same command goes on"
            )
        at = {key: address for address, keys in processing.items() for key in keys if key in self.cells}
        self._since = {
            key: (address, self._since[key][1] if self._since.get(key, ("",))[0] == address else now)
            for key, address in at.items()
        }
        limit = max(self._patience, HANGS_FACTOR * self._longest)
        hanging = {key: address for key, (address, since) in self._since.items() if now - since > limit}
        found: list[tuple[Cell, Any]] = []
        for key in hanging:
            cell, future = self.cells.pop(key)
            self._since.pop(key)
            self._client.cancel([future], force=True)
            found.append((cell, Lost(f"no answer from its worker within {limit:.0f} s")))
        self._restart(set(hanging.values()))
        return found

    def _restart(self, addresses: set[str]) -> None:
        for address in addresses:
            log.error("worker %s does not answer; restarting it", address)
            # One without a nanny cannot be restarted; its other cells then hang too, and go elsewhere alone.
            with contextlib.suppress(Exception):
                self._client.restart_workers([address], timeout=RESTART_S, raise_for_error=False)
        if addresses:
            self._client.wait_for_workers(1, timeout=4 * RESTART_S)

    def cancel(self) -> None:
        """Nothing more is wanted."""
        if self.cells:
            with contextlib.suppress(Exception):
                self._client.cancel([future for _, future in self.cells.values()], force=True)


def count_threads(client: Client) -> dict[str, int]:
    """Worker addresses and their threads, of a client that is not asynchronous."""
    threads: Any = client.nthreads()
    return dict(threads)
