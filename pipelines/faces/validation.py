"""An embedder measured on identities that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...models.faceid.base.errors import HeadError
from ...models.faceid.embedder.file import Embedder, EmbedderDescription
from ...models.faceid.gallery.top_k import unit_rows
from ...models.faceid.pictures.source import FaceSource
from ...models.faceid.scores.identification import measure_identification, split_pictures
from ...models.faceid.scores.verification import PairVerification, measure_verification

RATES = ("1e-1", "1e-2", "1e-3", "1e-4")
SHOWN_RATE = "1e-3"
"""In a line."""
MOST_PICTURES = 4
"""Of each identity."""
BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found; without `verification` too few pictures could be read."""

    scores: dict[str, Any]
    """Plain values: full_loss, rank_1, tar at each rate that the pairs can tell, counts."""
    verification: PairVerification | None
    failed: list[tuple[str, str]]
    """(picture, reason) of those that cannot be used."""
    grey: int
    """Pictures without colour, of those that were measured with."""


def describe_scores(scores: dict[str, Any]) -> str:
    """In a line, for people."""
    parts = []
    if scores.get("full_loss") is not None:
        parts.append(f"loss over all classes {scores['full_loss']:.3f}")
    if "rank_1" not in scores:
        return ", ".join([*parts, "not measured on identities never seen"])
    parts.append(f"rank-1 of {scores['identities']:,} identities never seen {100 * scores['rank_1']:.1f} %")
    if SHOWN_RATE in scores["tar"]:
        parts.append(f"TAR {100 * scores['tar'][SHOWN_RATE]:.1f} % at FAR {SHOWN_RATE}")
    return ", ".join(parts)


def measure_embedder(model: nn.Module, description: EmbedderDescription, held_out: FaceSource, seed: int) -> Measured:
    """Verification over all pairs of up to four pictures of each identity; rank-1 with one of each enrolled, all others
    looked up.

    Args:
        model: in the mode of evaluation.
        seed: of the split, which has no strangers.
    """
    embedder = Embedder(model=model, description=description, sha256="", source="")
    everything = np.arange(len(held_out))
    labels = held_out.labels_of(everything, np.zeros_like(everything))
    order = np.argsort(labels, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    shown = np.flatnonzero(place < MOST_PICTURES)
    vectors, known, failed = list[np.ndarray](), list[int](), list[tuple[str, str]]()
    grey = 0
    for start in range(0, len(shown), BATCH):
        part = shown[start : start + BATCH]
        pictures, unusable, without_colour = held_out.read(part, np.zeros_like(part))
        failed += unusable
        grey += without_colour
        good = [(pixels, labels[sample]) for pixels, sample in zip(pictures, part, strict=True) if pixels is not None]
        if good:
            vectors.append(embedder.embed(torch.from_numpy(np.stack([pixels for pixels, _ in good]))).double().numpy())
            known += [int(label) for _, label in good]
    scores: dict[str, Any] = {"identities": held_out.identities, "pictures": len(known)}
    try:
        unit = unit_rows(np.concatenate(vectors)) if vectors else np.empty((0, description.dim), np.float32)
        verification = measure_verification(unit, np.array(known), RATES)
        split = split_pictures(np.array(known), stranger_share=0.0, seed=seed)
        found = measure_identification(unit, np.array(known), split, threads=torch.get_num_threads())
    except HeadError as error:
        return Measured(scores={**scores, "not_measured": str(error)}, verification=None, failed=failed, grey=grey)
    scores["rank_1"] = found.match_rates[0]
    scores["tar"] = {
        rate: point.true_accept_rate
        for rate, point in zip(RATES, verification.points, strict=True)
        if point.true_accept_rate is not None
    }
    return Measured(scores=scores, verification=verification, failed=failed, grey=grey)
