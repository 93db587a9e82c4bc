"""Jobs: what each worker process keeps for a run, so that a task is no more than a row and a column."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from typing import Any, Protocol

from distributed import Worker, WorkerPlugin

from .errors import TilerError


class Runner(Protocol):
    """One process's share of a run: open files, a loaded engine."""

    def run(self, row: int, column: int) -> Any:
        """Do one cell; returns its record, a failure's too."""
        ...

    def close(self) -> None: ...


class Job(Protocol):
    """All that a process needs to do any cell of a run; sent once to each."""

    @property
    def run_id(self) -> str: ...

    def open(self) -> Runner: ...


_RUNNERS: dict[str, Runner] = {}


class JobPlugin(WorkerPlugin):
    """Gives every worker process, a restarted one too, the job's one runner."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.name = f"outsize-{job.run_id}"
        self._starter = (socket.gethostname(), os.getpid())

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - Dask's signature
        if (socket.gethostname(), os.getppid()) == self._starter:
            _die_with_parent()
        _RUNNERS[self.job.run_id] = self.job.open()

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        runner = _RUNNERS.pop(self.job.run_id, None)
        if runner is not None:
            runner.close()


PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent has died."""


def _die_with_parent() -> None:
    """A worker that this command started must not outlive it. Dask's workers notice a closed pipe, in a thread that
    waits for the interpreter; the kernel does not wait."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died just before
            os._exit(1)


def runner_of(run_id: str) -> Any:
    """This process's runner of a job."""
    return _RUNNERS[run_id]


def run_cell(run_id: str, row: int, column: int) -> Any:
    """A task: one cell of a job that this process knows."""
    try:
        return _RUNNERS[run_id].run(row, column)
    except TilerError as error:
        # Its message says all; what caused it, such as some of Zarr's errors, may not survive the way to the client.
        error.__cause__ = error.__context__ = None
        raise
