"""Training steps on Dask: fixed groups of tiles, one gradient sum a task, added by a fixed tree.

Which worker does what, and when, changes nothing: groups and tree follow from the tiles alone, so that a step has the
same bits for any number of workers, and after any of them has died.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import cloudpickle
import torch
from distributed import Client, Future, Worker, WorkerPlugin
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker
from torch import Tensor, nn

from ..analysis.network import analyze_network
from ..base.errors import RasterError, TilerError, UsageError
from ..base.geometry import Window
from ..base.text import first_line
from ..cluster.client import ClusterError, follow, leaving_slot
from ..cluster.schedule import LOST, forget_plugin
from ..rasters.reading import GDAL_CACHE_BYTES
from ..system.environment import complete_environment
from ..system.logs import log
from ..system.machine import find_versions, map_large_blocks, torch_threads
from ..system.process_locks import ProcessLock
from .gradient import GradientSum, Precision, Tiles, compute_loss_sums, gradient_of_tiles
from .loss import Loss
from .sum_tree import GROUPS, cut_groups, fold_tree
from .trainable import TrainableNetwork
from .window_source import Pixels, open_source

ATTEMPTS = 3
"""How often a step is begun anew whose weights are lost with the workers that held them."""
FIRST_WORKER_S = 120


class Work(Protocol):
    """What a worker process keeps of a training from step to step: a traced network, open readers."""

    def sum_tiles(
        self, data: Any, tiles: Sequence[Any], weights: Tensor | None, *, with_gradients: bool
    ) -> GradientSum:
        """The sums of some tiles, and their gradients; with the same bits in any process.

        Args:
            data: what is new in this step, its weights before all.
            weights: the gradient of the loss's value for its sums; None: of sums[0] alone.
        """
        ...


class Order(Protocol):
    """All that a process needs to begin such work; sent once to each."""

    def begin(self) -> Work: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """What every worker needs of one step; sent once to each."""

    image: Pixels
    labels: Pixels
    fill: tuple[float, ...] | None
    tensors: dict[str, Tensor]
    """Weights and buffers by the names of the trace; those that require gradients get them."""
    loss: Loss
    precision: Precision
    cuts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ImageOrder:
    """The work of `tile_loss`, whose images come with each step."""

    module: nn.Module
    bands: int
    dtype: torch.dtype

    def begin(self) -> _ImageWork:
        return _ImageWork(TrainableNetwork(analyze_network(self.module, self.bands, self.dtype)))


class _ImageWork:
    def __init__(self, network: TrainableNetwork) -> None:
        self._network = network

    def sum_tiles(
        self, data: StepData, tiles: Sequence[Window], weights: Tensor | None, *, with_gradients: bool
    ) -> GradientSum:
        image, labels = open_source(data.image, data.fill), open_source(data.labels)
        try:
            part = Tiles(network=self._network, image=image, cores=tiles, cuts=data.cuts, precision=data.precision)
            if with_gradients:
                return gradient_of_tiles(part, data.tensors, data.loss, labels, weights=weights)
            return compute_loss_sums(part, data.tensors, data.loss, labels)
        finally:
            image.close()
            labels.close()


class TrainingCluster:
    """Computes the gradients of `tile_loss` on the workers of a Dask client.

    Guarantee: the same bits for any number of workers of one type of machine, and after the death of any, as long as
    one is left or started again.

    Args:
        client: of a running cluster. Workers need the package, and see the rasters under the same paths.
        threads: of each worker process's computation; the same everywhere, since sums of several threads differ in
            their last bits from those of one.
        groups: tasks of a step, at most.
    """

    def __init__(self, client: Client, *, threads: int = 1, groups: int = GROUPS) -> None:
        if threads < 1 or groups < 1:
            raise UsageError(f"threads and groups must be >= 1, got {threads} and {groups}")
        self.client, self.threads, self.groups = client, threads, groups
        self._known: dict[int, tuple[object, str]] = {}
        self._sent: tuple[bytes, Future] | None = None
        """What workers hold of a step whose gradients are still to come, and its hash."""

    def compute_sums(self, network: TrainableNetwork, data: StepData, cores: Sequence[Window]) -> GradientSum:
        """As `compute_loss_sums`, over all workers."""
        return self.add_up(self._introduce(network), data, cores, None, with_gradients=False)

    def compute_gradient(
        self,
        network: TrainableNetwork,
        data: StepData,
        cores: Sequence[Window],
        weights: Tensor | None = None,
    ) -> GradientSum:
        """As `gradient_of_tiles`, over all workers.

        Raises:
            ClusterError: the scheduler is gone, or all workers are, again and again.
            TilerError: what a tile raises.
        """
        return self.add_up(self._introduce(network), data, cores, weights, with_gradients=True)

    def add_up(
        self, name: str, data: Any, tiles: Sequence[Any], weights: Tensor | None, *, with_gradients: bool
    ) -> GradientSum:
        """`Work.sum_tiles` of all tiles, over all workers.

        Args:
            name: of the work, as `introduce` gave it.

        Raises:
            ClusterError: the scheduler is gone, or all workers are, again and again; one that cannot do the work.
            TilerError: what a tile raises.
        """
        groups = cut_groups(tiles, self.groups)
        # Losses may be classes of the user's own script, which workers do not know.
        packed = cloudpickle.dumps(data)
        digest = hashlib.sha256(packed).digest()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with leaving_slot(self.client):
                    self._wait()
                    sent = self._send(packed, digest)
                    total = self._submit(name, sent, groups, weights, with_gradients=with_gradients).result()
                self._sent = None if with_gradients else (digest, sent)
                return total
            except ClosedClientError as error:
                raise ClusterError(LOST) from error
            except (KilledWorker, CancelledError, CommClosedError, TimeoutError) as error:
                by_scheduler = isinstance(error, FutureCancelledError) and (error.reason or "").startswith("scheduler")
                if by_scheduler or self.client.status != "running":
                    raise ClusterError(LOST) from error
                if attempt == ATTEMPTS:
                    raise ClusterError(
                        f"workers were lost in each of {ATTEMPTS} attempts at a training step: {first_line(error)}; is "
                        "there enough memory?"
                    ) from error
                log.warning("a training step is begun anew, its workers were lost: %s", first_line(error))
        raise AssertionError

    def _send(self, packed: bytes, digest: bytes) -> Future:
        """All workers hold it; what they hold since the step's first pass is not sent again."""
        held, self._sent = self._sent, None
        if held is not None and held[0] == digest and held[1].status == "finished":
            return held[1]
        del held
        # Broadcast: a worker that dies then takes no weights with it that another does not hold.
        scattered: Any = self.client.scatter([packed], broadcast=True, hash=False)
        (sent,) = scattered
        return sent

    def _submit(
        self,
        name: str,
        sent: Future,
        groups: Sequence[tuple[Any, ...]],
        weights: Tensor | None,
        *,
        with_gradients: bool,
    ) -> Future:
        """The sum over all groups. Nobody holds the sums below it, so that workers drop them as they are added: tasks
        are submitted, and done, in an order in which few wait."""
        step, numbers = uuid.uuid4().hex[:12], itertools.count()

        def add(left: Future, right: Future) -> Future:
            return self.client.submit(_add, left, right, key=(f"sum-{step}", next(numbers)), pure=False)

        return fold_tree(
            (
                self.client.submit(
                    _sum_group, name, sent, group, weights, with_gradients, key=(f"tiles-{step}", index), pure=False
                )
                for index, group in enumerate(groups)
            ),
            add,
        )

    def _introduce(self, network: TrainableNetwork) -> str:
        traced = network.network
        order = _ImageOrder(module=network.module, bands=traced.bands, dtype=traced.dtype)
        return self.introduce(network, order)

    def introduce(self, owner: object, order: Order) -> str:
        """Make all workers, and those to come, know what is to be done for an owner, once; returns the work's name.

        Raises:
            ClusterError: the order cannot be sent, or a worker cannot take it.
        """
        if id(owner) not in self._known:
            name = uuid.uuid4().hex[:12]
            try:
                payload = cloudpickle.dumps(order)
            except Exception as error:
                raise ClusterError(
                    f"this network cannot be sent to workers: {first_line(error)}; train in one process"
                ) from error
            try:
                self.client.register_plugin(TrainingPlugin(name, payload, self.threads))
            except Exception as error:
                raise ClusterError(
                    f"workers cannot take a training: {first_line(error)}; install this package there, in the same "
                    "version"
                ) from error
            self._known[id(owner)] = (owner, name)
        return self._known[id(owner)][1]

    def try_out(self, name: str, check: Callable[[Any], None]) -> None:
        """Have each worker that is there check its order of a work.

        Raises:
            ClusterError: names the first worker on which `check` fails, and why.
        """
        self._wait()
        found: Any = self.client.run(_try_order, name, check, on_error="return")
        for address, error in sorted(found.items()):
            if isinstance(error, RasterError):
                raise ClusterError(
                    f"worker {address}: {first_line(error)}; scenes and labels must lie under the same paths on all "
                    "workers"
                ) from error
            if isinstance(error, Exception):
                raise ClusterError(f"worker {address}: {first_line(error)}") from error

    def _wait(self) -> None:
        try:
            self.client.wait_for_workers(1, timeout=FIRST_WORKER_S)
        except TimeoutError as error:
            raise ClusterError(f"the Dask scheduler has no workers after {FIRST_WORKER_S} s; start some") from error

    def close(self) -> None:
        """Have the workers forget all that was introduced; the client stays."""
        for _, name in self._known.values():
            forget_plugin(self.client, _plugin_name(name))
        self._known.clear()
        self._sent = None

    def __enter__(self) -> TrainingCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plugin_name(name: str) -> str:
    return f"outsize-training-{name}"


class TrainingPlugin(WorkerPlugin):
    """Gives every worker process, a restarted one too, the work of a training."""

    def __init__(self, work: str, payload: bytes, threads: int) -> None:
        self.work, self.payload, self.threads = work, payload, threads
        self.name = _plugin_name(work)
        self._versions = _versions()
        self._starter = (socket.gethostname(), os.getpid())

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - Dask's signature
        here = socket.gethostname()
        follow(self._starter)
        if (here, os.getpid()) != self._starter:
            # What a plan predicts holds here too; before the first tensor, and the first block that GDAL reads.
            map_large_blocks()
            complete_environment(GDAL_CACHE_BYTES)
        _PLUGINS[self.work] = self
        _USERS[self.work] = _USERS.get(self.work, 0) + 1

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        _USERS[self.work] -= 1
        if _USERS[self.work]:
            return
        del _USERS[self.work]
        _PLUGINS.pop(self.work, None)
        _WORKS.pop(self.work, None)

    def open(self) -> Order:
        """The order.

        Raises:
            ClusterError: this process has other versions, or cannot load the network.
        """
        ours = _versions()
        for name, version in self._versions.items():
            if ours.get(name) != version:
                raise ClusterError(
                    f"a worker has {name} {ours.get(name)}, and this command {version}: bits would differ; install the "
                    "same everywhere"
                )
        try:
            return pickle.loads(self.payload)
        except (ImportError, AttributeError) as error:
            raise ClusterError(
                f"a worker cannot load the network: {first_line(error)}; install its package there"
            ) from error


def _versions() -> dict[str, str]:
    """Of what a step's bits depend on."""
    return {name: version for name, version in find_versions().items() if name in ("outsize", "torch")}


_PLUGINS: dict[str, TrainingPlugin] = {}
_WORKS: dict[str, Work] = {}
_USERS: dict[str, int] = {}
"""Dask workers of this process that know a training: more than one where workers are threads."""
_COMPUTING = ProcessLock()
"""Of a process: one group at a time, as many tiles as were counted on."""


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Refusals without what caused them: their messages say all, and some causes do not survive the way to the
    client."""
    try:
        yield
    except TilerError as error:
        error.__cause__ = error.__context__ = None
        raise


def _try_order(name: str, check: Callable[[Any], None]) -> None:
    with _plain_errors():
        check(_PLUGINS[name].open())


def _work(name: str) -> Work:
    """This process's work; begun by the first task."""
    if name not in _WORKS:
        plugin = _PLUGINS[name]
        _WORKS[name] = plugin.open().begin()
        # As large as the weights, and never asked for again.
        plugin.payload = b""
    return _WORKS[name]


def _sum_group(
    name: str, packed: bytes, tiles: tuple[Any, ...], weights: Tensor | None, with_gradients: bool
) -> GradientSum:
    """A task: the sums of some tiles, and their gradients."""
    # For each task: another thread may run it, another training may have run before it.
    with _COMPUTING, torch_threads(_PLUGINS[name].threads), _plain_errors():
        return _work(name).sum_tiles(pickle.loads(packed), tiles, weights, with_gradients=with_gradients)


def _add(left: GradientSum, right: GradientSum) -> GradientSum:
    """A task. Its operands stay as they are: they may be needed again, where this sum's worker dies."""
    total = GradientSum()
    for part in (left, right):
        total.add_sums(part.sums)
        for name, gradient in part.gradients.items():
            found = total.gradients.get(name)
            total.gradients[name] = gradient if found is None else found + gradient
    return total
