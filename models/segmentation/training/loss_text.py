"""Losses by their names: "cross-entropy", "dice", "binary", added ones, or a sum such as "cross-entropy+0.5*dice"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ....tiler.base.errors import UsageError
from ....tiler.base.registry import Registry, takes
from ....tiler.labels.labels import UNLABELLED
from ....tiler.training.loss import Loss
from .losses import SumOfLosses

OF_NUMBERS = ("mse", "huber")
WEIGHT = "weight"
"""Argument of the losses that class weights go to."""


class NamedLoss(Protocol):
    """A class of losses, or a function that makes one: called with the label that does not count, it gives a `Loss`
    over class numbers.

    Where it takes `weight` too, a number for each class, `--class-weights` are for it.
    """

    separable: bool
    """As of `Loss`."""

    def __call__(self, *, ignore_index: int) -> Loss: ...

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        """As `Loss.select`."""
        ...

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """As `Loss.sums`."""
        ...

    def value(self, sums: Tensor) -> Tensor:
        """As `Loss.value`."""
        ...


LOSSES: Registry[Any] = Registry(
    "loss",
    "outsize.losses",
    {
        "cross-entropy": "outsize.models.segmentation.training.losses:CrossEntropy",
        "dice": "outsize.models.segmentation.training.losses:Dice",
        "binary": "outsize.models.segmentation.training.losses:OneAgainstAll",
    },
    protocol=NamedLoss,
)
"""`NamedLoss` by the names of `--loss`."""


def parse_loss(text: str, class_weights: Sequence[float] = ()) -> Loss:
    """The loss of that name, over pixels that have a class.

    Args:
        class_weights: of the classes in cross-entropy, and in added losses that take a `weight`; empty: all 1.

    Raises:
        UsageError: another name, or weights for a loss that takes none.
    """
    losses: list[Loss] = []
    factors: list[float] = []
    is_weighted = False
    for term in text.split("+"):
        factor, sign, name = term.strip().rpartition("*")
        name = name.strip()
        try:
            factors.append(float(factor) if sign else 1.0)
        except ValueError:
            name = ""
        if name in OF_NUMBERS:
            raise UsageError(
                f"{name} is a loss of numbers, and labels are classes here; train numbers in a loop of your own: "
                "outsize.tile_loss with outsize.SquaredLoss or outsize.HuberLoss"
            )
        if name not in LOSSES.names() or not factors[-1] > 0:
            raise UsageError(
                f"a loss must be {', '.join(LOSSES.names())}, or a sum such as cross-entropy+0.5*dice, got {text!r}"
            )
        weight = {WEIGHT: tuple(class_weights)} if class_weights and takes(LOSSES.find(name), WEIGHT) else {}
        is_weighted = is_weighted or bool(weight)
        losses.append(LOSSES.make(name, ignore_index=UNLABELLED, **weight))
    if class_weights and not is_weighted:
        raise UsageError(f"--class-weights are for cross-entropy, which {text} has not")
    if len(losses) == 1 and factors == [1.0]:
        return losses[0]
    return SumOfLosses(losses=tuple(losses), weights=tuple(factors))
