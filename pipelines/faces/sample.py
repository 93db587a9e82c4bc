"""`outsize face sample`: pictures of synthetic identities, to try the commands with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ...models.faceid.scores.pair_list import Pair, PairList, write_pairs
from ...sample_data.faces import FOLDS, draw_pairs, write_faces
from ...sample_data.identities import draw_faces
from ...tiler.base.errors import UsageError
from ..base.console import Console, count_of

PAIRS = 30
"""Of one identity, and of two, in each fold."""


def run_face_sample(
    console: Console, folder: Path, *, identities: int, images: int, first: int, seed: int, size: tuple[int, int]
) -> None:
    """Write the pictures, and pairs where there are identities enough for ten folds. Stopped, it leaves nothing.

    Raises:
        UsageError: the folder holds something, or the size is too small for a face.
    """
    try:
        draw_faces(seed, np.zeros(1, np.int64), np.zeros(1, np.int64), *size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} must be a new or empty folder, got files there")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with console.step("draw", identities * images, counts_pixels=False) as step:
            written = write_faces(
                folder,
                identities=identities,
                images=images,
                first=first,
                seed=seed,
                height=size[0],
                width=size[1],
                tell=step.advance,
            )
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        raise
    pairs = None
    if identities >= 2 * FOLDS:
        drawn = draw_pairs(identities=identities, images=images, count=PAIRS, first=first, seed=seed)
        numbered = [
            Pair(fold=place // (2 * PAIRS), first=one, second=two, line=place + 2)
            for place, (one, two) in enumerate(drawn)
        ]
        pairs = folder / "pairs.txt"
        write_pairs(pairs, PairList(folds=FOLDS, pairs=numbered))
    console.result(
        f"{folder}: {count_of(written, 'picture')} of {identities} synthetic identities"
        f"{f', pairs in {pairs}' if pairs else ''}",
        {"out": str(folder), "images": written, "identities": identities, "pairs": str(pairs) if pairs else None},
    )
