"""What fewer bits cost: the same pixels in float32 and in less, compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..rasters.nodata import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionLoss:
    """How far a network of fewer bits is from the same network in float32."""

    precision: str
    pixels: int
    """Valid ones that were compared."""
    flipped: int
    """Whose class is another: the largest logit's channel, or of one channel the side of its bound or the value."""
    compared: str
    """"logits", or "output" for a network that shows no logits."""
    max_abs: float
    """Largest absolute difference."""
    mean_abs: float
    largest: float
    """Largest absolute value in float32."""
    held_out: int
    """Windows among what was compared that were not calibrated on."""

    @property
    def flipped_share(self) -> float:
        return self.flipped / self.pixels if self.pixels else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.__slots__}, "flipped_share": self.flipped_share}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PrecisionLoss:
        return cls(**{name: values[name] for name in cls.__slots__})

    def sentence(self) -> str:
        windows = f" and {self.held_out} windows not calibrated on" if self.held_out else ""
        return (
            f"{self.precision} against float32 by torch, {self.pixels} px of the check's patches{windows}: "
            f"{100 * self.flipped_share:.3g} % of pixels flipped, largest difference of {self.compared} "
            f"{self.max_abs:.2g}, mean {self.mean_abs:.2g} (largest {self.largest:.3g})"
        )


Pair = tuple[Array, Array, Array, Array, Array]
"""(finished, logits, finished in float32, logits in float32), each (channels, h, w); valid pixels (h, w)."""


def compare_with_float32(
    pairs: Iterable[Pair], *, precision: str, has_logits: bool, held_out: int, bound: float | None = None
) -> PrecisionLoss:
    """Compare pixel by pixel what valid pixels became in few bits and in float32.

    Args:
        bound: of the one channel that decides between two classes.
    """
    pixels, flipped, max_abs, total, values, largest = 0, 0, 0.0, 0.0, 0, 0.0
    for finished, logits, expected_finished, expected, valid in pairs:
        if len(expected) == 1 and bound is not None:
            other = (logits[0] > bound) != (expected[0] > bound)
        elif len(expected) > 1 and has_logits:
            other = logits.argmax(0) != expected.argmax(0)
        elif finished.dtype.kind == "f":
            other = np.zeros(valid.shape, bool)
        else:
            other = (finished != expected_finished).any(axis=0)
        with np.errstate(invalid="ignore"):
            difference = np.abs(logits[:, valid].astype(np.float64) - expected[:, valid])
            sizes = np.abs(expected[:, valid].astype(np.float64))
        finite = np.isfinite(difference)
        pixels += int(valid.sum())
        flipped += int((other & valid).sum())
        max_abs = max(max_abs, float(difference[finite].max(initial=0.0)))
        total, values = total + float(difference[finite].sum()), values + int(finite.sum())
        largest = max(largest, float(sizes[np.isfinite(sizes)].max(initial=0.0)))
    return PrecisionLoss(
        precision=precision,
        pixels=pixels,
        flipped=flipped,
        compared="logits" if has_logits else "output",
        max_abs=max_abs,
        mean_abs=total / values if values else 0.0,
        largest=largest,
        held_out=held_out,
    )
