"""Which tiles a step sees: a deterministic stream of positions and variants, by seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....tiler.base.geometry import Grid, Window
from .augmentation import Augmentation, Variant
from .survey import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTile:
    """The pixels whose loss counts, of one scene shown in one variant."""

    scene: int
    variant: Variant
    core: Window
    """In pixels of the turned scene."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSampler:
    """Draws cores around cells that hold labelled training pixels, each such cell as likely as any other.

    `draw(step)` is a pure function of seed and step, whatever was drawn before.
    """

    seed: int
    shapes: tuple[tuple[int, int], ...]
    """(height, width) of each scene."""
    cell: int
    core: int
    """Side of the cores; scenes that are smaller are taken whole."""
    cells: npt.NDArray[np.int32]
    """(cells, 3): scene, row and column of each that holds labelled training pixels."""
    augmentation: Augmentation
    deviations: tuple[float, ...]
    """Standard deviation of each band, in raw units."""

    def draw(self, step: int, count: int) -> list[TrainingTile]:
        return [self._draw(np.random.default_rng([self.seed, step, index])) for index in range(count)]

    def _draw(self, rng: np.random.Generator) -> TrainingTile:
        scene, row, column = (int(value) for value in self.cells[rng.integers(len(self.cells))])
        shape = self.shapes[scene]
        starts: list[int] = []
        sides: list[int] = []
        for place, extent in zip((row, column), shape, strict=True):
            side = min(self.core, extent)
            centre = min(place * self.cell + int(rng.integers(self.cell)), extent - 1)
            starts.append(min(max(0, centre - side // 2), extent - side))
            sides.append(side)
        variant = self.augmentation.draw(rng, self.deviations)
        window = Window(y=starts[0], x=starts[1], height=sides[0], width=sides[1])
        return TrainingTile(scene=scene, variant=variant, core=variant.turn.turned_window(window, shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSampler:
    """Takes one whole scene a step: each once, in an order that is drawn anew for every round."""

    seed: int
    shapes: tuple[tuple[int, int], ...]
    core: int
    """Side of the cores that the scene is cut into; those without labels are left out, as they add nothing."""
    counts: tuple[Counts, ...]
    """Of each scene, (rows, columns, classes) labelled training pixels of cells of `cell`."""
    cell: int
    augmentation: Augmentation
    deviations: tuple[float, ...]

    def draw(self, step: int) -> list[TrainingTile]:
        scenes = [index for index, counts in enumerate(self.counts) if counts.any()]
        turn_of, place = divmod(step, len(scenes))
        scene = scenes[np.random.default_rng([self.seed, turn_of]).permutation(len(scenes))[place]]
        variant = self.augmentation.draw(np.random.default_rng([self.seed, turn_of, scene]), self.deviations)
        shape = self.shapes[scene]
        grid = Grid(shape=variant.turn.shape(shape), cell=(self.core, self.core))
        cores = [grid.window(*at) for at in grid]
        return [
            TrainingTile(scene=scene, variant=variant, core=core)
            for core in cores
            if holds_labels(self.counts[scene], self.cell, variant.turn.source_window(core, shape))
        ]


def holds_labels(counts: Counts, cell: int, window: Window) -> bool:
    """Whether a cell that a window touches holds labelled pixels."""
    rows = slice(window.y // cell, (window.rows.stop - 1) // cell + 1)
    columns = slice(window.x // cell, (window.columns.stop - 1) // cell + 1)
    return bool(counts[rows, columns].any())


def labelled_cells(counts: Sequence[Counts]) -> npt.NDArray[np.int32]:
    """(cells, 3): scene, row and column of every cell with labelled pixels."""
    found = [
        np.concatenate([np.full((len(at), 1), scene), at], axis=1)
        for scene, at in ((scene, np.argwhere(entry.any(2))) for scene, entry in enumerate(counts))
    ]
    return np.concatenate(found).astype(np.int32)
