"""Validation: the scores of a network on pixels that it never trained on, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ....tiler.base.geometry import Grid, Window
from ....tiler.labels.labels import UNLABELLED, Classes
from .metrics import Confusion
from .sampling import holds_labels
from .survey import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationTile:
    """A window of one scene that holds validation pixels."""

    scene: int
    core: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class TileScore:
    """How one tile came out."""

    tile: ValidationTile
    pixels: int
    wrong: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Scores over all validation pixels."""

    confusion: Confusion = field(repr=False)
    tiles: tuple[TileScore, ...] = field(repr=False)

    @property
    def score(self) -> float:
        """What "best" means: the mean IoU."""
        return self.confusion.mean_iou

    @property
    def worst(self) -> list[TileScore]:
        """Tiles by the share of their pixels that are wrong, the worst first."""
        return sorted(self.tiles, key=lambda entry: (-entry.wrong / entry.pixels, -entry.pixels))


def list_validation_tiles(
    shapes: Sequence[tuple[int, int]], counts: Sequence[Counts], cell: int, core: int
) -> list[ValidationTile]:
    """All tiles of a fixed grid that hold validation pixels.

    Args:
        counts: of each scene, (rows, columns, classes) validation pixels in cells of side `cell`.
    """
    found: list[ValidationTile] = []
    for scene, (shape, entry) in enumerate(zip(shapes, counts, strict=True)):
        if entry.any():
            grid = Grid(shape=shape, cell=(core, core))
            windows = (grid.window(*at) for at in grid)
            found += [ValidationTile(scene=scene, core=w) for w in windows if holds_labels(entry, cell, w)]
    return found


def validate(
    tiles: Sequence[ValidationTile],
    classes: int,
    predict: Callable[[ValidationTile], Classes],
    read_labels: Callable[[ValidationTile], Classes],
    advance: Callable[[], None] | None = None,
) -> Validation:
    """Compare tile by tile.

    Args:
        predict: (height, width) classes of a tile.
        read_labels: its labels, UNLABELLED where a pixel does not validate.
        advance: called after each tile.
    """
    total = Confusion(counts=np.zeros((classes, classes), np.int64))
    scores: list[TileScore] = []
    for tile in tiles:
        truth = read_labels(tile)
        if (truth != UNLABELLED).any():
            found = Confusion.count(truth, predict(tile), classes, UNLABELLED)
            total += found
            hits = int(np.trace(found.counts))
            scores.append(TileScore(tile=tile, pixels=found.pixels, wrong=found.pixels - hits))
        if advance is not None:
            advance()
    return Validation(confusion=total, tiles=tuple(scores))
