"""The passes over scenes and labels before training: which classes lie where, and each band's mean and deviation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ....tiler.base.geometry import Grid, Window, align_up
from ....tiler.labels.labels import UNLABELLED, Classes
from ....tiler.rasters.nodata import find_not_finite, require_finite
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
    scene: TrainingScene,
    *,
    cell: int,
    classes: int,
    part: LabelPart = "all",
    advance: Advance | None = None,
    ignored: dict[int, int] | None = None,
) -> Counts:
    """(rows, columns, classes): labelled pixels of each cell of a scene, from one pass over the labels.

    Args:
        part: "all", "training" or "validation".
        advance: called with the number of pixels just read.
        ignored: where pixels of each value that means no class are told.
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
    if ignored is not None:
        ignored |= reader.ignored
    reader.close()
    return counts


def measure_bands(scene: TrainingScene, advance: Advance | None = None) -> Moments:
    """Moments of the scene's bands over its valid pixels, those in validation blocks left out.

    Raises:
        NotFiniteError: a pixel holds NaN or infinity in some of its bands only, and is not nodata.
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
        require_finite(image, missing, find_not_finite(image), raster.path, window)
        if scene.split is not None:
            keep &= ~scene.split.find_validation(window)
        total += Moments.of(image[:, keep])
        if advance is not None:
            advance(window.pixels)
    reader.close()
    return total
