"""Runs from processes that have not all that a process has: forked ones, daemonic ones, tasks of Dask."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster, get_client, utils, worker_client
from outsize.models.segmentation.training.losses import CrossEntropy
from outsize.tiler.cluster.client import ClusterError, ClusterOptions, open_client
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.run import predict
from outsize.tiler.training.tiled_autograd import tile_loss
from torch.nn import functional as F

from ...support.forks import in_a_fork
from ...support.runs import class_network, scene, stored, whole
from ...support.whole_gradients import analysed, draw, gradients_of, largest_difference, plan_of, run_whole

THREADS = ClusterOptions(processes=False, dashboard_address=None)
PROCESSES = ClusterOptions(dashboard_address=None)

pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture
def _has_threads() -> Any:
    """As if this process had computed: by torch on several threads, which keep waiting for more, and with Dask."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        F.conv2d(torch.ones(1, 8, 300, 300), torch.ones(8, 8, 3, 3))
        torch.ones(900, 900) @ torch.ones(900, 900)
        utils._offload_executor.submit(abs, -1).result()
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_has_threads")
def test_a_forked_process_runs(tmp_path: Path) -> None:
    source, out = scene(tmp_path, 100, 90), tmp_path / "o.zarr"
    network = class_network()
    in_a_fork(lambda: predict(source, network, out, engine="torch", core=64, cluster=THREADS).tiles)
    assert np.array_equal(stored(out), whole(network, source))


@pytest.mark.usefixtures("_has_threads")
def test_a_forked_process_talks_to_workers() -> None:
    """What is large goes by a thread of Dask's, which did not come along."""

    def send() -> int:
        with open_client(PROCESSES, workers=1, threads=1, gdal_cache_bytes=1 << 24) as client:
            return client.submit(len, client.scatter(b"x" * 20_000_000, hash=False)).result()

    assert in_a_fork(send) == 20_000_000


@pytest.mark.usefixtures("_has_threads")
def test_a_forked_process_trains() -> None:
    network, image = analysed("plain unet"), draw(3, 53, 67).requires_grad_()
    labels = torch.ones(network.output_shape((53, 67)), dtype=torch.int64)
    expected = gradients_of(F.cross_entropy(run_whole(network, image), labels[None]), image, network)[1:]

    def train() -> list[torch.Tensor]:
        value = tile_loss(network, plan_of(network, (53, 67), (40, 40)), CrossEntropy(), image.detach(), labels)
        return [gradient.clone() for gradient in torch.autograd.grad(value, list(network.module.parameters()))]

    assert largest_difference(in_a_fork(train), expected) < 1e-12


def test_a_daemonic_process_says_that_it_may_start_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in multiprocessing.Pool and Dask's workers."""
    source, out = scene(tmp_path, 100, 90), tmp_path / "o.zarr"
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined] - its own
    for call in (
        lambda: predict(source, class_network(), out, core=64, cluster=PROCESSES),
        lambda: copy_raster(open_raster(source), out, workers=2, cluster=PROCESSES),
    ):
        with pytest.raises(ClusterError, match=r"^worker processes cannot be started by a daemonic process.*client"):
            call()
        assert not out.exists()
    predict(source, class_network(), out, engine="torch", core=64, cluster=THREADS)
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_a_task_of_dask_runs_on_its_own_workers(tmp_path: Path) -> None:
    """On the only thread that there is; which is there again afterwards."""
    source = scene(tmp_path, 100, 90)

    def by_client(out: Path) -> int:
        return predict(source, class_network(), out, engine="torch", core=64, client=get_client()).tiles

    def by_worker_client(out: Path) -> int:
        with worker_client() as client:
            return predict(source, class_network(), out, engine="torch", core=64, client=client).tiles

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        for work in (by_client, by_worker_client):
            out = tmp_path / f"{work.__name__}.zarr"
            assert client.submit(work, out, pure=False).result(timeout=60) == 4
            assert np.array_equal(stored(out), whole(class_network(), source))
        assert client.submit(abs, -5).result(timeout=60) == 5
