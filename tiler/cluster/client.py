"""Dask: connect to the scheduler that the user names, or start workers on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask import config
from distributed import Client, get_worker, rejoin, secede
from distributed.security import Security
from distributed.threadpoolexecutor import thread_state

from ..base.errors import TilerError, UsageError
from ..system.environment import worker_environment
from ..system.machine import die_with_parent
from .dask_logs import errors_only
from .local import ClusterError as ClusterError
from .local import require_processes, start_cluster
from .settings import cluster_settings

MAX_PORT = 65535
_ADDRESS = re.compile(r"(?:[^\s:/]*:)?[0-9]{1,5}|[^\s:/]+")
"""Of a dashboard, as Dask takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where to run; the names are Dask's."""

    scheduler: str | None = None
    """Address of a running scheduler; None: DASK_SCHEDULER_ADDRESS, else workers on this machine."""
    scheduler_file: str | None = None
    tls_ca_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    dashboard_address: str | None = "127.0.0.1:8787"
    """Of a cluster on this machine; None: no dashboard, and no tile map elsewhere. A taken port gives another one."""
    processes: bool = True
    """False: workers are threads of this process."""

    def __post_init__(self) -> None:
        if self.has_certificates and not self.connects:
            raise UsageError(
                "--tls-ca-file, --tls-cert and --tls-key are for a running scheduler: name it with --scheduler or "
                "--scheduler-file, or leave them out"
            )
        for address in (self.dashboard_address or "").split(",") if self.dashboard_address is not None else ():
            port = address.strip().rpartition(":")[2]
            if not _ADDRESS.fullmatch(address.strip()) or (port.isdecimal() and int(port) > MAX_PORT):
                raise UsageError(f"--dashboard-address must be HOST:PORT, :PORT, PORT or HOST, got {address!r}")

    @property
    def has_certificates(self) -> bool:
        """Whether the scheduler is to be reached by TLS."""
        return bool(self.tls_ca_file or self.tls_cert or self.tls_key)

    @property
    def address(self) -> str | None:
        """Of the running scheduler, if one is named."""
        return self.scheduler or config.get("scheduler-address", None)

    @property
    def connects(self) -> bool:
        """Whether a running scheduler is named, so that no workers are started here."""
        return bool(self.address or self.scheduler_file)

    @property
    def dashboard_names(self) -> frozenset[str]:
        """Of hosts, in the dashboard's address."""
        hosts = (address.strip().rpartition(":")[0] for address in (self.dashboard_address or "").split(","))
        return frozenset(host.lower() for host in hosts if host)

    def require_startable(self) -> None:
        """Raise at once where workers could not be started later.

        Raises:
            ClusterError: this process may start none.
        """
        if self.processes and not self.connects:
            require_processes()

    @property
    def serves_dashboard(self) -> bool:
        """Whether this process serves the dashboard."""
        return self.dashboard_address is not None and not self.connects


@contextmanager
def open_client(
    options: ClusterOptions, *, workers: int, threads: int, gdal_cache_bytes: int, cuda: Sequence[int] = ()
) -> Iterator[Client]:
    """A client for the run; what was started here is closed at the end.

    Args:
        workers: processes to start, if no scheduler is named.
        threads: tasks at once in each.
        gdal_cache_bytes: GDAL's block cache in each.
        cuda: indices of CUDA devices; worker i sees the i-th of them only. Empty: workers see what this process does.

    Raises:
        ClusterError: the scheduler does not answer.
    """
    security = None
    if options.has_certificates:
        security = Security(
            tls_ca_file=options.tls_ca_file,
            tls_client_cert=options.tls_cert,
            tls_client_key=options.tls_key,
            require_encryption=True,
        )
    address = options.address
    if options.scheduler_file and not Path(options.scheduler_file).is_file():
        # Dask would wait for the file to appear.
        raise ClusterError(f"no Dask scheduler at {options.scheduler_file}: no such file; start the scheduler first")
    if (
        (address or "").startswith("tls://")
        and security is None
        and not config.get("distributed.comm.tls.ca-file", None)
    ):
        raise ClusterError(f"no Dask scheduler at {address} without TLS: give --tls-ca-file, --tls-cert and --tls-key")
    if address or options.scheduler_file:
        try:
            client = Client(address, scheduler_file=options.scheduler_file, security=security, timeout="20s")
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise ClusterError(f"no Dask scheduler at {address or options.scheduler_file}: {error}") from error
        with _quiet_reconnecting(), client:
            yield client
        return
    environment = worker_environment(gdal_cache_bytes)
    with cluster_settings(environment) as settings, errors_only():
        if not options.processes:
            os.environ.setdefault("GDAL_CACHEMAX", environment["GDAL_CACHEMAX"])
        started = start_cluster(
            workers=workers,
            threads=threads,
            processes=options.processes,
            dashboard_address=options.dashboard_address,
            dashboard_names=options.dashboard_names,
            proxies=settings.proxies,
            environment=settings.environment,
            cuda=cuda,
        )
        with started, Client(started) as client:
            yield client


@contextmanager
def leaving_slot(client: Client) -> Iterator[None]:
    """A task that waits for tasks of its own scheduler gives them its thread meanwhile: there may be no other."""
    scheduler: Any = client.scheduler if getattr(thread_state, "proceed", False) else None
    if scheduler is None or get_worker().scheduler.address != scheduler.address:
        yield
        return
    secede()
    try:
        yield
    finally:
        rejoin()


class ClusterKeeper:
    """Keeps a run's client for the next one that wants as many workers: for batches, which would start them anew for
    each scene. To be closed at the end."""

    def __init__(self, options: ClusterOptions) -> None:
        self.options = options
        self._open = ExitStack()
        self._client: Client | None = None
        self._shape: tuple[int, int, tuple[int, ...]] | None = None

    @contextmanager
    def open(self, *, workers: int, threads: int, gdal_cache_bytes: int, cuda: Sequence[int] = ()) -> Iterator[Client]:
        """As `open_client`, but what is opened stays."""
        shape = (workers, threads, tuple(cuda))
        if self._client is None or self._client.status != "running" or shape != self._shape:
            self.close()
            opened = open_client(
                self.options, workers=workers, threads=threads, gdal_cache_bytes=gdal_cache_bytes, cuda=cuda
            )
            self._client, self._shape = self._open.enter_context(opened), shape
        yield self._client

    def close(self) -> None:
        self._client = None
        self._open.close()

    def __enter__(self) -> ClusterKeeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _quiet_reconnecting() -> Iterator[None]:
    """A client whose scheduler is lost tries to find it again until it is closed, and logs that it gave up after half a
    minute, however soon that was, and as a traceback that it was stopped; what was lost is said by who needed it."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.exc_info and not record.getMessage().startswith("Failed to reconnect to scheduler")

    logger = logging.getLogger("distributed.client")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def follow(starter: tuple[str, int]) -> None:
    """In a worker: where `starter`, a host and a process on it, started this process, end with it, and log neither
    refusals of tasks, which reach it and which it says, nor a heartbeat that found its scheduler gone: that ends first.
    """
    if (socket.gethostname(), os.getppid()) == starter:
        die_with_parent()
        logging.getLogger("distributed.worker").addFilter(_is_not_said_elsewhere)


def _is_not_said_elsewhere(record: logging.LogRecord) -> bool:
    # Dask logs exceptions themselves, too, which are no text.
    text = record.getMessage()
    if text.startswith("Compute Failed"):
        return not any(f"{kind.__name__}(" in text for kind in _kinds_of(TilerError))
    return not text.startswith("Failed to communicate with scheduler during heartbeat")


def _kinds_of(kind: type[Exception]) -> Iterator[type[Exception]]:
    """A class of errors and all that are made of it."""
    yield kind
    for part in kind.__subclasses__():
        yield from _kinds_of(part)
