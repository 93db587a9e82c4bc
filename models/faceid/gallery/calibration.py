"""Calibration: how like somebody in a gallery strangers are, and the threshold that a rate of false alarms needs.

Strangers are faces that are in no gallery, or persons of the gallery, each compared with all others.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..base.collectives import Ranks
from ..base.errors import HeadError
from .files import Calibration
from .lookup import Lookup, unit_vectors
from .search import Tell
from .state import GalleryState
from .top_k import NOBODY, unit_rows

PROBES = 1000
"""Persons that are compared with all others to learn how like strangers are."""
EXPECTED = 10
"""Strangers that must be expected beyond a threshold before its rate is believed."""
_ALONE = Ranks(group=None, rank=0, size=1)


def compare_strangers(
    state: GalleryState, lookup: Lookup, strangers: npt.ArrayLike, tell: Tell | None = None
) -> Calibration:
    """The best score of each stranger with anybody.

    Args:
        strangers: (faces, dim) of persons who are not in the gallery.

    Raises:
        HeadError: there is nobody to compare.
    """
    best = lookup.search(state, unit_vectors(strangers, state.manifest.dim), 1, _ALONE, tell)
    return _sort(best.scores[:, 0], of="strangers")


def compare_enrolled(
    state: GalleryState, lookup: Lookup, probes: int = PROBES, tell: Tell | None = None
) -> Calibration:
    """The best score with anybody else of one template of each of up to `probes` persons, spread evenly over them.

    Raises:
        HeadError: there is nobody to compare.
    """
    unit, own = _choose_probes(state, probes)
    best = lookup.search(state, unit, 2, _ALONE, tell)
    return _sort(np.where(best.owners[:, 0] == own, best.scores[:, 1], best.scores[:, 0]), of="enrolled")


def _sort(scores: npt.NDArray[np.float64], of: str) -> Calibration:
    scores = np.sort(scores[np.isfinite(scores)])[::-1]
    if not len(scores):
        raise HeadError("a calibration needs faces that can be compared with another person's, got none")
    return Calibration(scores=scores.tolist(), of=of)


def _choose_probes(state: GalleryState, probes: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """(unit vectors, whose): the first template of some persons."""
    whose, first = np.unique(state.owners, return_index=True)
    whose, first = whose[whose != NOBODY], first[whose != NOBODY]
    chosen = np.unique(np.linspace(0, len(whose) - 1, min(probes, len(whose))).astype(np.int64))
    order = chosen[np.argsort(first[chosen])]
    rows = [state.rows.read_row(int(row)) for row in first[order]]
    if not rows:
        return np.empty((0, state.manifest.dim), np.float32), whose
    return unit_rows(np.stack(rows)), whose[order]


def find_threshold(calibration: Calibration, fpir: float) -> float:
    """The threshold beyond which at most fpir n of the calibration's n scores lie.

    Raises:
        HeadError: it has too few scores: 10 must be expected beyond.
    """
    count = len(calibration.scores)
    if fpir * count < EXPECTED:
        raise HeadError(
            f"a rate of {fpir:g} needs a calibration of at least {int(np.ceil(EXPECTED / fpir)):,} faces, "
            f"{describe_rates(calibration)}"
        )
    return calibration.scores[int(fpir * count + 1e-9)]  # scores equal to it are rejected too


def describe_rates(calibration: Calibration | None) -> str:
    """Which rates a calibration knows thresholds of, in words."""
    count = len(calibration.scores) if calibration else 0
    lowest = _round_up(EXPECTED / count) if count else 1.0
    then = f"take a rate from {lowest:g} on" if lowest < 1 else "give a threshold"
    return f"this one has {count:,}; calibrate with more strangers, or {then}"


def find_rate(calibration: Calibration, score: float) -> float:
    """The share of the calibration's strangers who have such a score with somebody, or a higher one."""
    scores = np.array(calibration.scores)
    return float(np.count_nonzero(scores >= score) / len(scores))


def _round_up(number: float) -> float:
    """To two digits."""
    unit = 10 ** (np.floor(np.log10(number)) - 1)
    return float(np.ceil(number / unit - 1e-9) * unit)
