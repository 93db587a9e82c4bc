"""Confusion counts and the scores that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Pixel counts of (true class, predicted class); adding two gives the counts of both."""

    counts: npt.NDArray[np.int64]
    """(classes, classes), rows true, columns predicted."""

    @classmethod
    def count(
        cls,
        truth: npt.NDArray[np.unsignedinteger[Any]],
        predicted: npt.NDArray[np.unsignedinteger[Any]],
        classes: int,
        ignore: int = 255,
    ) -> Confusion:
        """Counts over the pixels where neither array holds `ignore`."""
        valid = (truth != ignore) & (predicted != ignore)
        index = truth[valid].astype(np.int64) * classes + predicted[valid]
        return cls(counts=np.bincount(index, minlength=classes * classes).reshape(classes, classes))

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(counts=self.counts + other.counts)

    @property
    def pixels(self) -> int:
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of pixels whose class is right (NaN without pixels)."""
        return float(np.trace(self.counts)) / self.pixels if self.pixels else float("nan")

    @property
    def iou(self) -> list[float]:
        """Intersection over union of each class; NaN for a class that is neither present nor predicted."""
        hits = np.diag(self.counts)
        return _ratios(hits, self.counts.sum(0) + self.counts.sum(1) - hits)

    @property
    def precision(self) -> list[float]:
        """Of each class: share of the pixels predicted as it that are it; NaN where it is never predicted."""
        return _ratios(np.diag(self.counts), self.counts.sum(0))

    @property
    def recall(self) -> list[float]:
        """Of each class: share of its pixels that are predicted as it; NaN where it is not present."""
        return _ratios(np.diag(self.counts), self.counts.sum(1))

    @property
    def f1(self) -> list[float]:
        """2 hits / (present + predicted) of each class, which is Dice; NaN where it is neither."""
        return _ratios(2 * np.diag(self.counts), self.counts.sum(0) + self.counts.sum(1))

    @property
    def mean_f1(self) -> float:
        """Mean of the classes' F1, over the classes that occur."""
        return _mean(self.f1)

    @property
    def mean_iou(self) -> float:
        """Mean of the classes' IoU, over the classes that occur."""
        return _mean(self.iou)


def _ratios(above: npt.NDArray[np.int64], below: npt.NDArray[np.int64]) -> list[float]:
    return [int(a) / int(b) if b else float("nan") for a, b in zip(above, below, strict=True)]


def _mean(scores: list[float]) -> float:
    values = np.asarray(scores)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
