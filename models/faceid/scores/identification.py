"""1:N identification: who is first among all persons, and how strangers are told from those who are enrolled.

Known persons are enrolled with their first pictures and looked up with their others; strangers are looked up with all
of theirs. A face is named where score > threshold. The threshold of a false positive identification rate f among n
strangers' pictures is the best score that floor(f n) of them exceed at most, as in verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..base.collectives import Ranks
from ..base.errors import HeadError
from ..gallery.search import ArrayRows, Tell, count_passes, search_rows
from ..gallery.top_k import Floats, Numbers
from ..layer.tablets import TabletLayout
from .verification import EXPECTED, allow

Scores = npt.NDArray[np.float64]
RATES = ("1e-1", "1e-2", "1e-3")
RANKS = (1, 5, 10, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Who is enrolled, and which pictures are looked up."""

    enrolled: Numbers
    """Pictures in the gallery."""
    known: Numbers
    """Pictures of enrolled persons that are looked up."""
    strangers: Numbers
    """Pictures of others."""


def split_pictures(
    labels: npt.NDArray[np.integer], *, templates: int = 1, stranger_share: float = 0.2, seed: int = 0
) -> Split:
    """Enrol the first `templates` pictures of each person, in the order in which they come, but for a share of the
    persons, drawn by the seed, who are strangers.

    Raises:
        HeadError: nothing is left to be looked up, or nobody is enrolled.
    """
    if templates < 1 or not 0 <= stranger_share < 1:
        raise HeadError(
            f"templates must be >= 1 and the share of strangers in 0 ... 1, got {templates} and {stranger_share}"
        )
    people = np.unique(labels)
    random = np.random.Generator(np.random.Philox(key=[seed, 11]))
    unknown = random.permutation(people)[: round(stranger_share * len(people))]
    is_stranger = np.isin(labels, unknown)
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    split = Split(
        enrolled=np.flatnonzero(~is_stranger & (place < templates)),
        known=np.flatnonzero(~is_stranger & (place >= templates)),
        strangers=np.flatnonzero(is_stranger),
    )
    if not len(split.enrolled) or not len(split.known):
        raise HeadError(
            f"identification needs persons with more than {templates} pictures, got {len(people)} persons with "
            f"{len(labels)} pictures"
        )
    return split


@dataclass(frozen=True, slots=True, kw_only=True)
class AtStrangerRate:
    """What happens at a rate of strangers who are named."""

    rate: float
    allowed: int
    threshold: float | None
    """None: not one stranger may be named, so that these pictures cannot tell."""
    named_strangers: int
    missed_rate: float | None
    """FNIR: of known persons' pictures those whose person is not the first, or not beyond the threshold."""
    is_sure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Identification:
    """Pictures looked up among enrolled persons."""

    people: int
    """Enrolled."""
    templates: int
    known: int
    """Pictures of theirs that were looked up."""
    strangers: int
    """Pictures of others."""
    match_rates: list[float]
    """Of known pictures: how many have their person among the first 1, 2, ... (CMC)."""
    points: list[AtStrangerRate]
    hit_scores: Scores
    """Of known pictures whose person is the first, ascending."""
    stranger_scores: Scores
    """The best of each picture of a stranger, ascending."""

    def curve(self) -> tuple[Scores, Scores]:
        """(FPIR, FNIR) at each stranger's score as a threshold, and where everybody is named; FPIR ascends, from
        above 0 to 1. Empty without strangers."""
        thresholds = np.append(np.unique(self.stranger_scores)[::-1], -np.inf)[1:]
        named = len(self.stranger_scores) - np.searchsorted(self.stranger_scores, thresholds, side="right")
        hits = len(self.hit_scores) - np.searchsorted(self.hit_scores, thresholds, side="right")
        return named / max(1, len(self.stranger_scores)), 1 - hits / self.known


def measure_identification(
    unit: Floats,
    labels: npt.NDArray[np.integer],
    split: Split,
    *,
    rates: Sequence[str] = RATES,
    most: int = max(RANKS),
    threads: int = 1,
    tell: Tell | None = None,
) -> Identification:
    """Look up pictures, exactly.

    Args:
        unit: (N, D) of length 1.
        labels: (N,): the person of each.
        most: ranks that are counted, as far as there are persons.
        tell: told of progress, of both searches together.
    """
    people, owners = np.unique(labels[split.enrolled], return_inverse=True)
    most = min(most, len(people))
    layout = TabletLayout(classes=len(split.enrolled))
    source = ArrayRows(unit[split.enrolled], owners)
    alone = Ranks(group=None, rank=0, size=1)

    lengths = [len(split.enrolled) * count_passes(len(pictures)) for pictures in (split.known, split.strangers)]

    def look(pictures: Numbers, k: int, before: int) -> tuple[npt.NDArray[np.float64], Numbers]:
        def pass_on(done: int, _: int) -> None:
            if tell is not None:
                tell(before + done, sum(lengths))

        best = search_rows(source, unit[pictures], k, layout, ranks=alone, threads=threads, tell=pass_on)
        return best.scores, best.owners

    scores, found = look(split.known, most, 0)
    is_right = found == np.searchsorted(people, labels[split.known])[:, None]
    strangers, _ = look(split.strangers, 1, lengths[0])
    descending = np.sort(strangers[:, 0])[::-1]
    hits = scores[:, 0][is_right[:, 0]]
    return Identification(
        people=len(people),
        templates=len(split.enrolled),
        known=len(split.known),
        strangers=len(split.strangers),
        match_rates=(np.cumsum(is_right.sum(axis=0)) / len(is_right)).tolist(),
        points=[_at_rate(rate, descending, hits, len(split.known)) for rate in rates],
        hit_scores=np.sort(hits),
        stranger_scores=descending[::-1],
    )


def _at_rate(
    rate: str, strangers: npt.NDArray[np.float64], hits: npt.NDArray[np.float64], known: int
) -> AtStrangerRate:
    """What happens at a threshold that so many strangers pass.

    Args:
        strangers: the best score of each, descending.
        hits: scores of known pictures whose person is the first.
        known: known pictures.
    """
    allowed = allow(rate, len(strangers))
    threshold = float(strangers[allowed]) if allowed else None
    return AtStrangerRate(
        rate=float(rate),
        allowed=allowed,
        threshold=threshold,
        named_strangers=int(np.count_nonzero(strangers > threshold)) if threshold is not None else 0,
        missed_rate=float(1 - np.count_nonzero(hits > threshold) / known) if threshold is not None else None,
        is_sure=allowed >= EXPECTED,
    )
