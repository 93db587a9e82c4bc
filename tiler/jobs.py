"""Jobs: what each worker process keeps for a run, so that a task is no more than a row and a column."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any, Protocol

from distributed import Worker, WorkerPlugin, get_worker

from .errors import TilerError
from .machine import die_with_parent
from .tile_map import TOPIC, tile_message


class Runner(Protocol):
    """One process's share of a run: open files, a loaded engine."""

    def run(self, row: int, column: int) -> Record:
        """Do one cell; returns its record, a failure's too."""
        ...

    def take_sketch(self, row: int, column: int) -> bytes:
        """The cell's part of the grey picture under the tile map; once."""
        ...

    def close(self) -> None: ...


class Record(Protocol):
    """What became of a cell."""

    @property
    def error(self) -> str:
        """Empty where nothing is wrong."""
        ...


class Job(Protocol):
    """All that a process needs to do any cell of a run; sent once to each."""

    @property
    def run_id(self) -> str: ...

    def open(self, *, watched: bool) -> Runner:
        """Args: watched: on a tile map, so that sketches are wanted."""
        ...


_RUNNERS: dict[str, Runner] = {}
_WATCHED: set[str] = set()
"""Jobs whose cells are told to the tile map."""


class JobPlugin(WorkerPlugin):
    """Gives every worker process, a restarted one too, the job's one runner."""

    def __init__(self, job: Job, *, watched: bool = False) -> None:
        self.job, self.watched = job, watched
        self.name = f"outsize-{job.run_id}"
        self._starter = (socket.gethostname(), os.getpid())

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - Dask's signature
        if (socket.gethostname(), os.getppid()) == self._starter:
            die_with_parent()
        _RUNNERS[self.job.run_id] = self.job.open(watched=self.watched)
        if self.watched:
            _WATCHED.add(self.job.run_id)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        _WATCHED.discard(self.job.run_id)
        runner = _RUNNERS.pop(self.job.run_id, None)
        if runner is not None:
            runner.close()


def runner_of(run_id: str) -> Any:
    """This process's runner of a job."""
    return _RUNNERS[run_id]


def run_cell(run_id: str, row: int, column: int) -> Any:
    """A task: one cell of a job that this process knows."""
    runner, began = _RUNNERS[run_id], time.perf_counter()
    _tell(run_id, (row, column), "running")
    try:
        record = runner.run(row, column)
    except TilerError as error:
        # Its message says all; what caused it, such as some of Zarr's errors, may not survive the way to the client.
        error.__cause__ = error.__context__ = None
        raise
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
