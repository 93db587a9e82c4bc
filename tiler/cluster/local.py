"""A Dask cluster on this machine for one run: on loopback, by TLS that only its own processes speak, quiet."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from distributed import Nanny, Scheduler, SpecCluster, Worker, utils
from distributed.security import Security
from tornado.web import Application

from ..base.errors import TilerError
from ..base.text import reason_of
from ..system.logs import log
from ..system.process_locks import after_fork
from .certificate import make_security
from .dashboard_guard import guard


class ClusterError(TilerError):
    """A scheduler that cannot be reached, or workers that do not start."""


WORKER_DEATH_TIMEOUT = "60s"
"""After which a worker without its scheduler ends."""
LOOPBACK = "127.0.0.1"
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
STARTS = 3
"""Attempts to start workers: one that dies in its first second takes its cluster with it."""
ERRORS_ONLY: Any = 40
"""Log level of worker processes."""


def visible_device(index: int, shown: str | None) -> str:
    """What a worker's CUDA_VISIBLE_DEVICES says, so that it sees one device only.

    Args:
        index: of the device, as this process counts.
        shown: CUDA_VISIBLE_DEVICES of this process: a list of numbers or names, which it counts along; None: all.
    """
    names = [name.strip() for name in shown.split(",")] if shown else []
    return names[index] if index < len(names) else str(index)


def _renew_offloading() -> None:
    """In a fork: Dask would wait for a thread of the parent's to pack and unpack what is large."""
    executor = getattr(utils, "_offload_executor", None)
    if executor is not None:
        utils._offload_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="Dask-Offload")


after_fork(_renew_offloading)


def require_processes() -> None:
    """Raise where this process may start no others.

    Raises:
        ClusterError: names who has started it, and what goes instead.
    """
    if multiprocessing.current_process().daemon:
        raise ClusterError(
            "worker processes cannot be started by a daemonic process, such as one of multiprocessing.Pool or a Dask "
            "worker: pass a client (within a Dask task worker_client()), or ClusterOptions(processes=False), or start "
            "this process by concurrent.futures.ProcessPoolExecutor"
        )


class _Scheduler(Scheduler):
    """One whose pages answer to our own names only."""

    http_application: Application

    def __init__(self, *, dashboard_names: Iterable[str], proxies: Iterable[str], **settings: Any) -> None:
        self._names, self._proxies = dashboard_names, proxies
        super().__init__(**settings)

    def start_http_server(self, *arguments: Any, **settings: Any) -> None:
        super().start_http_server(*arguments, **settings)
        guard(self.http_application, self._names, self._proxies)


class _Nanny(Nanny):
    """Starts a worker process, and notes how those ended that did."""

    def __init__(
        self,
        *arguments: Any,
        name: Any = None,
        env: Mapping[str, str],
        cuda: Sequence[int] = (),
        ends: list[int],
        **settings: Any,
    ) -> None:
        """Args:
        env: variables of the process.
        cuda: devices, of which the process sees its own only: processes are numbered, and one that is restarted keeps
            its number.
        ends: gets the exit codes.
        """
        self._ends = ends
        seen = {VISIBLE_DEVICES: visible_device(cuda[int(name)], os.environ.get(VISIBLE_DEVICES))} if cuda else {}
        super().__init__(*arguments, name=name, env={**env, **seen}, **settings)

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        self._ends.append(exitcode)
        super()._on_worker_exit_sync(exitcode)


def start_cluster(
    *,
    workers: int,
    threads: int,
    processes: bool,
    dashboard_address: str | None,
    dashboard_names: Iterable[str],
    proxies: Iterable[str],
    environment: Mapping[str, str],
    cuda: Sequence[int],
) -> SpecCluster:
    """Scheduler and workers on this machine, within `cluster_settings` and `errors_only`.

    Guarantee: nothing but the dashboard, where its address says so, listens beyond this machine; no other user's
    process gets a word out of scheduler or workers, as it lacks the certificate. Where workers are threads of this
    process, they talk by no address at all.

    Args:
        dashboard_names: of this machine, by which browsers may ask the dashboard, beside those that it knows.
        proxies: names of hosts that pass on the dashboard's pages.
        environment: variables of worker processes.
        cuda: indices of CUDA devices; process i sees the i-th of them only. Empty: they see what this process does.

    Raises:
        ClusterError: they do not start, or do not stay alive.
    """
    if processes:
        require_processes()
    security = make_security() if processes else Security()
    shared: dict[str, Any] = {
        "host": LOOPBACK if processes else None,
        "protocol": "tls://" if processes else "inproc://",
        "security": security,
    }
    if dashboard_address is not None:
        _require_place(dashboard_address)
    reason = ""
    for _ in range(STARTS):
        ends = list[int]()
        scheduler = shared | {
            "port": 0,
            "dashboard": dashboard_address is not None,
            # Dask's health page is served in any case: without a dashboard on whatever port is free.
            "dashboard_address": dashboard_address or f"{LOOPBACK}:0",
            "dashboard_names": dashboard_names,
            "proxies": proxies,
        }
        worker = shared | {
            "nthreads": threads,
            "memory_limit": 0,
            "silence_logs": ERRORS_ONLY,
            # By itself it would be served on all interfaces.
            "dashboard": False,
            "dashboard_address": f"{LOOPBACK}:0",
        }
        if processes:
            worker |= {"env": environment, "cuda": tuple(cuda), "ends": ends, "death_timeout": WORKER_DEATH_TIMEOUT}
        spec = {"cls": _Nanny if processes else Worker, "options": worker}
        try:
            with _quiet_start():
                return SpecCluster(
                    workers=dict.fromkeys(range(workers if processes else 1), spec),
                    scheduler={"cls": _Scheduler, "options": scheduler},
                    worker=spec,
                    security=security,
                )
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            reason = _explain(error, ends)
            log.warning("workers did not start: %s", reason)
    raise ClusterError(f"workers do not start, {STARTS} times now: {reason}")


def _require_place(dashboard_address: str) -> None:
    """Dask tries again and again, and leaves its sockets open."""
    for address in dashboard_address.split(","):
        host = address.strip().rpartition(":")[0]
        try:
            socket.create_server((host, 0)).close()
        except OSError as error:
            raise ClusterError(
                f"no dashboard at {address}: {reason_of(error)}; give an address of this machine to --dashboard-address"
            ) from error


def _explain(error: BaseException, ends: Sequence[int]) -> str:
    """What went wrong first: Dask's own errors say little more than that something has."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    killed = [-code for code in ends if code < 0]
    if killed:
        return f"one was killed by signal {killed[0]}; is there enough memory?"
    said = reason_of(error)
    if any(ends):
        return f"a worker's process ended with code {next(filter(None, ends))} ({said})"
    return said


@contextmanager
def _quiet_start() -> Iterator[None]:
    with ExitStack() as stack:
        for quiet in (_quiet_main, _quiet_tracker, _quiet_port, _interrupts_ignored):
            stack.enter_context(quiet())
        yield


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Workers started meanwhile inherit it: Ctrl-C in a terminal reaches them too, and only the client should act."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet_main() -> Iterator[None]:
    """Hide the main module's file from spawned workers, which would import it: with it comes torch, unused there."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if file is not None:
        main.__file__ = None
    main.__spec__ = None
    try:
        yield
    finally:
        if file is not None:
            main.__file__ = file
        main.__spec__ = spec


@contextmanager
def _quiet_port() -> Iterator[None]:
    """A dashboard's port that is taken is nothing to warn of: another is, and its address is shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Port \d+ is already in use", UserWarning)
        yield


@contextmanager
def _quiet_tracker() -> Iterator[None]:
    """Python's tracker of semaphores, started meanwhile, removes what a command that ended at once has left; it would
    say so after the command's last line."""
    option = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(option)
    try:
        yield
    finally:
        sys.warnoptions.remove(option)
