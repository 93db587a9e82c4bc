"""Learning rates over a training: a linear warm-up, then half a cosine, steps, or no change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...tiler.base.errors import UsageError

KINDS = ("cosine", "steps", "constant")
FALL = 0.1
"""Factor of the rate at each fall of "steps"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRate:
    """Rates of a training whose end may be a time: they follow the share of it that is done.

    rate(step, progress) = highest * min(1, (step + 1) / warm_up) * (1 + cos(pi progress)) / 2.
    """

    highest: float
    warm_up: int
    """Steps in which the rate rises."""

    def __post_init__(self) -> None:
        if not (self.highest > 0 and math.isfinite(self.highest)) or self.warm_up < 0:
            raise UsageError(f"the learning rate must be > 0 and the warm-up >= 0, got {self.highest}, {self.warm_up}")

    def rate(self, step: int, progress: float) -> float:
        """The rate of the step that comes after `step` others.

        Args:
            progress: share of the training that is done, 0 to 1.
        """
        return self.highest * _warm(step, self.warm_up) * _half_cosine(math.pi * min(1.0, progress))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRate:
    """Rates of a training of so many steps, as shares of the highest.

    share(step) = min(1, (step + 1) / warm_up) times: (1 + cos(pi p)) / 2, 0.1^(falls until p), or 1, where p is the
    share of the steps after the warm-up that are done.
    """

    kind: str
    steps: int
    warm_up: int
    falls: tuple[float, ...] = (0.5, 0.75, 0.9)
    """Shares of all steps after which the rate of "steps" falls."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.steps < 1 or not 0 <= self.warm_up <= self.steps:
            raise UsageError(f"the warm-up must be 0 ... {self.steps} steps, all there are, got {self.warm_up}")
        if not all(0 < fall < 1 for fall in self.falls):
            raise UsageError(f"falls are shares of the training between 0 and 1, got {', '.join(map(str, self.falls))}")

    def share(self, step: int) -> float:
        """The share of the step that comes after `step` others."""
        if step < self.warm_up:
            return _warm(step, self.warm_up)
        if self.kind == "cosine":
            return _half_cosine(math.pi * (step - self.warm_up) / max(1, self.steps - self.warm_up))
        if self.kind == "steps":
            return FALL ** sum(step >= fall * self.steps for fall in self.falls)
        return 1.0


def _warm(step: int, warm_up: int) -> float:
    return min(1.0, (step + 1) / warm_up) if warm_up else 1.0


def _half_cosine(angle: float) -> float:
    """1 at angle 0, 0 at pi."""
    return 0.5 * (1 + math.cos(angle))
