"""Training steps on Dask: fixed groups of tiles, one gradient sum a task, added by a fixed tree.

Which worker does what, and when, changes nothing: groups and tree follow from the tiles alone, so that a step has the
same bits for any number of workers, and after any of them has died.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, TypeVar

import cloudpickle
import torch
from distributed import Client, Future, Worker, WorkerPlugin
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker
from torch import Tensor

from .cluster import ClusterError
from .errors import UsageError
from .geometry import Window
from .gradient import (
    GradientSum,
    Precision,
    Tiles,
    compute_loss_sums,
    gradient_of_tiles,
)
from .loss import Loss
from .machine import map_large_blocks
from .network import analyze_network
from .records import log
from .trainable import TrainableNetwork
from .window_source import Pixels, open_source

GROUPS = 16
"""Tasks of a step, at most: each gives back a gradient as large as the weights."""
ATTEMPTS = 3
"""How often a step is begun anew whose weights are lost with the workers that held them."""
FIRST_WORKER_S = 120

T = TypeVar("T")


def cut_groups(cores: Sequence[Window], groups: int = GROUPS) -> list[tuple[Window, ...]]:
    """At most that many runs of neighbouring tiles, of sizes that differ by one; a function of the tiles alone."""
    count = min(groups, len(cores))
    bounds = [index * len(cores) // count for index in range(count + 1)] if count else [0]
    return [tuple(cores[start:stop]) for start, stop in itertools.pairwise(bounds)]


def fold_tree(leaves: Sequence[T], add: Callable[[T, T], T]) -> T:
    """All leaves added in pairs of neighbours, then those sums, and so on: an order that no timing changes."""
    level = list(leaves)
    while len(level) > 1:
        pairs = [add(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


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

    @classmethod
    def of(cls, *, tensors: Mapping[str, Tensor], **rest: Any) -> StepData:
        """With the tensors as they are now, without the caller's graph, hooks and device."""
        plain = {name: t.detach().cpu().requires_grad_(t.requires_grad) for name, t in tensors.items()}
        return cls(tensors=plain, **rest)


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
        self._known: dict[int, tuple[TrainableNetwork, str]] = {}

    def compute_sums(self, network: TrainableNetwork, data: StepData, cores: Sequence[Window]) -> GradientSum:
        """As `compute_loss_sums`, over all workers."""
        return self._run(network, data, cores, None, with_gradients=False)

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
        return self._run(network, data, cores, weights, with_gradients=True)

    def _run(
        self,
        network: TrainableNetwork,
        data: StepData,
        cores: Sequence[Window],
        weights: Tensor | None,
        *,
        with_gradients: bool,
    ) -> GradientSum:
        run_id = self._introduce(network)
        groups = cut_groups(cores, self.groups)
        # Losses may be classes of the user's own script, which workers do not know.
        packed = cloudpickle.dumps(data)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.client.wait_for_workers(1, timeout=FIRST_WORKER_S)
                # Broadcast: a worker that dies then takes no weights with it that another does not hold.
                scattered: Any = self.client.scatter([packed], broadcast=True, hash=False)
                (sent,) = scattered
                return self._submit(run_id, sent, groups, weights, with_gradients=with_gradients).result()
            except TimeoutError as error:
                raise ClusterError(f"the Dask scheduler has no workers after {FIRST_WORKER_S} s; start some") from error
            except ClosedClientError as error:
                raise ClusterError("the Dask scheduler was lost; the last checkpoint goes on from there") from error
            except (KilledWorker, CancelledError, CommClosedError) as error:
                if attempt == ATTEMPTS or self.client.status != "running":
                    raise ClusterError(f"training step: workers were lost {attempt} times: {error}") from error
                log.warning("a training step is begun anew, its workers were lost: %s", error)
        raise AssertionError

    def _submit(
        self,
        run_id: str,
        sent: Future,
        groups: list[tuple[Window, ...]],
        weights: Tensor | None,
        *,
        with_gradients: bool,
    ) -> Future:
        """The sum over all groups. Nobody holds the sums below it, so that workers drop them as they are added."""
        step, numbers = uuid.uuid4().hex[:12], itertools.count()

        def add(left: Future, right: Future) -> Future:
            return self.client.submit(_add, left, right, key=(f"sum-{step}", next(numbers)), pure=False)

        return fold_tree(
            [
                self.client.submit(
                    _run_group,
                    run_id,
                    sent,
                    group,
                    weights,
                    with_gradients,
                    key=(f"tiles-{step}", index),
                    pure=False,
                )
                for index, group in enumerate(groups)
            ],
            add,
        )

    def _introduce(self, network: TrainableNetwork) -> str:
        """Make all workers, and those to come, know a network; once."""
        if id(network) not in self._known:
            run_id = uuid.uuid4().hex[:12]
            traced = network.network
            payload = cloudpickle.dumps((network.module, traced.bands, str(traced.dtype).removeprefix("torch.")))
            self.client.register_plugin(TrainingPlugin(run_id, payload, self.threads))
            self._known[id(network)] = (network, run_id)
        return self._known[id(network)][1]


class TrainingPlugin(WorkerPlugin):
    """Gives every worker process, a restarted one too, the network of a training."""

    def __init__(self, run_id: str, payload: bytes, threads: int) -> None:
        self.run_id, self.payload, self.threads = run_id, payload, threads
        self.name = f"outsize-training-{run_id}"

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - Dask's signature
        _PAYLOADS[self.run_id] = (self.payload, self.threads)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        _PAYLOADS.pop(self.run_id, None)
        _NETWORKS.pop(self.run_id, None)


_PAYLOADS: dict[str, tuple[bytes, int]] = {}
_NETWORKS: dict[str, TrainableNetwork] = {}
_COMPUTING = threading.Lock()
"""Of a process: one group at a time, as many tiles as were counted on."""


def _network(run_id: str) -> TrainableNetwork:
    """This process's network of a training; traced by the first task."""
    if run_id not in _NETWORKS:
        payload, threads = _PAYLOADS[run_id]
        # What a plan predicts holds in workers too.
        map_large_blocks()
        torch.set_num_threads(threads)
        module, bands, dtype = pickle.loads(payload)
        _NETWORKS[run_id] = TrainableNetwork(analyze_network(module, bands, dtype))
    return _NETWORKS[run_id]


def _run_group(
    run_id: str, packed: bytes, cores: tuple[Window, ...], weights: Tensor | None, with_gradients: bool
) -> GradientSum:
    """A task: the sums of some tiles, and their gradients."""
    with _COMPUTING:
        network = _network(run_id)
        data: StepData = pickle.loads(packed)
        image, labels = open_source(data.image, data.fill), open_source(data.labels)
        try:
            tiles = Tiles(
                network=network,
                image=image,
                cores=cores,
                cuts=data.cuts,
                precision=data.precision,
            )
            if with_gradients:
                return gradient_of_tiles(tiles, data.tensors, data.loss, labels, weights=weights)
            return compute_loss_sums(tiles, data.tensors, data.loss, labels)
        finally:
            image.close()
            labels.close()


def _add(left: GradientSum, right: GradientSum) -> GradientSum:
    """A task. Its operands stay as they are: they may be needed again, where this sum's worker dies."""
    total = GradientSum()
    for part in (left, right):
        total.add_sums(part.sums)
        for name, gradient in part.gradients.items():
            found = total.gradients.get(name)
            total.gradients[name] = gradient if found is None else found + gradient
    return total
