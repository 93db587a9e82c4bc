"""The recipe: all choices of a training that its trajectory follows from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ....tiler.base.errors import UsageError
from ...training.optimiser import OptimiserName
from .augmentation import Augmentation

StepKind: TypeAlias = Literal["image", "tiles"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What happens in each step, and for how long."""

    step: StepKind = "tiles"
    """image: the gradient of a whole scene; tiles: of some cores with their true context."""
    tiles: int = 8
    """Cores of a step of tiles."""
    loss: str = "cross-entropy"
    """As `parse_loss` reads it; empty: what goes with the network's channels."""
    class_weights: tuple[float, ...] = ()
    """Of the classes in the loss; empty: all 1."""
    optimiser: OptimiserName = "adamw"
    rate: float = 1e-3
    """Learning rate at its highest."""
    weight_decay: float = 1e-4
    warm_up: int = 50
    """Steps in which the rate rises."""
    average: float = 0.99
    """Decay of the average of the weights, which is what is validated and kept; 0: the weights themselves."""
    clip: float = 1.0
    """Largest norm of the gradient, of all parameters together; 0: any."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    steps: int | None = 1000
    """Steps in all; None: as many as `minutes` allow."""
    minutes: float | None = None
    """Of training, validation left out."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("a training lasts for --steps or for --minutes; give one of them")
        for name, value, least in (
            ("steps", self.steps, 1),
            ("tiles of a step", self.tiles, 1),
            ("weight decay", self.weight_decay, 0),
            ("warm-up", self.warm_up, 0),
            ("clip", self.clip, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be >= {least}, got {value}")
        if self.minutes is not None and self.minutes <= 0:
            raise UsageError(f"minutes must be > 0, got {self.minutes}")
        if not 0 <= self.average < 1:
            raise UsageError(f"the average's decay must be 0 to below 1, got {self.average}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the training that is done after so many steps, and seconds spent on them."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / (60 * self.minutes)

    def is_done(self, step: int, seconds: float) -> bool:
        return self.progress(step, seconds) >= 1


def parse_step(text: str) -> tuple[StepKind, int]:
    """ "image" or "tiles:N" -> (kind, N).

    Raises:
        UsageError: another word.
    """
    kind, sign, count = text.partition(":")
    if kind == "image" and not sign:
        return "image", 1
    if kind == "tiles" and (not sign or (count.isdigit() and int(count) > 0)):
        return "tiles", int(count) if sign else 8
    raise UsageError(f"a step must be image, or tiles:N with N > 0, got {text!r}")
