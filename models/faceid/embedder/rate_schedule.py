"""The learning rates of a training, as a share of the highest: a linear warm-up, then a cosine, steps, or no change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..base.errors import HeadError

KINDS = ("cosine", "steps", "constant")
FALL = 0.1
"""Of "steps": by which the rate is multiplied at each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSchedule:
    """share(step) = min(1, (step + 1) / warm_up) times: (1 + cos(pi p)) / 2, 0.1^(falls until p), or 1, where p is the
    share of the steps after the warm-up that are done."""

    kind: str
    steps: int
    warm_up: int
    falls: tuple[float, ...] = (0.5, 0.75, 0.9)
    """Of "steps": shares of all steps after which the rate falls."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise HeadError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.steps < 1 or not 0 <= self.warm_up <= self.steps:
            raise HeadError(f"the warm-up must be 0 ... {self.steps} steps, all there are, got {self.warm_up}")
        if not all(0 < fall < 1 for fall in self.falls):
            raise HeadError(f"falls are shares of the training between 0 and 1, got {', '.join(map(str, self.falls))}")

    def share(self, step: int) -> float:
        """Of the step that comes after `step` others."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / max(1, self.steps - self.warm_up)))
        if self.kind == "steps":
            return FALL ** sum(step >= fall * self.steps for fall in self.falls)
        return 1.0
