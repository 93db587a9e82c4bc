"""Devices and batches in plans and runs: budgets kept on both sides, one device a worker, the same result."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from outsize.models.segmentation.networks.unet import UNet
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.analysis.stated import state_network
from outsize.tiler.base.errors import BudgetError, ExactnessError, OutputError, UsageError, WorkerError
from outsize.tiler.base.geometry import Window
from outsize.tiler.base.memory import CUDA_HOST_BYTES, EngineMemory, find_budget, predict_pinned
from outsize.tiler.base.text import parse_bytes
from outsize.tiler.cluster.client import ClusterOptions, open_client
from outsize.tiler.cluster.local import visible_device
from outsize.tiler.engines.devices import CudaDevice, MachineFacts
from outsize.tiler.engines.memory import CUDA_MEMORY
from outsize.tiler.engines.torch import Forward
from outsize.tiler.output import resume
from outsize.tiler.output.fingerprint import find_differences, make_fingerprint
from outsize.tiler.output.store import OutputDescription, read_header
from outsize.tiler.planning.candidates import BATCH_PIXELS
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.inference import predict_window
from outsize.tiler.runs.memory_probe import MARGIN, ProbedCore, fit_memory
from outsize.tiler.runs.run import predict
from outsize.tiler.runs.summary import RunSummary
from torch import Tensor, nn

from ...support.runs import class_network, scene, stored, whole

GB = 10**9
BIG, SMALL = (
    CudaDevice(name=name, free_bytes=free * GB, total_bytes=free * GB, capability=(9, 0))
    for name, free in (("big", 60), ("small", 6))
)
GPUS = MachineFacts(has_openvino=True, cuda=(BIG, BIG, SMALL))


@cache
def default_network() -> Network:
    return analyze_network(UNet().eval(), bands=4)


def plan_on(facts: MachineFacts, side: int = 30000, **options: Any) -> TilePlan:
    return plan_tiles((4, side, side), default_network(), facts=facts, **options)


def test_a_cuda_plan_has_a_worker_for_each_device_and_keeps_both_budgets() -> None:
    plan = plan_on(GPUS)
    assert (plan.engine, plan.device, plan.workers, plan.method) == ("torch", "cuda", 3, "window")
    assert plan.device_names == ("big", "big", "small")
    assert plan.device_indices == (0, 1, 2)
    # The smallest device counts: every worker may get any tile.
    assert plan.device_budget_bytes == 4.8 * GB
    assert 0 < plan.device_bytes <= plan.device_budget_bytes
    assert plan.memory.total_bytes <= plan.memory_budget_bytes == find_budget(None, 3)
    one = plan_on(GPUS, device="cuda:1")
    assert (one.workers, one.device_names, one.device_indices) == (1, ("big",), (1,))
    assert one.device_budget_bytes == 48 * GB
    assert one.core[0] > plan.core[0]
    text = plan.explain()
    assert "torch in float32 on cuda (2 x big, 1 x small), 3 worker processes" in text
    assert "device " in text
    assert "budget 4.80 GB" in text
    assert TilePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan == plan_on(GPUS)


def test_activations_count_on_the_device_and_not_on_the_host() -> None:
    budgets = {"memory": "8GB", "device": "cuda:0"}
    plans = [plan_on(GPUS, device_memory=size, **budgets) for size in ("1GB", "2GB", "6GB", "40GB")]
    assert [plan.core[0] for plan in plans] == sorted(plan.core[0] for plan in plans)
    assert plans[0].core < plans[-1].core
    for plan, size in zip(plans, ("1GB", "2GB", "6GB", "40GB"), strict=True):
        assert plan.device_bytes <= plan.device_budget_bytes == parse_bytes(size)
        live = default_network().count_live_bytes(plan.largest_window)
        # With the context, and the tensors at least once.
        assert plan.device_bytes > plan.batch * live
        # And the weights, as they are sent.
        assert plan.memory.program_bytes == CUDA_HOST_BYTES + default_network().weight_bytes


def test_small_windows_come_in_batches_and_large_ones_alone() -> None:
    def batch_of(core: int, **options: Any) -> int:
        plan = plan_on(GPUS, 8192, device="cuda:0", core=core, memory="30GB", **options)
        height, width = plan.largest_window
        assert plan.batch == 1 or plan.batch * height * width <= BATCH_PIXELS
        assert plan.in_flight == 2 * plan.batch
        return plan.batch

    assert [batch_of(core) for core in (256, 512, 1024, 2048)] == [16, 8, 2, 1]
    assert batch_of(512, device_memory="2GB") < 8
    full = plan_on(GPUS, 8192, device="cuda:0", core=256, memory="30GB")
    tight = full.memory.total_bytes - full.memory.buffer_bytes // 2
    assert plan_on(GPUS, 8192, device="cuda:0", core=256, memory=tight).batch < full.batch == 16
    # Few tiles: each of three workers must get some batches.
    assert plan_on(GPUS, 1024, core=256, memory="60GB").batch == 2
    assert plan_on(GPUS, 8192, core=256, batch=5, memory="60GB").batch == 5
    assert plan_on(MachineFacts(has_openvino=True), core=256).batch == 1


class Centred(nn.Module):
    """Subtracts from each image the mean of those that come with it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def test_a_network_that_joins_images_gets_no_batches() -> None:
    network = analyze_network(Centred().eval(), bands=3, dtype="float32")
    assert plan_tiles((3, 4096, 4096), network, core=256, memory="30GB", facts=GPUS).batch == 1


def test_impossible_device_options_are_refused_with_what_is_possible() -> None:
    with pytest.raises(BudgetError, match=r"device memory must be at least .*; free the device, raise --device-memory"):
        plan_on(GPUS, device_memory="100MB")
    with pytest.raises(BudgetError, match="memory must be at least"):
        plan_on(GPUS, memory="2GB")
    with pytest.raises(UsageError, match="at most one for each of 3 devices, got 4"):
        plan_on(GPUS, workers=4)
    assert plan_on(GPUS, workers=2).device_names == ("big", "big")
    with pytest.raises(UsageError, match="--device-memory is for CUDA devices"):
        plan_on(GPUS, device="cpu", device_memory="2GB")
    with pytest.raises(UsageError, match="batches are for torch on windows, this run is openvino"):
        plan_on(GPUS, device="cpu", batch=2)
    with pytest.raises(UsageError, match="--compile is for windows"):
        plan_on(GPUS, compiles=True, method="program")
    with pytest.raises(UsageError, match="precision bfloat16 runs windows, got --method program"):
        plan_on(GPUS, precision="bfloat16", method="program")


def test_a_stated_halo_is_not_checked_in_fewer_bits() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x + x

    network = state_network(Untraceable().eval(), 3, "float32", halo=1)
    with pytest.raises(UsageError, match="halo that is only stated is checked in float32"):
        plan_tiles((3, 100, 100), network, precision="bfloat16", device="cpu")


def test_pinned_memory_is_counted_in_powers_of_two() -> None:
    assert predict_pinned(batch=1, lanes=2, window_bytes=1024, output_bytes=1025) == 2 * (1024 + 2048)
    assert predict_pinned(batch=3, lanes=2, window_bytes=1000, output_bytes=0) == 2 * (4096 + 1)


def test_two_probed_cores_give_the_line_of_the_side_where_tensors_are() -> None:
    usual = EngineMemory(worker_bytes=7, factor=0, constant_bytes=0)
    points = [
        ProbedCore(live_bytes=400, host_bytes=1200, device_bytes=5000),
        ProbedCore(live_bytes=100, host_bytes=600, device_bytes=4100),
    ]
    on_host = fit_memory(points, usual, on_device=False)
    assert (on_host.factor, on_host.constant_bytes) == (MARGIN * 2, round(MARGIN * 400))
    assert on_host.device_factor == 0
    on_device = fit_memory(points, usual, on_device=True)
    assert (on_device.factor, on_device.constant_bytes) == (0, round(MARGIN * 1200))
    assert (on_device.device_factor, on_device.device_constant_bytes) == (MARGIN * 3, round(MARGIN * 3800))
    assert CUDA_MEMORY.factor == 0 < CUDA_MEMORY.device_factor


def test_workers_are_shown_one_device_each_by_the_name_that_this_process_has_for_it() -> None:
    assert [visible_device(i, None) for i in range(3)] == ["0", "1", "2"]
    assert [visible_device(i, "5, 3") for i in range(2)] == ["5", "3"]
    assert visible_device(1, "GPU-aa,GPU-bb") == "GPU-bb"


@pytest.mark.system
def test_each_worker_sees_its_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,6")
    options = ClusterOptions(dashboard_address=None)
    with open_client(options, workers=2, threads=1, gdal_cache_bytes=2**26, cuda=(2, 1)) as client:
        seen: Any = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    assert sorted(seen.values()) == ["5", "6"]


def test_an_unfinished_output_goes_on_on_other_devices_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    there = plan_on(GPUS)
    monkeypatch.setattr(resume, "read_header", lambda _: {"fingerprint": {}})
    monkeypatch.setattr(resume, "plan_of", lambda *_: there)

    def go_on(now: TilePlan) -> TilePlan:
        return resume.require_continuable(Path("o.zarr"), {}, now, paths=[], resume=True, core=None)

    assert go_on(there) == there
    other = plan_on(MachineFacts(has_openvino=True, cuda=(BIG,)), memory=there.memory_budget_bytes)
    moved = go_on(other)
    assert (moved.workers, moved.device_names, moved.device_budget_bytes) == (1, ("big",), 48 * GB)
    assert (moved.core, moved.rows, moved.batch, moved.device_bytes) == (
        there.core, there.rows, there.batch, there.device_bytes
    )  # fmt: skip
    more = plan_on(MachineFacts(has_openvino=True, cuda=(BIG,) * 5), memory="60GB")
    assert go_on(more).workers == 3
    with pytest.raises(BudgetError, match=r"device memory must be at least .* to continue o\.zarr"):
        go_on(plan_on(GPUS, device_memory="1.5GB"))


def test_tiles_of_two_kinds_of_device_do_not_go_into_one_output(tmp_path: Path) -> None:
    raster = open_raster(scene(tmp_path, 65, 67))

    def print_of(plan: TilePlan) -> dict[str, Any]:
        return make_fingerprint(raster, class_network(), OutputDescription(kind="class"), plan, (0, 0, 0), 3)

    here = plan_tiles(raster, class_network(), engine="torch", device="cpu")
    there = plan_tiles(raster, class_network(), facts=GPUS)
    assert find_differences(print_of(there), print_of(here)) == ["device cuda there, cpu now"]
    same = plan_tiles(raster, class_network(), facts=GPUS, device="cuda:2")
    assert find_differences(print_of(there), print_of(same)) == []
    compiled = replace(here, compiles=True)
    assert find_differences(print_of(here), print_of(compiled)) == ["compiled False there, True now"]
    before = {name: value for name, value in print_of(here).items() if name not in ("device", "compiled")}
    assert find_differences(before, print_of(here)) == []


def run_here(source: Path, out: Path, **options: Any) -> RunSummary:
    """In threads of this process, as many as the plan holds tiles."""
    cluster = ClusterOptions(dashboard_address=None, processes=False)
    settings: dict[str, Any] = {"core": 64, "memory": "8GB", "device": "cpu", "engine": "torch", "cluster": cluster}
    return predict(source, class_network(), out, **{**settings, **options})


@pytest.mark.system
def test_a_run_in_batches_equals_the_whole_image(tmp_path: Path) -> None:
    source = scene(tmp_path, 331, 203, nodata=True)
    summary = run_here(source, tmp_path / "o.zarr", batch=3)
    assert summary.failed_tiles == ()
    assert (summary.device, summary.device_peak_bytes) == ("cpu", 0)
    assert np.array_equal(stored(tmp_path / "o.zarr"), whole(class_network(), source))
    plan = read_header(tmp_path / "o.zarr")["plan"]
    assert (plan["batch"], plan["in_flight"]) == (3, 6)


@pytest.mark.system
def test_a_device_without_memory_stops_the_run_and_fails_no_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scene(tmp_path, 331, 203), tmp_path / "o.zarr"
    truth, calls = Forward.__call__, count()

    def forward(self: Forward, *arguments: Any, **options: Any) -> Any:
        if next(calls) >= 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return truth(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "__call__", forward)
        with pytest.raises(WorkerError, match=r"worker .* no memory left for 3 x .* then the same command goes on"):
            run_here(source, out, batch=3)
    summary = run_here(source, out, batch=3)
    assert summary.failed_tiles == ()
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_bfloat16_is_checked_against_its_own_kind_and_its_loss_is_told(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 131, 97), tmp_path / "o.zarr"
    network = class_network()
    settings: dict[str, Any] = {"core": 64, "memory": "4GB", "engine": "torch", "device": "cpu", "client": client}
    summary = predict(source, network, out, precision="bfloat16", **settings)
    check, loss = summary.start_check, summary.loss
    assert check is not None
    assert loss is not None
    assert (summary.precision, loss.precision, check.by) == ("bfloat16", "bfloat16", "torch in bfloat16")
    # Against float32 the loss would not pass for rounding; how far sums of bfloat16 in another order differ is the
    # processor's: with AMX as far as from float32.
    assert loss.max_abs > 1e-3 * loss.largest
    assert check.passed
    assert check.tolerance < 0.05 * loss.largest
    header = read_header(out)
    assert header["precision_loss"]["max_abs"] == loss.max_abs
    image = torch.from_numpy(open_raster(source).open_reader().read(Window(y=0, x=0, height=131, width=97)))[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(network.module)(image)[0].numpy()
    assert (stored(out) != expected).mean() < 0.01
    with pytest.raises(OutputError, match="precision bfloat16 there, float32 now"):
        predict(source, network, out, **settings)


def test_a_window_that_is_too_short_is_found_in_bfloat16_too(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scene(tmp_path, 259, 261)
    real = Network.needed_interval
    network = class_network()

    def short(self: Network, axis: int, wanted: Any) -> Any:
        needed = real(self, axis, wanted)
        return needed if wanted.length <= 64 - 1 else replace(needed, start=wanted.start, stop=wanted.stop)

    monkeypatch.setattr("outsize.tiler.planning.spans.Network.needed_interval", short)
    with pytest.raises(ExactnessError, match="differ from larger windows"):
        predict(
            source,
            network,
            tmp_path / "o.zarr",
            precision="bfloat16",
            core=128,
            memory="4GB",
            engine="torch",
            device="cpu",
            client=client,
        )


def test_a_window_is_predicted_on_the_device_that_is_named(tmp_path: Path) -> None:
    source = scene(tmp_path, 65, 67)
    raster, window = open_raster(source), Window(y=3, x=5, height=31, width=29)
    part = predict_window(raster, class_network(), window, engine="torch", device="cpu")
    assert np.array_equal(part, whole(class_network(), source)[:, 3:34, 5:34])
    with pytest.raises(UsageError, match="device must be"):
        predict_window(raster, class_network(), window, device="abacus")
