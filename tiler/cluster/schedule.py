"""Submission: a bounded number of cells in flight on Dask, records coming back; cells that kill or hang set aside."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dask.typing import Key
from dask.utils import key_split
from distributed import Client, Future
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from ..base.errors import WorkerError
from ..system.logs import log
from .client import ClusterError, leaving_slot
from .dashboard import Watch, watch_run
from .jobs import Job, JobPlugin, run_cell
from .tile_map import Message

QUEUED_PER_THREAD = 2
"""Cells known to the scheduler for each that workers may hold: enough that none waits for this process."""
FORGET_EVERY = 10_000
"""Cells, after which Dask is made to forget those that have ended: it would remember 100,000 names, and each submission
for ever."""
LOOK_EVERY_S = 5.0
"""How often cells that do not come back are looked for."""
HANGS_FACTOR = 20
"""A worker hangs when a cell takes this many times the longest one so far, and at least `patience`; of the first ones
nothing is known but the work in them."""
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
        WorkerError: one of the workers cannot do the job.
    """
    with leaving_slot(client), _told_when_lost(client):
        try:
            client.wait_for_workers(1, timeout=FIRST_WORKER_S)
        except TimeoutError as error:
            raise ClusterError(f"the Dask scheduler has no workers after {FIRST_WORKER_S} s; start some") from error
        with watch_run(client, begin) as watch:
            plugin = JobPlugin(job, watched=watch.is_on)
            try:
                _register(client, plugin)
                yield watch
            finally:
                forget_plugin(client, plugin.name)


def forget_plugin(client: Client, name: str) -> None:
    """Have workers forget it, unless the scheduler is lost: Dask would look for it for half a minute."""
    if client.status == "running":
        with contextlib.suppress(Exception):
            client.unregister_worker_plugin(name)


def _register(client: Client, plugin: JobPlugin) -> None:
    for attempt in range(1, REGISTRATIONS + 1):
        if client.status != "running":
            raise ClusterError(LOST)
        try:
            client.register_plugin(plugin)
        except CommClosedError as error:
            # A worker died while it was told. Its successor will be told by the scheduler.
            log.warning("a worker was lost as the run began: %s", error)
            if attempt == REGISTRATIONS:
                raise
            time.sleep(attempt)
        except WorkerError:
            raise
        except Exception as error:
            # Dask gives only the text of what a worker says that cannot even read the job.
            _require_like(client, error)
            raise
        else:
            return


def _require_like(client: Client, error: Exception) -> None:
    """Look for workers that have another `outsize`, or none, as a reason of an error.

    Raises:
        WorkerError: there are some.
    """
    versions: Any = client.get_versions(packages=["outsize"])
    ours = versions["client"]["packages"]["outsize"]
    found = {address: of["packages"]["outsize"] for address, of in versions["workers"].items()}
    unlike = [f"{address} has {there or 'none'}" for address, there in found.items() if there != ours]
    if unlike:
        raise WorkerError(
            f"every worker needs outsize {ours}, as this command has it; worker {', '.join(unlike)}; mend or remove "
            "them, then the same command goes on"
        ) from error


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


def run_cells(
    client: Client, job: Job, cells: Iterable[Cell], label: str, *, patience: float = 300.0, cell_s: float = 0.0
) -> Iterator[tuple[Cell, Any]]:
    """Run a job's cells in the given order; yields (cell, its record) as each ends.

    The scheduler never knows more than a few cells for each that the workers may hold, whoever has joined or left
    meanwhile, so that its memory does not grow with the raster; `cells` are drawn as they are submitted. A cell whose
    worker dies is tried again elsewhere by Dask, up to `distributed.scheduler.allowed-failures` deaths; then it, and
    what shared those workers, is set aside until all others are done, and tried alone. What kills or hangs its worker
    alone too becomes `Lost`.

    Args:
        label: the name of these tasks on Dask's pages.
        patience: seconds before a worker that does not answer is restarted, at least.
        cell_s: seconds that the largest cell takes a slow machine which does nothing else.

    Raises:
        ClusterError: the scheduler is gone, or all workers are; within `job_on`, also where Dask raises it.
        WorkerError: a worker cannot do the job.
        whatever a cell raises that is no record: the run cannot go on.
    """
    flight = _Flight(client, job, label, patience, cell_s)
    try:
        aside: list[Cell] = []
        waiting = iter(cells)
        while flight.fill(waiting):
            for cell, outcome in flight.wait():
                flight.fill(waiting)  # before the caller takes its time
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


def _make_forgetter() -> Callable[[Any], None]:
    """A function for the scheduler, sent as code since it is nested: a scheduler need not have this package."""

    def forget(dask_scheduler: Any) -> None:
        from dask.utils import key_split

        key_split.cache_clear()
        # Every submission adds to its span's list what kind it was of: of each kind one is as telling.
        for span in dask_scheduler.extensions["spans"].spans.values():
            told, kinds = (span.metadata or {}).get("collections", []), list[Any]()
            for kind in told:
                if kind not in kinds:
                    kinds.append(kind)
            told[:] = kinds

    return forget


class _Flight:
    """The cells that the scheduler knows."""

    def __init__(self, client: Client, job: Job, label: str, patience: float, cell_s: float) -> None:
        self._client, self._job, self._label, self._patience = client, job, label, patience
        # A cell may wait at its worker for all that were sent there before it.
        self._least_s = max(patience, QUEUED_PER_THREAD * job.in_flight * cell_s)
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.cells: dict[Key, tuple[Cell, Future]] = {}
        self._longest = 0.0
        self._looked = self._peopled = time.monotonic()
        self._submitted = 0
        self._since: dict[Key, tuple[str, float]] = {}
        """Worker that a cell was first seen at, and when."""
        self._room = self._count_room()

    def _count_room(self) -> int:
        """Cells for the scheduler to know, with the workers that there are now."""
        held = sum(min(threads, self._job.in_flight) for threads in count_threads(self._client).values())
        return QUEUED_PER_THREAD * max(1, held)

    def fill(self, waiting: Iterator[Cell]) -> bool:
        """Submit as many as there is room for; whether any are under way."""
        for cell in islice(waiting, max(0, self._room - len(self.cells))):
            self.submit(cell)
        return bool(self.cells)

    def submit(self, cell: Cell, *, alone: bool = False) -> None:
        self._submitted += 1
        if self._submitted % FORGET_EVERY == 0:
            self._forget()
        run_id = self._job.run_id
        key = (f"{self._label}-{run_id}{'-alone' if alone else ''}", *cell)
        future = self._client.submit(run_cell, run_id, *cell, key=key, pure=False)
        self.cells[future.key] = cell, future
        future.add_done_callback(self._ended.put)

    def _forget(self) -> None:
        with contextlib.suppress(Exception):
            self._client.run_on_scheduler(_make_forgetter())
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
        except (ImportError, AttributeError) as error:
            _require_like(self._client, error)
            raise
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
        limit = max(self._least_s, HANGS_FACTOR * self._longest)
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
