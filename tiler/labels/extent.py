"""Where a raster of labels lies on the grid of another: labels of any extent of one grid serve."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.errors import UsageError
from ..rasters.bounds import turn_of
from ..rasters.georeference import OFF_GRID, Georeference, find_offset
from ..rasters.raster import Raster


def find_origins(
    raster: Raster,
    place: Georeference,
    shape_yx: tuple[int, int],
    of: str,
    whole: tuple[tuple[int, int], tuple[int, int]] | None,
) -> tuple[tuple[int, int], ...]:
    """Where a grid's first pixel lies in a raster of labels of any extent of that grid.

    Raises:
        UsageError: another grid, or labels that lie beside it.
    """
    src = raster.path
    if place.transform is None or raster.place.transform is None:
        # Only the sizes tell.
        if whole is not None and raster.shape_yx == whole[0] and raster.shape_yx != shape_yx:
            return (whole[1],)
        if raster.shape_yx == shape_yx:
            return ((0, 0),)
        raise UsageError(
            f"labels must be one band on the grid of {of}, {shape_yx[0]} x {shape_yx[1]}, got one band of "
            f"{raster.shape_yx[0]} x {raster.shape_yx[1]} in {src}, and not both say where they lie"
        )
    offset = find_offset(place, raster.place, raster.shape_yx)
    if offset is None:
        raise UsageError(
            f"labels must lie on the grid of {of}: it is at {_place(place)}, {src} at {_place(raster.place)}"
        )
    turn = turn_of(place.crs_wkt)
    columns = turn / abs(place.affine.a) if turn and place.affine.a and not place.is_rotated else 0.0
    # Once around the Earth must be whole pixels, or the grids do not meet there.
    around = round(columns) if columns and abs(columns - round(columns)) < OFF_GRID else 0
    height, width = raster.shape_yx
    origins = [
        (-offset[0], -offset[1] - k * around)
        for k in ((0, 1, -1) if around else (0,))
        if -height < offset[0] < shape_yx[0] and -width < offset[1] + k * around < shape_yx[1]
    ]
    if not origins:
        raise UsageError(
            f"labels must lie over {of}: it is at {_place(place)}, {src} at {_place(raster.place)}, beside it; are "
            "they of one place?"
        )
    return tuple(origins)


def describe_extent(raster: Raster, origins: Sequence[tuple[int, int]], shape_yx: tuple[int, int], of: str) -> str:
    """One line on labels of another extent; empty for those of the grid's own."""
    if tuple(origins) == ((0, 0),) and raster.shape_yx == shape_yx:
        return ""
    height, width = raster.shape_yx
    covered = sum(
        (min(height, shape_yx[0] + top) - max(0, top)) * (min(width, shape_yx[1] + left) - max(0, left))
        for top, left in origins
    )
    share = min(1.0, covered / (shape_yx[0] * shape_yx[1]))
    rest = "and are cropped to it" if share == 1 else "the rest is unlabelled"
    return f"{raster.path}: labels of {height} x {width} px on the grid of {of} cover {100 * share:.3g} % of it, {rest}"


def _place(place: Georeference) -> str:
    crs = place.crs
    return f"{place.affine.c:.10g},{place.affine.f:.10g} in {crs.to_string()[:40] if crs else 'no CRS'}"
