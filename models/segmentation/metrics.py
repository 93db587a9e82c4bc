"""Confusion counts and the scores that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Pixel counts of (true class, predicted class); adding two gives the counts of both."""

    counts: npt.NDArray[np.int64]
    """(classes, classes), rows true, columns predicted."""

    @classmethod
    def count(
        cls, truth: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8], classes: int, ignore: int = 255
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
        hits = np.diag(self.counts).astype(np.float64)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return [float(h / u) if u else float("nan") for h, u in zip(hits, union, strict=True)]

    @property
    def mean_iou(self) -> float:
        """Mean of the classes' IoU, over the classes that occur."""
        values = np.asarray(self.iou)
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
