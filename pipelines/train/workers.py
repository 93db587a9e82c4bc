"""Who computes a training's steps: this process, workers that are started here, or those of a Dask scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from ...tiler.base.errors import UsageError
from ...tiler.cluster.client import ClusterOptions, open_client
from ...tiler.rasters.reading import GDAL_CACHE_BYTES
from ...tiler.system.machine import torch_threads
from ...tiler.training.cluster import TrainingCluster
from ..base.console import Console, count_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Where steps are computed; nothing of it changes what is computed, but for `threads` its last bits."""

    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    workers: int | None = None
    """Processes to start here; None: none, this process computes if no scheduler is named."""
    threads: int | None = None
    """torch's, of each process; None: 1 on Dask, else torch's own choice."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.cluster.connects:
            raise UsageError(
                f"--workers starts processes here, and a scheduler has workers of its own: got --workers {self.workers}"
                f" with {self.cluster.address or self.cluster.scheduler_file}; leave one of them out"
            )

    @property
    def uses_dask(self) -> bool:
        return self.workers is not None or self.cluster.connects

    @property
    def processes(self) -> int:
        """On this machine, with the commanding one."""
        return 1 + (self.workers or 0)


@contextmanager
def open_training_cluster(console: Console, options: WorkerOptions) -> Iterator[TrainingCluster | None]:
    """The workers that steps are computed on, None: this process. What was started here is closed at the end.

    torch in this process has as many threads as in each worker: what it computes itself, norms' statistics and
    validations, has the same bits too.

    Raises:
        ClusterError: the scheduler does not answer.
    """
    threads = options.threads or (1 if options.uses_dask else None)
    with torch_threads(threads) if threads else nullcontext():
        if not options.uses_dask:
            yield None
            return
        assert threads is not None
        workers = options.workers or 1
        with (
            open_client(options.cluster, workers=workers, threads=1, gdal_cache_bytes=GDAL_CACHE_BYTES) as client,
            TrainingCluster(client, threads=threads) as cluster,
        ):
            where = options.cluster.address or options.cluster.scheduler_file or "this machine"
            shown = f", dashboard {client.dashboard_link}" if options.cluster.serves_dashboard else ""
            found = len(client.scheduler_info()["workers"])
            console.remark(
                f"steps on Dask: {count_of(found, 'worker')} of {where}, {count_of(threads, 'thread')} each{shown}"
            )
            yield cluster
