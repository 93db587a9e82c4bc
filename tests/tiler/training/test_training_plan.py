"""Plans of training: the budget is kept, in processes of their own; gradients do not depend on the plan."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from outsize.tiler.base.errors import BudgetError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.base.text import MB, parse_bytes
from outsize.tiler.training.memory import count_tile_bytes
from outsize.tiler.training.plan import TrainPlan
from outsize.tiler.training.planner import TrainedImages, choose_training_tiles, plan_training
from outsize.tiler.training.tiled_autograd import tile_checkpoint
from outsize.tiler.training.trainable import TrainableNetwork

from ...support.whole_gradients import analysed, draw, gradients_of, largest_difference, plan_of, run_whole

pytestmark = pytest.mark.system

NETWORK = "convolution"
"""The fastest to plan."""
ON_DISK = (3, 2001, 1503)


@pytest.fixture(autouse=True)
def _same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds changes from test to test."""
    monkeypatch.setattr("outsize.tiler.training.planner.process_bytes", lambda: 1000 * MB)


def total_of(plan: TrainPlan) -> int:
    assert plan.memory is not None
    return plan.memory.total_bytes


def test_a_larger_budget_gives_larger_tiles_and_less_work_and_every_budget_is_kept() -> None:
    network = analysed(NETWORK)
    least = total_of(plan_training(ON_DISK, network, core=32, memory="1TB"))
    plans = [plan_training(ON_DISK, network, memory=least + more * MB) for more in (0, 60, 400, 60_000)]
    cores = [plan.core[0] for plan in plans]
    assert cores == sorted(set(cores))
    assert cores[-1] == max(ON_DISK)
    assert plans[-1].overlap == pytest.approx(1)
    assert [plan.overlap for plan in plans] == sorted((plan.overlap for plan in plans), reverse=True)
    for plan in plans:
        assert total_of(plan) <= (plan.memory_budget_bytes or 0)
        assert sum(core.pixels for core in plan.cores) == 2001 * 1503


def test_the_least_budget_that_a_refusal_names_suffices() -> None:
    network = analysed(NETWORK)
    for core in (None, 512):
        with pytest.raises(BudgetError, match=r"memory must be at least .* got 100 MB; give as much") as refused:
            plan_training(ON_DISK, network, memory="100MB", core=core)
        found = re.search(r"at least ([\d.]+ [MG]B) for cores of (\d+) px \(process", str(refused.value))
        assert found is not None
        assert int(found[2]) == (core or 32)
        assert "or a core of" not in str(refused.value)
        # This process holds 1 GB of other things, which count.
        assert parse_bytes(found[1]) > 1000 * MB
        plan_training(ON_DISK, network, memory=found[1], core=core)
    between = total_of(plan_training(ON_DISK, network, core=200, memory="1TB"))
    with pytest.raises(BudgetError, match=r"give as much, or a core of 192 px$"):
        plan_training(ON_DISK, network, memory=between, core=1000, cuts=())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": 0}, r"core must be >= 1, got 0"),
        ({"memory": None}, r"a plan needs a memory budget or a core, got neither"),
        ({"raster": (4, 10, 10)}, r"the network takes 3 bands, the image has 4"),
        ({"raster": (3, 0, 10)}, r"each >= 1, got \(3, 0, 10\)"),
        ({"cuts": (3, 2)}, r"cuts must be positions > 0 in rising order"),
        ({"memory": "much"}, r"a memory size must look like"),
    ],
)
def test_a_wrong_wish_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_training(**{"raster": ON_DISK, "network": analysed(NETWORK), **options})  # pyright: ignore[reportArgumentType]


def test_cuts_and_tiles_that_a_plan_chooses_give_the_whole_images_gradient() -> None:
    network, shape = analysed("unet depth 2"), (91, 83)
    image = draw(3, *shape).requires_grad_()
    whole = run_whole(network, image)
    direction = draw(*whole.shape, seed=2)
    expected = gradients_of(whole, image, network, direction)
    trainable = TrainableNetwork(network)
    core = Window.whole(shape)
    uncut = plan_training(image, network, core=91, cuts=(), memory="1TB", keep_output=True)
    cut = plan_training(image, network, core=91, memory=total_of(uncut) - 1, keep_output=True)
    assert uncut.cuts == ()
    assert len(cut.cuts) > 0
    assert total_of(cut) < total_of(uncut)
    assert count_tile_bytes(trainable, shape, core, cut.cuts) < count_tile_bytes(trainable, shape, core)
    small = plan_training(image, network, core=40, memory="1TB", keep_output=True)
    found: list[list[torch.Tensor]] = []
    for plan in (uncut, cut, small):
        tiled = tile_checkpoint(network, plan)(image)
        found.append(gradients_of(tiled, image, network, direction))
        assert largest_difference(found[-1], expected) < 1e-11
    # Computing a part again changes no more than rounding.
    assert largest_difference(found[0], found[1]) < 1e-14


def test_a_tile_at_an_edge_is_counted_where_it_needs_most() -> None:
    """Padding on one side is a copy, which an inner tile does without, though its window is larger."""
    network = analysed(NETWORK)
    plan = plan_training((3, 500, 500), network, core=100, cuts=(), memory="1TB")
    assert plan.memory is not None
    trainable = TrainableNetwork(network)
    counts = [count_tile_bytes(trainable, (500, 500), core) for core in plan.cores]
    inner = count_tile_bytes(trainable, (500, 500), Window(y=200, x=200, height=100, width=100))
    assert max(counts) > inner
    images = TrainedImages(shape=(3, 500, 500), cache_bytes=0, is_sampled=True)
    anywhere = choose_training_tiles(trainable, images, memory="1TB", sides=[100], cuts=())
    assert anywhere.memory is not None
    assert anywhere.memory.tile_bytes >= plan.memory.tile_bytes
    # What is counted grows with the pixels, and is as much as forward keeps and backward makes at least.
    larger = count_tile_bytes(trainable, (500, 500), Window(y=100, x=100, height=200, width=200))
    assert 3.5 * inner < larger < 4.5 * inner


def test_plans_say_what_they_decided() -> None:
    network = analysed(NETWORK)
    text = plan_training(ON_DISK, network, core=300, memory="9GB", cuts=(3, 9)).explain()
    for words in ("2001 x 1503 px, 3 bands", "42 (7 x 6), core 300 x 300", "in 3 parts, each again in backward"):
        assert words in text
    assert re.search(r"predicted peak, budget 9\.00 GB \(process .* weights .* tile .* images", text)
    unplanned = plan_of(network, (20, 30), (8, 8))
    assert "everything kept for backward" in unplanned.explain()
    assert "memory" not in unplanned.explain()


_APART = """
import json, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import outsize, torch
def high():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
module = outsize.as_tile_network(outsize.load_model(), output="logits")
network = outsize.analyze_network(module, bands=4, dtype="uint8")
shape, found = (4, 230, 240), []
image = torch.randint(0, 255, shape, dtype=torch.uint8)
labels = torch.randint(0, 6, shape[1:], dtype=torch.uint8)
optimiser = torch.optim.AdamW(module.parameters())
uncut = outsize.plan_training(image, network, core=230, cuts=(), memory="2GB")
cut = outsize.plan_training(image, network, core=230, memory=uncut.memory.total_bytes - 1)
small = outsize.plan_training(image, network, core=100, memory="2GB")
for plan in (small, cut, uncut):
    Path("/proc/self/clear_refs").write_text("5")
    outsize.tile_loss(network, plan, outsize.CrossEntropy(), image, labels).backward()
    optimiser.step()
    found.append([high(), plan.memory.total_bytes, len(plan.cuts)])
print(json.dumps(found))
"""


@pytest.mark.long
def test_steps_in_a_loop_of_ones_own_take_no_more_than_was_predicted() -> None:
    done = subprocess.run([sys.executable, "-c", _APART], capture_output=True, text=True, check=True)
    small, cut, uncut = json.loads(done.stdout)
    for measured, predicted, _ in (small, cut, uncut):
        assert measured <= predicted
        assert predicted < 1.25 * measured
    assert cut[2] > 0 == uncut[2]
    # What computing again saves is there to be seen.
    assert cut[0] < uncut[0] - 15 * MB
    assert small[0] < uncut[0] - 15 * MB
