"""Bounds on the Earth and the pixels that they touch, also where a turn around it lies between."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from rasterio.crs import CRS
from rasterio.warp import transform

from ..base.errors import UsageError
from ..base.geometry import Interval, Window
from .georeference import Georeference

_CYLINDRICAL = ("merc", "webmerc", "eqc", "cea", "mill")
"""PROJ's projections in which a turn around the Earth is a way along x, whatever the latitude."""


@lru_cache(maxsize=64)
def turn_of(crs_wkt: str | None) -> float | None:
    """What x grows by in one turn around the Earth: places that differ by it are one; None: it does not grow so."""
    if not crs_wkt:
        return None
    crs = CRS.from_wkt(crs_wkt)
    if crs.is_geographic:
        return 2 * math.pi / float(crs.units_factor[1])
    values = crs.to_dict()
    if values.get("proj") not in _CYLINDRICAL:
        return None
    middle = float(values.get("lon_0", 0.0))
    start, quarter = transform("OGC:CRS84", crs, [middle, middle + 90], [0.0, 0.0])[0]
    return 4 * abs(quarter - start)


def find_turns(place: Georeference, west: float, east: float, shape_yx: tuple[int, int]) -> list[int]:
    """By how many turns around the Earth a range of x may be moved so that it lies over a raster; empty: by none.

    Longitudes count from -180 to 180 here and from 0 to 360 there, and a raster across 180 has some beyond either.
    """
    turn = turn_of(place.crs_wkt)
    own = [place.position_of(y, x)[0] for y in (0, shape_yx[0]) for x in (0, shape_yx[1])]
    if turn is None:
        return [0] if west < max(own) and east > min(own) else []
    first, last = math.floor((min(own) - east) / turn) + 1, math.ceil((max(own) - west) / turn) - 1
    return list(range(first, last + 1))


def window_of_bounds(
    place: Georeference, bounds: tuple[float, float, float, float], shape_yx: tuple[int, int]
) -> Window:
    """The pixels of a raster that bounds touch.

    Args:
        bounds: (west, south, east, north) in the raster's CRS; on a rotated grid the rectangle around them counts.

    Raises:
        UsageError: no transform, empty bounds, or bounds beside the raster, whose own are shown.
    """
    if place.transform is None or place.affine.is_degenerate:
        raise UsageError("--bounds needs a raster with a transform; give --region in pixels")
    west, south, east, north = bounds
    turn = turn_of(place.crs_wkt)
    if turn is not None and west > east:
        # Across 180 degrees, as GeoJSON's bounding boxes say it.
        east += turn
    if not (west < east and south < north and np.isfinite(bounds).all()):
        raise UsageError(f"bounds are west,south,east,north with west < east and south < north, got {bounds}")
    found = [
        window
        for k in find_turns(place, west, east, shape_yx) or [0]
        if (
            window := _window_of(place, (west + k * (turn or 0), south, east + k * (turn or 0), north), shape_yx)
        ).pixels
    ]
    if len(found) == 1:
        return found[0]
    own = [place.position_of(y, x) for y in (0, shape_yx[0]) for x in (0, shape_yx[1])]
    x, y = ([position[i] for position in own] for i in (0, 1))
    must = "touch the raster's" if not found else "touch one end alone of the raster's"
    raise UsageError(
        f"bounds must {must} {min(x):.10g},{min(y):.10g},{max(x):.10g},{max(y):.10g}, got "
        f"{bounds[0]:.10g},{south:.10g},{bounds[2]:.10g},{north:.10g}"
    )


def _window_of(place: Georeference, bounds: tuple[float, float, float, float], shape_yx: tuple[int, int]) -> Window:
    """The pixels of a raster that bounds touch, perhaps none."""
    west, south, east, north = bounds
    corners = [place.pixel_of(x, y) for x in (west, east) for y in (south, north)]
    sides: list[Interval] = []
    for axis in (0, 1):
        values = [corner[axis] for corner in corners]
        # A millionth of a pixel is the bounds' own rounding, not a wish for one pixel more.
        sides.append(Interval(start=int(np.floor(min(values) + 1e-6)), stop=int(np.ceil(max(values) - 1e-6))))
    return Window.from_intervals(*sides).clamp(shape_yx)
