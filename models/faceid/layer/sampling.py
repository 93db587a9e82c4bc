"""Sampling: which rows of a tablet a step sees, a pure function of seed, step, tablet and labels; without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..base.errors import HeadError
from .tablets import Tablet, TabletLayout

STRIP_ROWS = 32
"""Rows that are drawn together: 32 KB at 512 half-precision numbers a row, read and written in one piece."""
DENOMINATORS = ("corrected", "pfc")
_MASK = (1 << 64) - 1
_STREAM = 0x9E6D62D06F6A9A9B
"""Half of the generator's key, which no other stream of the layer has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The rows of one tablet that a step sees."""

    places: npt.NDArray[np.int64]
    """Counted in the tablet, ascending."""
    weights: npt.NDArray[np.float64]
    """Of each in the sum of exponentials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """A share of each tablet's strips, drawn without replacement, and the rows of the batch's own classes.

    Of a tablet's S strips, k = share S rounded and at least 1 are seen, each set of k with the same probability. A row
    that is no sample's class is thus seen with probability k / S, whether or not its strip holds classes of the batch;
    these are seen with probability 1 and bring none of their strip along.
    """

    share: float
    denominator: str = "corrected"
    """"corrected": weights are 1 / probability, so that the sum of exponentials over the rows that are seen is, for a
    given batch, an unbiased estimate of that over all (Horvitz and Thompson 1952). "pfc": weights are 1, the softmax
    over the rows that are seen, as Partial FC (An et al. 2022)."""
    strip_rows: int = STRIP_ROWS

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise HeadError(f"sample must be above 0 and at most 1, got {self.share}")
        if self.denominator not in DENOMINATORS:
            raise HeadError(f"denominator must be one of {', '.join(DENOMINATORS)}, got {self.denominator!r}")
        if self.strip_rows < 1:
            raise HeadError(f"strip_rows must be >= 1, got {self.strip_rows}")

    def count_strips(self, tablet: Tablet) -> tuple[int, int]:
        """(k, S): strips that are drawn, of how many. The last strip may be shorter."""
        strips = -(-tablet.rows // self.strip_rows)
        return max(1, round(self.share * strips)), strips

    def most_rows(self, layout: TabletLayout, rank: int) -> int:
        """Rows of a rank in drawn strips, at most; rows of the batch's classes come in addition."""
        return sum(min(t.rows, self.count_strips(t)[0] * self.strip_rows) for t in layout.owned(rank))

    def draw(self, tablet: Tablet, classes: npt.NDArray[np.int64], *, seed: int, step: int) -> Drawn:
        """What a step sees of a tablet.

        Args:
            classes: of the global batch, ascending, each once; of any tablet.
        """
        drawn, strips = self.count_strips(tablet)
        counter = np.array([0, tablet.index, step, 0], dtype=np.uint64)
        key = np.array([seed & _MASK, _STREAM], dtype=np.uint64)
        # A key for each strip: those of the k smallest keys are as good as any other set of k.
        keys = np.random.Philox(counter=counter, key=key).random_raw(strips)
        chosen = np.sort(np.argsort(keys, kind="stable")[:drawn])
        places = (chosen[:, None] * self.strip_rows + np.arange(self.strip_rows)).ravel()
        own = classes[slice(*np.searchsorted(classes, (tablet.first, tablet.stop)))] - tablet.first
        places = np.union1d(places[places < tablet.rows], own)
        weights = np.ones(len(places))
        if self.denominator == "corrected":
            weights[:] = strips / drawn
            weights[np.searchsorted(places, own)] = 1
        return Drawn(places=places, weights=weights)
