"""Mean and deviation of each band over any number of windows, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations of each band; `+` merges two by Chan's formula, in float64.

    delta = mean_b - mean_a; mean = mean_a + delta n_b / n; M2 = M2_a + M2_b + delta^2 n_a n_b / n (Chan et al. 1983).
    """

    count: int
    mean: Floats
    """(bands,)."""
    squares: Floats
    """(bands,): sum of (x - mean)^2."""

    @classmethod
    def none(cls, bands: int) -> Moments:
        return cls(count=0, mean=np.zeros(bands), squares=np.zeros(bands))

    @classmethod
    def of(cls, pixels: npt.NDArray[Any]) -> Moments:
        """Of (bands, pixels)."""
        values = pixels.astype(np.float64)
        if not values.shape[1]:
            return cls.none(values.shape[0])
        mean = values.mean(1)
        return cls(count=values.shape[1], mean=mean, squares=((values - mean[:, None]) ** 2).sum(1))

    def __add__(self, other: Moments) -> Moments:
        if not (self.count and other.count):
            return other if other.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * (other.count / count),
            squares=self.squares + other.squares + delta**2 * (self.count * other.count / count),
        )

    @property
    def deviation(self) -> Floats:
        """(bands,): of the whole population."""
        return np.sqrt(self.squares / max(1, self.count))
