"""Small parts of a training: moments, average, optimiser and checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from outsize.models.segmentation.training.average import WeightAverage
from outsize.models.segmentation.training.checkpoint import TrainingState, load_state, save_state
from outsize.models.segmentation.training.metrics import Confusion
from outsize.models.segmentation.training.moments import Moments
from outsize.models.segmentation.training.recipe import Recipe
from outsize.models.segmentation.training.step import StepGradient
from outsize.models.segmentation.training.trainer import Trainer
from outsize.models.training.optimiser import (
    OptimiserName,
    load_optimiser,
    make_optimiser,
    optimiser_tensors,
    set_rate,
)
from outsize.tiler.base.errors import OutputError
from torch import nn


def test_merged_moments_are_those_of_all_pixels_also_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(1e7, [[0.5], [30.0]], (2, 10_007))
    total = Moments.none(2)
    for part in np.array_split(pixels, [1, 17, 17, 4000, 9999], axis=1):
        total += Moments.of(part)
    assert total.count == 10_007
    assert np.allclose(total.mean, pixels.mean(1), rtol=1e-14)
    assert np.allclose(total.deviation, pixels.std(1), rtol=1e-9)


def test_the_average_follows_its_definition_and_copies_buffers() -> None:
    network = nn.BatchNorm2d(3)
    average = WeightAverage(network, decay=0.9)
    expected = network.weight.detach().clone()
    for step in range(1, 120):
        with torch.no_grad():
            network.weight.add_(0.1)
        network.running_mean = torch.full((3,), float(step))
        average.update(network, step)
        decay = min(0.9, step / (9 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    assert torch.allclose(average.values["weight"], expected, rtol=1e-5)
    assert torch.equal(average.values["running_mean"], torch.full((3,), 119.0))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimiser_continues_bit_for_bit_from_its_tensors(name: OptimiserName, tmp_path: Path) -> None:
    def step(network: nn.Module, optimiser: torch.optim.Optimizer, number: int) -> None:
        set_rate(optimiser, 0.01 * (number + 1))
        optimiser.zero_grad()
        network(torch.full((1, 5), float(number))).square().sum().backward()
        optimiser.step()

    network = nn.Linear(5, 3)
    optimiser = make_optimiser(name, network.parameters(), 0.1)
    for number in range(3):
        step(network, optimiser, number)
    tensors = {**network.state_dict(), **{f"optimiser.{k}": v for k, v in optimiser_tensors(optimiser).items()}}
    save_state(tmp_path, TrainingState(step=3, tensors=tensors, values={"seconds": 1.5}))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    again = nn.Linear(5, 3)
    state = load_state(tmp_path)
    assert state is not None
    assert (state.step, state.values) == (3, {"seconds": 1.5})
    again.load_state_dict({key: state.tensors[key] for key in again.state_dict()})
    other = make_optimiser(name, again.parameters(), 0.1)
    load_optimiser(other, {k[10:]: v for k, v in state.tensors.items() if k.startswith("optimiser.")})
    for number in range(3, 6):
        step(network, optimiser, number)
        step(again, other, number)
    assert torch.equal(network.weight, again.weight)
    assert torch.equal(network.bias, again.bias)


def test_a_state_is_replaced_whole_and_damage_is_noticed(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for step in (1, 2):
        save_state(tmp_path, TrainingState(step=step, tensors={"a": torch.full((7,), float(step))}, values={}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000002.safetensors", "state.json"]
    # What a kill leaves before state.json is replaced: newer tensors that nothing names.
    (tmp_path / "state-00000003.safetensors").write_bytes(b"half")
    state = load_state(tmp_path)
    assert state is not None
    assert state.tensors["a"].tolist() == [2.0] * 7
    tensors = tmp_path / "state-00000002.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(OutputError, match="is damaged"):
        load_state(tmp_path)


def test_scores_follow_from_the_counts() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2, 255], np.uint8)
    found = np.array([0, 0, 1, 1, 0, 0, 1], np.uint8)
    confusion = Confusion.count(truth, found, 4)
    assert confusion.precision == pytest.approx([2 / 4, 1 / 2, np.nan, np.nan], nan_ok=True)
    assert confusion.recall == pytest.approx([2 / 3, 1 / 2, 0, np.nan], nan_ok=True)
    assert confusion.f1 == pytest.approx([4 / 7, 1 / 2, 0, np.nan], nan_ok=True)
    assert confusion.iou == pytest.approx([2 / 5, 1 / 3, 0, np.nan], nan_ok=True)
    assert confusion.mean_f1 == pytest.approx((4 / 7 + 1 / 2) / 3)
    assert confusion.accuracy == pytest.approx(3 / 6)


def test_shared_weights_learn_by_whichever_name_their_gradient_has() -> None:
    """The trace takes the last name of a weight that two layers share, named_parameters the first."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).square().sum()

    torch.manual_seed(0)
    x, ours, theirs = torch.rand(1, 2, 3, 3), Shared(), Shared()
    theirs.load_state_dict(ours.state_dict())

    def compute(_: object) -> StepGradient:
        (gradient,) = torch.autograd.grad(ours(x), [ours.second.weight])
        return StepGradient(loss=0.0, gradients={"second.weight": gradient}, pixels=1)

    recipe = Recipe(optimiser="sgd", rate=1e-2, warm_up=0, clip=0, steps=5, weight_decay=0)
    trainer = Trainer(ours, recipe, lambda _: [], compute)
    optimiser = make_optimiser("sgd", theirs.parameters(), 0)
    for step in range(5):
        rate = trainer.learning_rate.rate(step, trainer.progress)
        trainer.make_step()
        set_rate(optimiser, rate)
        optimiser.zero_grad()
        theirs(x).backward()
        optimiser.step()
    assert torch.equal(ours.first.weight, theirs.first.weight)
    assert torch.equal(trainer.average.values["first.weight"], trainer.average.values["second.weight"])
