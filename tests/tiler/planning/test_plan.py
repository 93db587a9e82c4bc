"""Plans: pure functions whose tiles partition the output and whose windows hold what cores need."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from outsize.models.segmentation.networks.unet import UNet
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import BudgetError, UsageError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.base.text import format_seconds, parse_bytes
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.planning.planner import plan_tiles
from torch import nn

from ...support.analysed import analysed
from ...support.zoo import PlainUNet, alive


@cache
def default_network() -> Network:
    return analyze_network(UNet().eval(), bands=4)


SHAPES = [(1, 1), (7, 5003), (1025, 1023), (3000, 4099)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("core", [64, 256, 1024])
def test_windows_hold_what_their_cores_need(shape: tuple[int, int], core: int) -> None:
    network = default_network()
    plan = plan_tiles((4, *shape), network, core=core, memory="8GB")
    for at in plan.grid:
        tile = plan.tile(*at)
        assert tile.core == plan.grid.window(*at)
        assert tile.window.contains(network.input_window(tile.core, shape))
        assert Window.whole(network.padded_shape(shape)).contains(tile.window)
        assert tile.window.y % network.stride[0] == tile.window.x % network.stride[1] == 0
        assert (tile.crop.y + tile.window.y, tile.crop.x + tile.window.x) == (tile.core.y, tile.core.x)


@pytest.mark.parametrize("name", ["strided", "enlarged nearest", "plain unet", "cropped"])
def test_tiles_of_any_scale_agree_with_the_network(name: str) -> None:
    network = analysed(name)
    shape = (203, 310)
    plan = plan_tiles((3, *shape), network, core=64, memory="8GB")
    for at in plan.grid:
        tile = plan.tile(*at)
        rows, columns = tile.window.shape
        with torch.no_grad():
            result = network.module(torch.zeros(1, 3, rows, columns, dtype=torch.float64))
        assert tile.window.contains(network.input_window(tile.core, shape))
        assert Window.whole(tuple(result.shape[2:])).contains(tile.crop)


@pytest.mark.parametrize("core", [64, 512, 1024, 3072])
def test_every_tile_owns_whole_chunks(core: int) -> None:
    plan = plan_tiles((4, 5000, 7001), default_network(), core=core, memory="64GB")
    chunks = Grid(shape=plan.output_shape[1:], cell=plan.chunk)
    owners: dict[tuple[int, int], tuple[int, int]] = {}
    for at in plan.grid:
        for chunk in chunks.cells_touching(plan.grid.window(*at)):
            assert owners.setdefault(chunk, at) == at
    assert len(owners) == len(chunks)


def test_a_core_that_would_share_chunks_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of it"):
        plan_tiles((4, 5000, 5000), default_network(), core=1500, memory="64GB")


def test_a_plan_survives_json_and_is_the_same_each_time() -> None:
    plan = plan_tiles((4, 3000, 4099), default_network(), memory="3GB")
    assert TilePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan_tiles((4, 3000, 4099), default_network(), memory="3GB") == plan


def test_the_order_keeps_window_shapes_together_and_visits_every_tile_once() -> None:
    plan = plan_tiles((4, 4500, 5200), default_network(), core=1024, memory="8GB")
    order = list(plan.order())
    assert sorted(order) == list(plan.grid)
    shapes = [plan.tile(*at).window.shape for at in order]
    changes = sum(a != b for a, b in pairwise(shapes))
    assert changes + 1 == len(set(shapes)) == plan.geometries


def test_more_memory_never_means_smaller_cores_and_the_budget_is_kept() -> None:
    cores = []
    for budget in ("900MB", "1.1GB", "2GB", "3GB", "8GB", "32GB"):
        plan = plan_tiles((4, 30000, 30000), default_network(), memory=budget, engine="openvino", workers=1)
        assert plan.memory.total_bytes <= parse_bytes(budget)
        cores.append(plan.core[0])
    assert cores == sorted(cores)
    assert cores[0] < cores[-1]


@pytest.mark.system
def test_an_impossible_budget_is_refused_with_the_smallest_possible_one() -> None:
    with pytest.raises(BudgetError) as refusal:
        plan_tiles((4, 30000, 30000), default_network(), memory="100MB")
    smallest = re.search(r"at least ([0-9.]+ [GM]B)", str(refusal.value))
    assert smallest is not None
    plan_tiles((4, 30000, 30000), default_network(), memory=smallest[1])
    with pytest.raises(BudgetError):
        plan_tiles((4, 30000, 30000), default_network(), memory=parse_bytes(smallest[1]) - 2_000_000)


def test_wrong_bands_dtype_and_options_are_refused() -> None:
    network = default_network()
    with pytest.raises(UsageError, match="takes 4 bands, the raster has 3"):
        plan_tiles((3, 10, 10), network)
    with pytest.raises(UsageError, match="workers must be >= 1, got 0"):
        plan_tiles((4, 10, 10), network, workers=0)
    with pytest.raises(UsageError, match="each >= 1"):
        plan_tiles((4, 0, 10), network)
    with pytest.raises(UsageError, match="engine must be"):
        plan_tiles((4, 10, 10), network, engine="abacus")


def test_the_plan_explains_itself() -> None:
    plan = plan_tiles((4, 4096, 4096), default_network(), memory="2GB", engine="openvino", workers=1, threads=2)
    text = plan.explain(flops_per_s=1e11)
    for words in ("46 px", "stride of 8", "16 (4 x 4)", "core 1024", "predicted peak", "budget 2.00 GB", "82.0 kFLOP"):
        assert words in text
    assert "padded" in plan_tiles((3, 9, 9), analyze_network(alive(PlainUNet()), bands=3)).explain()


def test_the_precision_stands_in_the_plan() -> None:
    plan = plan_tiles((4, 300, 300), default_network(), engine="torch", precision="float32")
    assert plan.precision == plan.summarise()["precision"] == plan.to_json()["precision"] == "float32"
    assert "torch in float32 on cpu, " in plan.explain()
    before = {name: value for name, value in plan.to_json().items() if name != "precision"}
    assert TilePlan.from_json(before) == plan


def test_operations_are_counted_as_by_hand() -> None:
    network = analyze_network(nn.Conv2d(3, 5, 3, padding=1).eval(), bands=3)
    plan = plan_tiles((3, 10, 20), network)
    assert plan.flops_bare == 2 * 10 * 20 * 5 * 3 * 9


def test_durations_are_written_for_people() -> None:
    assert [format_seconds(s) for s in (0.04, 8.25, 75, 7500)] == ["0.0 s", "8.2 s", "1 min 15 s", "2 h 05 min"]


def test_every_section_of_a_plan_has_its_line_and_its_place() -> None:
    plan = plan_tiles((4, 4096, 4096), default_network(), memory="2GB", engine="openvino", workers=1, threads=2)
    plain = plan.explain().split("\n")
    assert " ".join(line.split()[0] for line in plain) == "raster output halo tiles overhead engine memory work"
    everything = replace(
        plan,
        size_multiple=32,
        region=(8, 16, 64, 128),
        read_amplification=7.0,
        block=(1, 4096),
        device="cuda",
        device_names=("A",),
        batch=3,
        receptive=(((0, 1),), ((0, 1),)),
    ).explain(flops_per_s=1e11)
    names = "raster padding region output halo tiles overhead reading engine memory device context work time"
    assert " ".join(line.split()[0] for line in everything.split("\n")) == names
    assert "\nregion    64 x 128 px from row 8, column 16\n" in everything
    assert ", batches of 3 windows\ncontext   pixels whose" in everything
    assert all(line[10] != " " == line[9] for line in everything.split("\n"))
