"""Pictures of synthetic identities as files: a folder for each, and a list of pairs in ten folds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .identities import SIZE, draw_faces

FOLDS = 10
OUTSIDE_TRAINING = 1 << 41
"""Samples from here on are drawn by no training."""


def face_name(identity: int) -> str:
    """Of an identity: its folder."""
    return f"identity-{identity:06d}"


def write_faces(
    folder: Path,
    *,
    identities: int,
    images: int,
    first: int = 0,
    seed: int = 0,
    height: int = SIZE,
    width: int = SIZE,
    tell: Callable[[int], None] | None = None,
) -> int:
    """Write FOLDER/NAME/NAME_0001.png ...; the same arguments write the same files. Returns how many pictures.

    Args:
        first: number of the first identity; those of a training are 0 ... its identities - 1.
        images: of each identity.
        tell: gets how many pictures were written, identity by identity.
    """
    samples = OUTSIDE_TRAINING + np.arange(1, images + 1)
    for identity in range(first, first + identities):
        name = face_name(identity)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(draw_faces(seed, np.full(images, identity), samples, height, width), 1):
            Image.fromarray(pixels).save(folder / name / f"{name}_{number:04d}.png")
        if tell is not None:
            tell(images)
    return identities * images


def draw_pairs(
    *, identities: int, images: int, count: int, first: int = 0, seed: int = 0
) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """For each of ten folds `count` pairs of pictures of one identity, then `count` of two.

    Identities are shared out to the folds, so that none is in two of them; there must be 2 for each fold.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, 13]))
    order = random.permutation(identities) + first
    pairs = []
    for part in np.array_split(order, FOLDS):
        for _ in range(count):
            name = face_name(int(random.choice(part)))
            one, two = random.choice(images, 2, replace=False) + 1
            pairs.append(((name, int(one)), (name, int(two))))
        for _ in range(count):
            left, right = random.choice(part, 2, replace=False)
            one, two = random.integers(1, images + 1, 2)
            pairs.append(((face_name(int(left)), int(one)), (face_name(int(right)), int(two))))
    return pairs
