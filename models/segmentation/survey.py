"""The passes over scenes and labels before training: which classes lie where, and each band's mean and deviation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ...tiler.errors import RasterError
from ...tiler.geometry import Grid, Window, align_up
from ...tiler.labels import UNLABELLED, Classes
from .moments import Moments
from .scene import LabelPart, SceneLabels, TrainingScene

_READ = 1024
"""About the side of the windows that are read."""

Counts = npt.NDArray[np.int64]
Advance = Callable[[int], None]


def _cells(window: Window, labels: Classes, cell: int, classes: int) -> Counts:
    """(rows, columns, classes) of the cells of a window that begins on one."""
    rows, columns = -(-window.height // cell), -(-window.width // cell)
    y, x = np.nonzero(labels != UNLABELLED)
    index = (y // cell * columns + x // cell) * classes + labels[y, x]
    return np.bincount(index, minlength=rows * columns * classes).reshape(rows, columns, classes)


def _windows(shape_yx: tuple[int, int], cell: int) -> Grid:
    """Windows to read, each of whole cells."""
    side = align_up(max(_READ, cell), cell) if cell < _READ else cell
    return Grid(shape=shape_yx, cell=(side, side))


def _place(counts: Counts, window: Window, cell: int, part: Counts) -> None:
    top, left = window.y // cell, window.x // cell
    counts[top : top + part.shape[0], left : left + part.shape[1]] += part


def count_labels(
    scene: TrainingScene, *, cell: int, classes: int, part: LabelPart = "all", advance: Advance | None = None
) -> Counts:
    """(rows, columns, classes): labelled pixels of each cell of a scene, from one pass over the labels.

    Args:
        part: "all", "training" or "validation".
        advance: called with the number of pixels just read.
    """
    shape = scene.raster.shape_yx
    counts = np.zeros((*Grid(shape=shape, cell=(cell, cell)).counts, classes), np.int64)
    reader = SceneLabels(scene=scene, part=part).open_reader()
    grid = _windows(shape, cell)
    for at in grid:
        window = grid.window(*at)
        _place(counts, window, cell, _cells(window, reader.read(window), cell, classes))
        if advance is not None:
            advance(window.pixels)
    reader.close()
    return counts


def measure_bands(scene: TrainingScene, advance: Advance | None = None) -> Moments:
    """Moments of the scene's bands over its valid pixels, those in validation blocks left out.

    Raises:
        RasterError: pixels that are no numbers and are not said to be nodata.
    """
    raster = scene.raster
    total = Moments.none(raster.bands)
    reader = raster.open_reader()
    grid = _windows(raster.shape_yx, 1)
    for at in grid:
        window = grid.window(*at)
        image = reader.read(window)
        missing = reader.read_missing(window, image)
        keep = np.ones(window.shape, np.bool_) if missing is None else ~missing
        if raster.dtype.kind == "f" and not np.isfinite(image[:, keep]).all():
            raise RasterError(
                f"{raster.path} holds pixels that are no numbers in window {window}, and says no nodata there; "
                "--nodata nan takes them for nodata, --nodata-any where one band has them"
            )
        if scene.split is not None:
            keep &= ~scene.split.find_validation(window)
        total += Moments.of(image[:, keep])
        if advance is not None:
            advance(window.pixels)
    reader.close()
    return total
