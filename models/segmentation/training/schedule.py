"""The learning rate over a training: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ....tiler.base.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """rate(step, progress) = highest * min(1, (step + 1) / warm_up) * (1 + cos(pi progress)) / 2."""

    highest: float
    warm_up: int
    """Steps."""

    def __post_init__(self) -> None:
        if not (self.highest > 0 and math.isfinite(self.highest)) or self.warm_up < 0:
            raise UsageError(f"the learning rate must be > 0 and the warm-up >= 0, got {self.highest}, {self.warm_up}")

    def rate(self, step: int, progress: float) -> float:
        """Of the step that comes after `step` others.

        Args:
            progress: share of the training that is done, 0 to 1.
        """
        warm = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        return self.highest * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
