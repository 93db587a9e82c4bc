"""The running best k of each query: exact scores, one row or more an owner, ties to the owner that came first.

A row's score for a query is their dot product: products of float32 numbers, exact in float64, added by halves in
float64. So a score has the same bits whatever else is computed beside it, on any machine. Scores of whole blocks are
first computed in float32, with a bound on their error, and only rows that may be among the best are scored exactly.

Shapes: Q queries, D numbers each, R rows of a block, k best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base.errors import HeadError

NOBODY = -1
"""The owner of a row that is not to be found."""
LARGEST_NORM = 1.01
"""Of a row or a query: unit vectors, rounded to float16 at worst."""
PART = 65_536
"""Candidates that are listed at once, and"""
SCORED = 2_048
"""those that are scored at once: they bound memory where thousands of rows are equal."""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


def fold_sum(values: Doubles) -> Doubles:
    """Sums along the last axis, by adding halves: (..., D) -> (...). Elementwise additions only, so the same bits for
    any number of rows and on any machine. `values` is used up."""
    while (width := values.shape[-1]) > 1:
        half = width // 2
        values[..., :half] += values[..., width - half :]
        values = values[..., : width - half]
    return values[..., 0]


def exact_scores(rows: npt.NDArray[np.floating], queries: Floats) -> Doubles:
    """(n,): the dot product of each row with the query of the same place, both (n, D)."""
    return fold_sum(rows.astype(np.float64) * queries)


def unit_rows(values: npt.ArrayLike) -> Floats:
    """Vectors divided by their lengths, (n, D), rounded to float32.

    Raises:
        HeadError: not (n, D); not finite; of length 0.
    """
    given = np.asarray(values)
    if given.ndim != 2 or not given.shape[1]:
        raise HeadError(f"embeddings must be (number, numbers of each), got {given.shape}")
    if given.dtype.kind not in "fiu":  # complex numbers would lose a part, texts be read
        raise HeadError(f"embeddings must be real numbers, got {given.dtype}")
    unit = np.empty(given.shape, np.float32)
    for start in range(0, len(given), SCORED):  # so that little is held in float64
        part = given[start : start + SCORED].astype(np.float64)
        length = np.sqrt(fold_sum(np.square(part)))
        bad = ~(np.isfinite(length) & (length > 0))
        if bad.any():
            raise HeadError(
                f"embeddings must be finite and not zero, number {start + int(bad.argmax())} has length "
                f"{length[bad.argmax()]}"
            )
        unit[start : start + SCORED] = part / length[:, None]
    return unit


def error_bound(dim: int) -> float:
    """How far a float32 dot product of D numbers may lie from the exact one, whatever the order of its additions:
    D u / (1 - D u) |x| |w| with u = 2^-24, and what rounding the bound itself adds."""
    terms = (dim + 2) * 2.0**-24
    return terms / (1 - terms) * LARGEST_NORM**2 * 1.01 + 2.0**-22


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best owners of each query, in order: score descending, then owner ascending."""

    scores: Doubles
    """(Q, k); -infinity where there are fewer than k owners."""
    owners: Numbers
    """(Q, k); -1 there."""

    @classmethod
    def none(cls, queries: int, k: int) -> Best:
        return cls(scores=np.full((queries, k), -np.inf), owners=np.full((queries, k), NOBODY, np.int64))


def merge_best(parts: list[Best]) -> Best:
    """The best of several, each owner once, with her best score."""
    queries, k = parts[0].scores.shape
    which = np.concatenate([np.repeat(np.arange(queries), part.scores.shape[1]) for part in parts])
    owners = np.concatenate([part.owners.ravel() for part in parts])
    scores = np.concatenate([part.scores.ravel() for part in parts])
    return _select(which, owners, scores, queries, k)


def _select(which: Numbers, owners: Numbers, scores: Doubles, queries: int, k: int) -> Best:
    """The best k of entries (query, owner, score)."""
    known = owners != NOBODY
    which, owners, scores = which[known], owners[known], scores[known]
    order = np.lexsort((-scores, owners, which))
    which, owners, scores = which[order], owners[order], scores[order]
    first = np.ones(len(which), bool)  # of each (query, owner)
    first[1:] = (which[1:] != which[:-1]) | (owners[1:] != owners[:-1])
    which, owners, scores = which[first], owners[first], scores[first]
    order = np.lexsort((owners, -scores, which))
    which, owners, scores = which[order], owners[order], scores[order]
    place = np.arange(len(which)) - np.searchsorted(which, which)
    kept = place < k
    best = Best.none(queries, k)
    best.scores[which[kept], place[kept]] = scores[kept]
    best.owners[which[kept], place[kept]] = owners[kept]
    return best


class TopK:
    """The best k owners of Q queries among the blocks that were shown; one thread's.

    Guarantee: the same as sorting all exact scores, for any blocks in any order.

    Args:
        queries: (Q, D), of length 1.
        most_rows: that any owner has.
    """

    def __init__(self, queries: Floats, k: int, most_rows: int, block_rows: int) -> None:
        self._queries, self._k, self._most_rows = queries, k, most_rows
        self._columns = torch.from_numpy(queries).T.contiguous()
        self._scores = torch.empty((block_rows, len(queries)))
        self._bound = error_bound(queries.shape[1])
        self.best = Best.none(len(queries), k)

    def look(self, block: Tensor, owners: npt.NDArray[np.integer], name: str) -> None:
        """Take a block into account.

        Args:
            block: (R, D) float32, as long as the others: a shorter one is padded.
            owners: of each row; of padding NOBODY.
            name: of what the block is from, for an error.

        Raises:
            HeadError: rows are not finite, or longer than 1, which only damage makes them.
        """
        scores = torch.mm(block, self._columns, out=self._scores)
        hidden = np.flatnonzero(owners == NOBODY)
        if len(hidden):
            scores[torch.from_numpy(hidden)] = -torch.inf
        highest = scores.amax(dim=0)
        if bool(torch.isnan(highest).any() | (highest > LARGEST_NORM**2).any()):
            raise HeadError(f"{name} is damaged: it holds rows that are not of length 1")
        reached = self._reached(scores)
        columns = np.flatnonzero(highest.numpy() >= reached)
        if not len(columns):
            return
        chosen = scores if len(columns) == len(reached) else scores[:, torch.from_numpy(columns)]
        mask = chosen >= torch.from_numpy(reached[columns])
        if int(mask.sum()) <= PART:
            self._take(chosen, mask, block, owners, columns, name)
            return
        # Queries in parts that have few candidates each.
        parts = np.cumsum(mask.sum(dim=0).numpy()) // PART
        for places in np.split(np.arange(len(columns)), np.flatnonzero(np.diff(parts)) + 1):
            part = torch.from_numpy(places)
            self._take(chosen[:, part], mask[:, part], block, owners, columns[places], name)

    def _reached(self, scores: Tensor) -> Floats:
        """(Q,): float32 scores below it cannot be among the best."""
        sure = self.best.scores[:, -1] - self._bound
        open_ = np.flatnonzero(np.isneginf(sure))
        enough = self._k * self._most_rows  # rows among which there are k owners
        if len(open_) and enough <= len(scores):
            columns = scores if len(open_) == len(sure) else scores[:, torch.from_numpy(open_)]
            sure[open_] = torch.topk(columns, enough, dim=0).values[-1].double().numpy() - 2 * self._bound
        return sure.astype(np.float32) - np.float32(2.0**-22)

    def _take(
        self,
        scores: Tensor,
        mask: Tensor,
        block: Tensor,
        owners: npt.NDArray[np.integer],
        columns: Numbers,
        name: str,
    ) -> None:
        """Score the candidates of some queries exactly, and keep the best.

        Args:
            scores, mask: (R, columns): what products gave, and who is a candidate.
            columns: the queries.
        """
        rows, which = np.divmod(np.flatnonzero(mask.contiguous().numpy()), len(columns))
        known = owners[rows] != NOBODY
        rows, which = rows[known], which[known]
        exact = np.empty(len(rows))
        wide = block.numpy()
        for start in range(0, len(rows), SCORED):
            part = slice(start, start + SCORED)
            exact[part] = exact_scores(wide[rows[part]], self._queries[columns[which[part]]])
        off = np.abs(exact - scores.numpy()[rows, which])
        if len(off) and off.max() > self._bound:
            raise HeadError(
                f"{name}: products must be float32, they are off by {off.max():.1e} where rounding explains "
                f"{self._bound:.1e}; call torch.set_float32_matmul_precision('highest')"
            )
        k = self._k
        before = Best(scores=self.best.scores[columns], owners=self.best.owners[columns])
        after = _select(
            np.concatenate([np.repeat(np.arange(len(columns)), k), which]),
            np.concatenate([before.owners.ravel(), owners[rows].astype(np.int64)]),
            np.concatenate([before.scores.ravel(), exact]),
            len(columns),
            k,
        )
        self.best.scores[columns], self.best.owners[columns] = after.scores, after.owners
