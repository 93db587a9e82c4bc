"""Training steps on Dask: the same bits for any number of workers, and when workers die."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cloudpickle
import pytest
import torch
from distributed import Client, Future, LocalCluster
from distributed.client import FutureCancelledError
from outsize.models.segmentation.networks.unet import UNet
from outsize.models.segmentation.training.losses import CrossEntropy, Dice, SumOfLosses
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.errors import LabelError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.cluster.client import ClusterError
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.reading import GDAL_CACHE_BYTES
from outsize.tiler.training import cluster as training_cluster
from outsize.tiler.training.cluster import TrainingCluster, TrainingPlugin, _sum_group
from outsize.tiler.training.gradient import GradientSum
from outsize.tiler.training.loss import Loss
from outsize.tiler.training.plan import TrainPlan
from outsize.tiler.training.planner import plan_training
from outsize.tiler.training.sum_tree import cut_groups, fold_tree
from outsize.tiler.training.tiled_autograd import tile_loss
from torch import Tensor, nn

from ...support.rasters import write_geotiff

pytestmark = pytest.mark.system

SHAPE = (61, 83)
PLAN = TrainPlan(image_shape=(3, *SHAPE), output_shape=(2, *SHAPE), core=(13, 17))
BOTH = SumOfLosses(losses=(CrossEntropy(ignore_index=255), Dice(ignore_index=255)), weights=(1.0, 0.5))


# Workers do not know this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Deadly:
    """A loss that kills the first process that computes it, with gradients or without."""

    loss: Loss
    marker: str
    with_gradients: bool

    @property
    def separable(self) -> bool:
        return self.loss.separable

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return self.loss.select(labels, valid)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        if torch.is_grad_enabled() != self.with_gradients:
            return self.loss.sums(logits, labels, counted)
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return self.loss.sums(logits, labels, counted)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def value(self, sums: Tensor) -> Tensor:
        return self.loss.value(sums)


def make_network() -> nn.Module:
    torch.manual_seed(5)
    return UNet(3, 2, (4, 8))


class Tied(nn.Module):
    """Two layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.middle, self.last = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
        self.last.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(nn.functional.pad(self.first(x), (3, 3, 3, 3))).relu())


class Heavy(nn.Module):
    """Many weights, and little to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.Parameter(torch.rand(9_000_000, 1)), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.rows.mean()


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def draw_labels() -> Tensor:
    labels = torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(2))
    labels[:9] = 255
    return labels


def gradients(network: nn.Module, loss: Loss, cluster: TrainingCluster | None, image: object = None) -> list[Tensor]:
    """(value, gradients) of a step."""
    network.zero_grad()
    value = tile_loss(network, PLAN, loss, draw(3, *SHAPE) if image is None else image, draw_labels(), cluster=cluster)  # pyright: ignore[reportArgumentType]
    (3 * value).backward()
    return [value.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.long)])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=request.param, threads_per_worker=2, dashboard_address="127.0.0.1:0", processes=True
    ) as cluster:
        yield cluster


@pytest.mark.usefixtures("_warm_workers")
def test_steps_have_the_same_bits_on_all_workers_on_one_and_when_one_dies(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(cluster) as client:
        workers = len(cluster.workers)
        client.wait_for_workers(workers, timeout=60)
        shared, network = TrainingCluster(client, groups=7), make_network()

        def die(*, with_gradients: bool) -> list[Tensor]:
            marker = tmp_path / f"{with_gradients}"
            found = gradients(network, Deadly(loss=BOTH, marker=str(marker), with_gradients=with_gradients), shared)
            assert marker.exists()
            return found

        first: list[Tensor] = []
        for loss in (CrossEntropy(ignore_index=255), BOTH):
            first = gradients(network, loss, shared)
            for ours, here in zip(first, gradients(network, loss, None), strict=True):
                # Added in another order, and no more.
                torch.testing.assert_close(ours, here, rtol=1e-5, atol=1e-6 * float(here.abs().max()))
        assert all(torch.equal(a, b) for a, b in zip(first, die(with_gradients=True), strict=True))
        client.wait_for_workers(workers, timeout=60)
        client.retire_workers(list(client.scheduler_info()["workers"])[1:])
        assert len(client.scheduler_info()["workers"]) == 1
        # Alone, and with all that was sent to it lost.
        assert all(torch.equal(a, b) for a, b in zip(first, die(with_gradients=False), strict=True))
        # Weights are those of the step, not those of the first.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        moved = gradients(network, BOTH, shared)
        for ours, here in zip(moved, gradients(network, BOTH, None), strict=True):
            torch.testing.assert_close(ours, here, rtol=1e-5, atol=1e-6 * float(here.abs().max()))
        assert not torch.equal(moved[1], first[1])
        # By a path that is the workers' only when it is made absolute.
        write_geotiff(tmp_path / "image.tif", draw(3, *SHAPE).numpy())
        monkeypatch.chdir(tmp_path)
        raster = open_raster("image.tif")
        assert torch.equal(gradients(network, BOTH, shared, raster)[1], moved[1])
        with torch.no_grad():
            value = tile_loss(network, PLAN, BOTH, raster, draw_labels(), cluster=shared)
        assert torch.equal(value, moved[0])
        # What a tile refuses comes back as it is.
        with pytest.raises(LabelError, match="2"):
            tile_loss(network, PLAN, BOTH, raster, draw_labels().clamp(max=200), cluster=shared)
        with pytest.raises(UsageError, match="gradient is not computed on a cluster"):
            gradients(network, BOTH, shared, draw(3, *SHAPE).requires_grad_())
        if sys.platform == "linux":
            assert_memory_is_predicted(client, shared)


def assert_memory_is_predicted(client: Client, shared: TrainingCluster) -> None:
    """Of one worker, with weights of 36 MB beside which all else is little."""

    def look(*, resets: bool) -> tuple[int, int]:
        """(resident set now, the largest since it was reset)."""
        if resets:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        now, most = (int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, most

    image, labels = draw(3, 16, 16), torch.zeros((16, 16), dtype=torch.int64)
    for learns in (True, False):
        heavy = Heavy()
        heavy.rows.requires_grad_(learns)
        network = analyze_network(heavy, bands=3)
        plan = plan_training(image, network, core=4, memory="8GB", on_cluster=True)
        assert plan.memory is not None
        ((before, _),) = client.run(look, resets=True).values()  # pyright: ignore[reportAttributeAccessIssue]
        tile_loss(network, plan, CrossEntropy(), image, labels, cluster=shared)
        ((_, most),) = client.run(look, resets=False).values()  # pyright: ignore[reportAttributeAccessIssue]
        assert most - before <= plan.memory.total_bytes - plan.memory.process_bytes < 1.6 * (most - before)


@pytest.mark.parametrize("loss", [CrossEntropy(ignore_index=255), BOTH], ids=["separable", "by sums"])
def test_parameters_that_are_tied_after_the_analysis_have_one_gradient_on_a_cluster_too(loss: Loss) -> None:
    module = Tied()
    network = analyze_network(module, bands=3)
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        TrainingCluster(client) as shared,
    ):
        for tied in (False, True):
            if tied:
                module.last.weight = module.middle.weight
            parameters = list(module.parameters())
            assert len(parameters) == (4 if tied else 5)
            found = [
                torch.autograd.grad(
                    tile_loss(network, PLAN, loss, draw(3, *SHAPE), draw_labels(), cluster=where), parameters
                )
                for where in (None, shared)
            ]
            whole = module(draw(1, 3, *SHAPE))
            if loss is not BOTH:
                expected = nn.functional.cross_entropy(whole, draw_labels()[None], ignore_index=255)
                found.append(torch.autograd.grad(expected, parameters))
            for here, *others in zip(*found, strict=True):
                for other in others:
                    torch.testing.assert_close(other, here, rtol=1e-4, atol=1e-5 * float(here.abs().max()))


class CountedThreads:
    """Work that tells on how many threads it is done, in the process and in the thread that does it."""

    def begin(self) -> CountedThreads:
        return self

    def sum_tiles(self, data: object, tiles: object, weights: object, *, with_gradients: bool) -> GradientSum:
        assert (data, tiles, weights, with_gradients) == ("data", ("tile",), None, True)
        return GradientSum(sums=torch.tensor([torch.get_num_threads()]))


def test_each_training_has_its_own_threads_in_whatever_thread_and_order_its_tasks_come() -> None:
    before = torch.get_num_threads()
    plugins = [TrainingPlugin(f"on {count}", cloudpickle.dumps(CountedThreads()), count) for count in (1, 3)]
    worker: Any = None
    for plugin in plugins:
        plugin.setup(worker)
    # Of two workers of this process one has left.
    plugins[0].setup(worker)
    plugins[0].teardown(worker)
    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(1) as other:
        for count in (1, 3, 1, 3, 3, 1):
            for each in (pool, other):
                task = each.submit(_sum_group, f"on {count}", cloudpickle.dumps("data"), ("tile",), None, True)
                assert task.result().sums == count
    assert torch.get_num_threads() == before
    for plugin in plugins:
        plugin.teardown(worker)
    with pytest.raises(KeyError):
        _sum_group("on 1", b"", (), None, True)


def test_a_worker_of_others_keeps_gdals_cache_and_freed_memory_as_small_as_was_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mapped: list[bool] = []
    monkeypatch.setattr(training_cluster, "map_large_blocks", lambda: mapped.append(True))
    monkeypatch.setenv("ZARR_ASYNC__CONCURRENCY", "3")
    monkeypatch.setenv("GDAL_CACHEMAX", "7")  # so that it is put back
    plugin, worker = TrainingPlugin("elsewhere", b"", 1), cast("Any", None)
    for own, wanted in ((None, str(GDAL_CACHE_BYTES // 2**20)), ("7", "7")):
        monkeypatch.setattr(plugin, "_starter", ("another machine", 1))
        if own is None:
            monkeypatch.delenv("GDAL_CACHEMAX")
        else:
            monkeypatch.setenv("GDAL_CACHEMAX", own)
        plugin.setup(worker)
        assert os.environ["GDAL_CACHEMAX"] == wanted
    assert mapped == [True, True]
    # The command's own process is its own affair.
    monkeypatch.undo()
    before = os.environ.get("GDAL_CACHEMAX")
    plugin.setup(worker)
    assert os.environ.get("GDAL_CACHEMAX") == before
    plugin.teardown(worker)


def test_workers_that_cannot_take_a_training_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "absent_network.py").write_text("class Order: pass")
    monkeypatch.syspath_prepend(tmp_path)
    order = importlib.import_module("absent_network").Order()
    plugin = TrainingPlugin("a", cloudpickle.dumps(order), 1)
    assert type(plugin.open()) is type(order)
    monkeypatch.undo()
    del sys.modules["absent_network"]
    with pytest.raises(ClusterError, match="a worker cannot load the network: No module named 'absent_network'"):
        plugin.open()
    monkeypatch.setattr(training_cluster, "find_versions", lambda: {"outsize": "0", "torch": "0"})
    with pytest.raises(ClusterError, match=r"a worker has outsize 0, and this command .*; install the same"):
        plugin.open()
    unsent = TrainingCluster(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ClusterError, match=r"cannot be sent to workers: .*lock.*; train in one process"):
        unsent.introduce(plugin, threading.Lock())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("reason", "status", "attempts", "message"),
    [
        ("lost dependencies", "running", 3, r"lost in each of 3 attempts at a training step: .*lost dependencies"),
        ("scheduler-connection-lost", "running", 1, r"^the Dask scheduler was lost; .* the same command goes on$"),
        ("unknown", "closed", 1, "the Dask scheduler was lost"),
    ],
)
def test_a_lost_scheduler_is_told_from_lost_workers(
    reason: str, status: str, attempts: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def submit(*_: object, **__: object) -> Future:
        tried.append(1)
        raise FutureCancelledError("sum", reason)

    client = cast("Any", SimpleNamespace(status=status))
    shared = TrainingCluster(client)
    for name, stub in (("_wait", lambda: None), ("_send", lambda *_: None), ("_submit", submit)):
        monkeypatch.setattr(shared, name, stub)
    with pytest.raises(ClusterError, match=message) as refused:
        shared.add_up("a", (), ("tile",), None, with_gradients=True)
    assert "\n" not in str(refused.value)
    assert len(tried) == attempts


@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 100])
def test_groups_partition_the_tiles_and_the_tree_adds_each_once(count: int) -> None:
    cores = [Window(y=0, x=x, height=1, width=1) for x in range(count)]
    groups = cut_groups(cores, 16)
    assert [core for group in groups for core in group] == cores
    assert len(groups) == min(16, count)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    added = fold_tree([(core.x,) for core in cores], lambda a, b: a + b)
    assert added == tuple(range(count))
    depth = fold_tree([0] * count, lambda a, b: max(a, b) + 1)
    assert depth == (count - 1).bit_length()
    # Level by level, as it is defined; and of the leaves few are there at once.
    level = [str(index) for index in range(count)]
    while len(level) > 1:
        pairs = [f"({a}{b})" for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    assert fold_tree(map(str, range(count)), lambda a, b: f"({a}{b})") == level[0]
    alive = Alive()
    fold_tree((alive.make() for _ in range(count)), alive.add)
    assert alive.most <= count.bit_length() + 1


class Alive:
    """Counts the sums that wait."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def make(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def add(self, _one: None, _other: None) -> None:
        self.now -= 1
