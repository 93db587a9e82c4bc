"""Losses by their names: "cross-entropy", "dice", "binary", or a sum such as "cross-entropy+0.5*dice"."""

from __future__ import annotations

from collections.abc import Sequence

from ....tiler.base.errors import UsageError
from ....tiler.labels.labels import UNLABELLED
from ....tiler.training.loss import Loss
from .losses import CrossEntropy, Dice, OneAgainstAll, SumOfLosses

LOSSES = ("cross-entropy", "dice", "binary")
OF_NUMBERS = ("mse", "huber")


def parse_loss(text: str, class_weights: Sequence[float] = ()) -> Loss:
    """The loss of that name, over pixels that have a class.

    Args:
        class_weights: of the classes in cross-entropy; empty: all 1.

    Raises:
        UsageError: another name, or weights for a loss that takes none.
    """
    losses: list[Loss] = []
    factors: list[float] = []
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
        if name not in LOSSES or not factors[-1] > 0:
            raise UsageError(
                f"a loss must be {', '.join(LOSSES)}, or a sum such as cross-entropy+0.5*dice, got {text!r}"
            )
        if name == "dice":
            losses.append(Dice(ignore_index=UNLABELLED))
        elif name == "binary":
            losses.append(OneAgainstAll(ignore_index=UNLABELLED))
        else:
            losses.append(CrossEntropy(ignore_index=UNLABELLED, weight=tuple(class_weights) or None))
    if class_weights and not any(isinstance(loss, CrossEntropy) for loss in losses):
        raise UsageError(f"--class-weights are for cross-entropy, which {text} has not")
    if len(losses) == 1 and factors == [1.0]:
        return losses[0]
    return SumOfLosses(losses=tuple(losses), weights=tuple(factors))
