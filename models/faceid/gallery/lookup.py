"""Looking faces up in one generation of a gallery: the plan of it, the search, and answers with names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base.collectives import Ranks
from ..base.errors import HeadError
from .rows import GalleryRows
from .search import Tell, search_rows
from .search_plan import SearchPlan, plan_search
from .state import GalleryState
from .top_k import NOBODY, Best, unit_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Somebody in the gallery."""

    name: str
    score: float
    """Cosine of her nearest template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Who a face may be."""

    matches: tuple[Match, ...]
    """Persons beyond the threshold, nearest first; none: unknown."""
    nearest: float
    """The highest score of anybody; -infinity in an empty gallery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What a process may take for looking faces up."""

    memory_bytes: int
    threads: int

    def plan(self, state: GalleryState, queries: int, k: int, ranks: int) -> SearchPlan:
        """What a search of so many faces takes in each of so many ranks.

        Raises:
            HeadMemoryError: the budget is too small.
        """
        return plan_search(
            state.layout(ranks),
            state.manifest.dim,
            storage=state.manifest.storage,
            item_bytes=state.dtype.itemsize,
            queries=queries,
            k=k,
            threads=self.threads,
            # While they are made, owners are there twice.
            names_bytes=state.names.held_bytes + 4 * state.owners.nbytes,
            budget=self.memory_bytes,
        )

    def search(
        self, state: GalleryState, unit: npt.NDArray[np.float32], k: int, ranks: Ranks, tell: Tell | None
    ) -> Best:
        """The k nearest persons of each vector, on all ranks.

        Args:
            unit: (faces, dim) of length 1.

        Raises:
            HeadError: k is less than 1.
            HeadMemoryError: the budget is too small.
            GalleryError: the gallery is damaged.
        """
        if k < 1:
            raise HeadError(f"k must be >= 1, got {k}")
        layout = state.layout(ranks.size)
        if layout is None:
            return Best.none(len(unit), k)
        plan = self.plan(state, len(unit), k, ranks.size)
        source = GalleryRows(state.rows, state.owners, keep=not plan.reads_disk)
        return search_rows(
            source, unit, k, layout, ranks=ranks, threads=self.threads, query_part=plan.query_part, tell=tell
        )


def unit_vectors(embeddings: npt.ArrayLike, dim: int) -> npt.NDArray[np.float32]:
    """(faces, dim) of length 1, of embeddings of any length but 0.

    Raises:
        HeadError: wrong shapes or numbers.
    """
    if isinstance(embeddings, Tensor):
        given = embeddings.detach().cpu()
        embeddings = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    values = np.asarray(embeddings)
    if values.ndim != 2 or values.shape[1] != dim:
        raise HeadError(f"embeddings must be (faces, {dim}) for this gallery, got {values.shape}")
    return unit_rows(values)


def name_answers(state: GalleryState, best: Best, threshold: float | None) -> list[Answer]:
    """One answer for each face, with the persons beyond the threshold; None: with all."""
    answers: list[Answer] = []
    for scores, owners in zip(best.scores.tolist(), best.owners.tolist(), strict=True):
        found = tuple(
            Match(name=state.names.name(owner), score=score)
            for score, owner in zip(scores, owners, strict=True)
            if owner != NOBODY and (threshold is None or score > threshold)
        )
        answers.append(Answer(matches=found, nearest=scores[0]))
    return answers
