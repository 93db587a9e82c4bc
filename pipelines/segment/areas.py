"""Areas of classes: every pixel of a class map counted, and the ground that it covers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...tiler.base.dtypes import output_nodata
from ...tiler.base.geometry import Grid
from ...tiler.output.store import open_array
from ...tiler.rasters.georeference import pixel_areas
from ...tiler.rasters.opening import open_raster
from ..base.console import Console

_BLOCK = 2048
_BYTE_VALUES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassArea:
    """What one class covers."""

    name: str
    colour: tuple[int, int, int]
    pixels: int
    share: float
    """Of all pixels that have a class."""
    hectares: float | None
    """None where the map does not say where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Areas:
    """Of a whole class map."""

    classes: tuple[ClassArea, ...]
    """Those that are there."""
    nodata_pixels: int
    hectares: float | None
    on_ellipsoid: bool
    """Whether areas are those on the Earth's ellipsoid; else in the plane of the map's CRS."""


def count_areas(console: Console, out: Path, header: dict[str, Any]) -> Areas:
    """Count a class map, block by block."""
    array, place = open_array(out, "class"), open_raster(out / "class").place
    height, width = array.shape
    metres = pixel_areas(place, height)
    nodata = int(output_nodata(array.dtype))
    counts, ground = np.zeros(nodata + 1, np.int64), np.zeros(nodata + 1)
    grid = Grid(shape=(height, width), cell=(_BLOCK, _BLOCK))
    with console.step("areas", height * width) as step:
        for at in grid:
            window = grid.window(*at)
            rows, columns = window.slices()
            row, value, found = _count_rows(np.asarray(array[rows, columns]), nodata + 1)
            np.add.at(counts, value, found)
            if metres is not None:
                np.add.at(ground, value, metres[rows][row] * found)
            step.advance(window.pixels)
    named = {entry["value"]: entry for entry in header["classes"]}
    total = max(1, int(counts[:nodata].sum()))
    crs = place.crs
    return Areas(
        classes=tuple(
            ClassArea(
                name=named.get(value, {}).get("name", f"class {value}"),
                colour=tuple(named.get(value, {}).get("colour", (120, 120, 120))),
                pixels=int(counts[value]),
                share=float(counts[value] / total),
                hectares=float(ground[value] / 1e4) if metres is not None else None,
            )
            for value in map(int, np.flatnonzero(counts[:nodata]))
        ),
        nodata_pixels=int(counts[nodata]),
        hectares=float(ground[:nodata].sum() / 1e4) if metres is not None else None,
        on_ellipsoid=metres is not None and crs is not None and crs.is_geographic,
    )


def _count_rows(block: npt.NDArray[Any], most: int) -> tuple[npt.NDArray[np.int64], ...]:
    """(row, value, pixels) of each value in each row: in degrees the rows' pixels differ in area.

    Args:
        most: above every value.
    """
    keyed = block.astype(np.int64) + most * np.arange(len(block))[:, None]
    if most <= _BYTE_VALUES:
        counts = np.bincount(keyed.ravel(), minlength=most * len(block))
        keys = np.flatnonzero(counts)
        return keys // most, keys % most, counts[keys]
    # A histogram of all values in each row would be a hundred times the block.
    keys, counts = np.unique(keyed, return_counts=True)
    return keys // most, keys % most, counts
