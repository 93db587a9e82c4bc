"""1:1 verification: true accept rates at false accept rates over all pairs, and accuracy on lists of pairs in folds.

A pair is accepted where score > threshold. The threshold of a false accept rate f among M impostor pairs is the score
that floor(f M) of them exceed at most: the impostor score at that place from the top. Scores equal to it are rejected,
of impostors and of genuine pairs, so that the rate is never above f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ..base.errors import HeadError
from ..gallery.top_k import Floats, Numbers
from .order_statistics import Keys, count_first, first_edges, keys_of, score_of, select_from_top

BLOCK = 1024
"""Pictures on each side of a block of pairs."""
RATES = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
EXPECTED = 10
"""False accepts that a rate must allow before what is measured there is believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtRate:
    """What happens at a rate of false accepts."""

    rate: float
    allowed: int
    """False accepts: floor(rate x pairs)."""
    threshold: float | None
    """None: not one false accept is allowed, so that these pairs cannot tell."""
    false_accepts: int
    """Fewer than allowed only where scores are equal."""
    true_accept_rate: float | None
    is_sure: bool
    """Whether at least 10 false accepts are allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairVerification:
    """All pairs of a set of pictures."""

    genuine_pairs: int
    impostor_pairs: int
    points: list[AtRate]
    genuine: Numbers
    """Pairs by the first digit of their score."""
    impostor: Numbers

    def curve(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(false accept rates, true accept rates), rising, with a threshold at each bin's lower edge."""
        return (
            np.cumsum(self.impostor[::-1]) / self.impostor_pairs,
            np.cumsum(self.genuine[::-1]) / self.genuine_pairs,
        )

    def histogram(self, bins: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(edges, shares of genuine pairs, shares of impostor pairs) over the scores that occur."""
        edges = first_edges()
        used = np.flatnonzero(self.genuine + self.impostor)
        low, high = float(edges[used[0]]), float(edges[min(used[-1] + 1, len(edges) - 1)])
        genuine, cuts = np.histogram(edges, bins, (low, high), weights=self.genuine.astype(np.float64))
        impostor, _ = np.histogram(edges, bins, (low, high), weights=self.impostor.astype(np.float64))
        return cuts, genuine / self.genuine_pairs, impostor / self.impostor_pairs


def allow(rate: str, pairs: int) -> int:
    """floor(rate x pairs), of the rate as it is written."""
    return int(Fraction(rate) * pairs)


def parse_rates(texts: Sequence[str]) -> list[str]:
    """Raises:
    HeadError: one is no number between 0 and 1.
    """
    for text in texts:
        try:
            good = 0 < Fraction(text) < 1
        except (ValueError, ZeroDivisionError):
            good = False
        if not good:
            raise HeadError(f"a rate must be a number between 0 and 1, such as 1e-4, got {text!r}")
    return list(texts)


def count_blocks(pictures: int) -> int:
    """Blocks of pairs of two persons that `measure_verification` looks at, in its three passes."""
    side = -(-pictures // BLOCK)
    return 3 * side * (side + 1) // 2


def measure_verification(
    unit: Floats,
    labels: npt.NDArray[np.integer],
    rates: Sequence[str] = RATES,
    *,
    tell: Callable[[int], None] | None = None,
) -> PairVerification:
    """Compare all pairs of pictures, each once, three times over; N^2 scores are never held.

    Scores are float64 products, rounded to multiples of 2^-48.

    Args:
        unit: (N, D) of length 1.
        labels: (N,): the person of each.
        rates: of false accepts, as written.
        tell: gets how many blocks more were looked at, `count_blocks` in all; fewer where no rate can be told.

    Raises:
        HeadError: there is no pair of one person, or none of two.
    """
    order = np.argsort(labels, kind="stable")
    pairs = _Pairs(unit[order], np.asarray(labels)[order], tell)
    if not pairs.genuine or not pairs.impostors:
        raise HeadError(
            f"verification needs two persons, and one with two pictures, got {len(np.unique(labels))} persons with "
            f"{pairs.genuine} pairs of one person"
        )
    genuine = sum((count_first(keys) for keys in pairs.same()), np.zeros(1, np.int64))
    impostor = sum((count_first(keys) for keys in pairs.different()), np.zeros(1, np.int64))
    allowed = [allow(rate, pairs.impostors) for rate in rates]
    known = [count for count in allowed if count]
    placed = dict(zip(known, select_from_top(impostor, pairs.different, known), strict=True)) if known else {}
    cuts = sorted({place.key for place in placed.values()})
    accepted = dict.fromkeys(cuts, 0)
    for keys in pairs.same():
        for cut in cuts:
            accepted[cut] += int(np.count_nonzero(keys > cut))
    points = [
        AtRate(
            rate=float(Fraction(rate)),
            allowed=count,
            threshold=score_of(placed[count].key) if count else None,
            false_accepts=placed[count].above if count else 0,
            true_accept_rate=accepted[placed[count].key] / pairs.genuine if count else None,
            is_sure=count >= EXPECTED,
        )
        for rate, count in zip(rates, allowed, strict=True)
    ]
    return PairVerification(
        genuine_pairs=pairs.genuine, impostor_pairs=pairs.impostors, points=points, genuine=genuine, impostor=impostor
    )


class _Pairs:
    """Blocks of pairs i < j of pictures in the order of persons, as keys."""

    def __init__(self, unit: Floats, labels: npt.NDArray[np.integer], tell: Callable[[int], None] | None) -> None:
        self._unit, self._labels, self._tell = unit, labels, tell
        count = len(labels)
        _, each = np.unique(labels, return_counts=True)
        self.genuine = int((each * (each - 1) // 2).sum())
        self.impostors = count * (count - 1) // 2 - self.genuine

    def same(self) -> Iterator[Keys]:
        """Pairs of one person."""
        for rows, columns in self._blocks():
            # In the order of persons, only blocks about the diagonal have any.
            if self._labels[rows][-1] >= self._labels[columns][0]:
                keys, same = self._keys(rows, columns)
                yield keys[same & self._counts(rows, columns)]

    def different(self) -> Iterator[Keys]:
        """Pairs of two persons."""
        for rows, columns in self._blocks():
            keys, same = self._keys(rows, columns)
            mixed = self._labels[rows][-1] >= self._labels[columns][0]
            yield keys[~same & self._counts(rows, columns)] if mixed else keys
            if self._tell is not None:
                self._tell(1)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        starts = range(0, len(self._labels), BLOCK)
        for row in starts:
            wide = slice(row, row + BLOCK)
            for column in starts:
                if column >= row:
                    yield wide, slice(column, column + BLOCK)

    def _keys(self, rows: slice, columns: slice) -> tuple[Keys, npt.NDArray[np.bool_]]:
        scores = self._unit[rows].astype(np.float64) @ self._unit[columns].astype(np.float64).T
        return keys_of(scores), self._labels[rows][:, None] == self._labels[columns][None, :]

    def _counts(self, rows: slice, columns: slice) -> npt.NDArray[np.bool_]:
        """i < j: of a pair the one order."""
        i = np.arange(len(self._labels))[rows]
        j = np.arange(len(self._labels))[columns]
        return i[:, None] < j[None, :]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldAccuracy:
    """Accuracy of each fold with the threshold of the others."""

    accuracies: list[float]
    thresholds: list[float]
    pairs: int

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def standard_error(self) -> float:
        """Of the mean, from the folds' spread."""
        return float(np.std(self.accuracies, ddof=1) / len(self.accuracies) ** 0.5)


def measure_folds(
    scores: npt.NDArray[np.float64], same: npt.NDArray[np.bool_], folds: npt.NDArray[np.integer]
) -> FoldAccuracy:
    """Accuracy in each fold, with the threshold that is best on all others: half-way between two scores there; of
    equally good ones the lowest.

    Raises:
        HeadError: fewer than two folds.
    """
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise HeadError(f"accuracy in folds needs at least 2 folds, got {len(numbers)}")
    accuracies, thresholds = [], []
    for number in numbers:
        test = folds == number
        threshold = find_threshold(scores[~test], same[~test])
        accuracies.append(float(np.mean((scores[test] > threshold) == same[test])))
        thresholds.append(threshold)
    return FoldAccuracy(accuracies=accuracies, thresholds=thresholds, pairs=len(scores))


def find_threshold(scores: npt.NDArray[np.float64], same: npt.NDArray[np.bool_]) -> float:
    """The threshold that puts most pairs right, among all."""
    values, which = np.unique(scores, return_inverse=True)
    ours = np.bincount(which, weights=same, minlength=len(values))
    theirs = np.bincount(which, weights=~same, minlength=len(values))
    # Threshold t of len(values) + 1 rejects the t lowest values.
    right = np.concatenate([[0], np.cumsum(theirs)]) + ours.sum() - np.concatenate([[0], np.cumsum(ours)])
    best = int(np.argmax(right))
    if best == 0:
        return float(values[0]) - 1
    return float(values[-1]) if best == len(values) else float((values[best - 1] + values[best]) / 2)
