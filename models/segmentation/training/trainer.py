"""The trainer: weights, optimiser and average, moved step by step; nothing of files or terminals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....tiler.base.errors import UsageError
from ...training.learning_rate import ProgressRate
from ...training.optimiser import load_optimiser, make_optimiser, optimiser_tensors, set_rate
from .average import WeightAverage
from .checkpoint import TrainingState
from .recipe import Recipe
from .sampling import TrainingTile
from .step import StepGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did."""

    step: int
    """How many were made with it."""
    loss: float
    """Before the step, a mean over the pixels that count."""
    rate: float
    gradient_norm: float
    """Before clipping, of all parameters together."""
    pixels: int
    """That counted in the loss."""
    tiles: int
    seconds: float


Draw = Callable[[int], Sequence[TrainingTile]]
ComputeGradient = Callable[[Sequence[TrainingTile]], StepGradient]


class Trainer:
    """Trains a network. The weights after n steps depend on the recipe, the first weights and n alone: a trainer that
    was loaded goes on with the same bits.

    Args:
        network: its parameters are changed; it stays in eval mode, so that dropout is off and batch norm keeps its
            statistics: a tile's gradient is then the whole image's. Names of gradients are those of its parameters.
        draw: the tiles of a step, a pure function of its number.
        compute: their gradient at the present weights.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, draw: Draw, compute: ComputeGradient) -> None:
        self.network, self.recipe = network.eval(), recipe
        self._draw, self._compute = draw, compute
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        every = network.named_parameters(remove_duplicate=False)
        self._names = {name: names[id(parameter)] for name, parameter in every if id(parameter) in names}
        """Of shared parameters the one name, by any of their names."""
        if not self.parameters:
            raise UsageError("the network has no parameter that can be learnt; give a model whose weights may change")
        self.optimiser = make_optimiser(recipe.optimiser, self.parameters.values(), recipe.weight_decay)
        self.learning_rate = ProgressRate(highest=recipe.rate, warm_up=recipe.warm_up)
        self.average = WeightAverage(network, recipe.average)
        self.step, self.seconds = 0, 0.0
        self.is_between_steps = True
        """Whether `state` belongs to one step, and not half to the next."""

    @property
    def progress(self) -> float:
        return min(1.0, self.recipe.progress(self.step, self.seconds))

    @property
    def is_done(self) -> bool:
        return self.recipe.is_done(self.step, self.seconds)

    def make_step(self) -> StepRecord:
        """Draw, compute, clip, update.

        Raises:
            UsageError: the gradient is not finite.
        """
        began = time.perf_counter()
        tiles = self._draw(self.step)
        found = self._compute(tiles)
        for name, gradient in found.gradients.items():
            parameter = self.parameters[self._names[name]]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
        if not norm < float("inf"):
            raise UsageError(
                f"the gradient of step {self.step + 1} is not finite (loss {found.loss:g}); lower --lr, or look for "
                "pixels of extreme values"
            )
        if self.recipe.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.recipe.clip, torch.tensor(norm))
        rate = self.learning_rate.rate(self.step, self.progress)
        self.is_between_steps = False
        set_rate(self.optimiser, rate)
        self.optimiser.step()
        self.step += 1
        self.average.update(self.network, self.step)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.is_between_steps = True
        for parameter in self.parameters.values():
            parameter.grad = None
        return StepRecord(
            step=self.step,
            loss=found.loss,
            rate=rate,
            gradient_norm=norm,
            pixels=found.pixels,
            tiles=len(tiles),
            seconds=seconds,
        )

    def state(self, values: Mapping[str, Any]) -> TrainingState:
        """All that a trainer of the same recipe needs to go on.

        Args:
            values: kept with it, plain JSON values.
        """
        parts: tuple[tuple[str, Mapping[str, Tensor]], ...] = (
            ("network", self.network.state_dict()),
            ("average", self.average.values),
            ("optimiser", optimiser_tensors(self.optimiser)),
        )
        tensors = {f"{part}.{name}": value for part, entries in parts for name, value in entries.items()}
        return TrainingState(step=self.step, tensors=tensors, values={**values, "seconds": self.seconds})

    def load(self, state: TrainingState) -> None:
        """Go on from there."""

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in state.tensors.items() if k.startswith(f"{name}.")}

        self.network.load_state_dict(part("network"))
        self.average.load(part("average"))
        load_optimiser(self.optimiser, part("optimiser"))
        self.step, self.seconds = state.step, float(state.values["seconds"])
