"""Jobs: what each worker process keeps for a run, so that a task is no more than a row and a column."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from distributed import Reschedule, Status, Worker, WorkerPlugin, get_worker

from ..base.errors import TilerError, WorkerError
from ..base.text import first_line
from ..system.environment import complete_environment
from ..system.machine import find_versions
from .client import follow
from .tile_map import TOPIC, tile_message


class Runner(Protocol):
    """One process's share of a run: open files, a loaded engine."""

    def run(self, row: int, column: int) -> CellResult:
        """Do one cell; returns its record, a failure's too."""
        ...

    def take_sketch(self, row: int, column: int) -> bytes:
        """The cell's part of the grey picture under the tile map; once."""
        ...

    def close(self) -> None: ...


class CellResult(Protocol):
    """What became of a cell."""

    @property
    def error(self) -> str:
        """Empty where nothing is wrong."""
        ...


class Job(Protocol):
    """All that a process needs to do any cell of a run; sent once to each."""

    @property
    def run_id(self) -> str: ...

    @property
    def in_flight(self) -> int:
        """Cells that one process holds at once, at most: what the plan's memory was counted for."""
        ...

    @property
    def gdal_cache_bytes(self) -> int:
        """GDAL's block cache of one process, counted likewise."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """What every worker must have in the command's own version, `outsize` apart."""
        ...

    def open(self, *, watched: bool) -> Runner:
        """Args: watched: on a tile map, so that sketches are wanted."""
        ...


_RUNNERS: dict[str, Runner] = {}
_USERS: dict[str, int] = {}
"""Dask workers of this process that know a job: more than one where workers are threads."""
_SLOTS: dict[str, threading.Semaphore] = {}
"""Of each job, as many as this process may hold cells at once, however many threads Dask gives it."""
_UNFIT: dict[str, WorkerError] = {}
"""Jobs that this process cannot do, and why."""
_WATCHED: set[str] = set()
"""Jobs whose cells are told to the tile map."""


class JobPlugin(WorkerPlugin):
    """Gives every worker process, a restarted one too, the job's one runner."""

    def __init__(self, job: Job, *, watched: bool = False) -> None:
        self.job, self.watched = job, watched
        self.name = f"outsize-{job.run_id}"
        found = find_versions()
        self.versions = {name: found.get(name) for name in ("outsize", *job.packages)}
        self._starter = (socket.gethostname(), os.getpid())

    def setup(self, worker: Worker) -> None:
        """Raises: WorkerError: this process cannot do the job. Dask hands that to the command only from workers that
        are there as the run begins; one that joins later says it with its first cell."""
        run_id, here = self.job.run_id, socket.gethostname()
        follow(self._starter)
        if (here, os.getpid()) != self._starter:
            complete_environment(self.job.gdal_cache_bytes)
        _USERS[run_id] = _USERS.get(run_id, 0) + 1
        _SLOTS.setdefault(run_id, threading.Semaphore(self.job.in_flight))
        if self.watched:
            _WATCHED.add(run_id)
        try:
            self._require_versions()
            if run_id not in _RUNNERS:
                _RUNNERS[run_id] = self.job.open(watched=self.watched)
        except Exception as error:
            _UNFIT[run_id] = unfit_worker(error, worker)
            with told_plainly():
                raise _UNFIT[run_id] from error

    def _require_versions(self) -> None:
        """Raises: ImportError: another version than the command's may round otherwise, or not know the job at all."""
        found = find_versions()
        for name, wanted in self.versions.items():
            if found.get(name) != wanted:
                raise ImportError(f"{name} {wanted} of the command, {found.get(name, 'none')} there")

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - Dask's signature
        run_id = self.job.run_id
        _USERS[run_id] -= 1
        if _USERS[run_id]:
            return
        _WATCHED.discard(run_id)
        for kept in (_USERS, _SLOTS, _UNFIT):
            kept.pop(run_id, None)
        runner = _RUNNERS.pop(run_id, None)
        if runner is not None:
            runner.close()


def unfit_worker(reason: Exception, worker: Worker | None = None) -> WorkerError:
    """What to say of this process, where its environment is to blame and no cell.

    Args:
        worker: its Dask worker; None: the one whose task runs here.
    """
    with contextlib.suppress(ValueError):  # no task of a worker
        worker = worker or get_worker()
    name = f"process {os.getpid()} on {socket.gethostname()}"
    if worker is not None:
        name = f"worker {worker.address} ({name})"
    text = first_line(reason, "")
    kind = "" if isinstance(reason, TilerError) else f"{type(reason).__name__}: "
    return WorkerError(f"{name} cannot do this run: {kind}{text}; mend or remove it, then the same command goes on")


def runner_of(run_id: str) -> Any:
    """This process's runner of a job.

    Raises:
        WorkerError: it has none, and can have none.
        Reschedule: it has none any more; Dask gives the task to another.
    """
    runner = _RUNNERS.get(run_id)
    if runner is not None:
        return runner
    if run_id in _UNFIT:
        raise _UNFIT[run_id]
    if get_worker().status in (Status.closing, Status.closing_gracefully, Status.closed):
        raise Reschedule  # it leaves, and has forgotten the run already
    raise unfit_worker(WorkerError("it was not told of the run"))


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """An error's message says all; what caused it, such as some of Zarr's, may not survive the way to the client."""
    try:
        yield
    except TilerError as error:
        error.__cause__ = error.__context__ = None
        raise


def run_cell(run_id: str, row: int, column: int) -> Any:
    """A task: one cell of a job that this process knows."""
    with _SLOTS.get(run_id, contextlib.nullcontext()):
        began = time.perf_counter()
        with told_plainly():
            runner = runner_of(run_id)
            _tell(run_id, (row, column), "running")
            record = runner.run(row, column)
        seconds = round(time.perf_counter() - began, 3)
        sketch = runner.take_sketch(row, column)
    _tell(
        run_id,
        (row, column),
        "failed" if record.error else "done",
        seconds=seconds,
        error=record.error,
        sketch=sketch,
    )
    return record


def _tell(run_id: str, cell: tuple[int, int], state: str, **values: Any) -> None:
    """Tell the tile map; whatever is wrong with that is no concern of the cell."""
    if run_id in _WATCHED:
        with contextlib.suppress(Exception):
            worker = get_worker()
            worker.log_event(TOPIC, tile_message(run_id, cell, state, worker=worker.address, **values))
