"""A result's values: nodata in them, and what of it is not finite."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.dtypes import output_nodata, stored_dtype
from ..base.errors import OutputError
from ..base.geometry import Interval, Window, footprint
from ..base.tile import Tile
from ..planning.plan import TilePlan


def missing_in_output(
    missing: npt.NDArray[np.bool_], window: Window, core: Window, scale: tuple[Fraction, Fraction]
) -> npt.NDArray[np.bool_]:
    """Nodata of a core's pixels: an output pixel is nodata where every input pixel under it is."""
    if scale == (1, 1):
        return missing[core.slices(window)]
    under = [
        [footprint(Interval(start=i, stop=i + 1), ratio) for i in range(interval.start, interval.stop)]
        for interval, ratio in ((core.rows, scale[0]), (core.columns, scale[1]))
    ]
    return _count(~missing, window, under) == 0


def count_under(
    marked: npt.NDArray[np.bool_] | None, window: Window, core: Window, scale: tuple[Fraction, Fraction]
) -> int:
    """How many marked pixels of the raster belong to a core; each belongs to one."""
    if marked is None:
        return 0
    rows, columns = (
        slice(max(0, ceil(interval.start / ratio) - origin), max(0, ceil(interval.stop / ratio) - origin))
        for interval, ratio, origin in zip((core.rows, core.columns), scale, (window.y, window.x), strict=True)
    )
    return int(marked[rows, columns].sum())


def count_not_finite(result: npt.NDArray[Any], missing: npt.NDArray[np.bool_] | None) -> int:
    """How many pixels that are not missing have NaN or infinity in any channel."""
    if result.dtype.kind != "f":
        return 0
    finite = np.isfinite(result).all(axis=0)
    return int(np.count_nonzero(~finite if missing is None else ~(finite | missing)))


def touches_nodata(missing: npt.NDArray[np.bool_] | None, tile: Tile, plan: TilePlan) -> npt.NDArray[np.uint8]:
    """(height, width) of a core: 1 where a nodata pixel of the raster lies in the pixel's receptive field."""
    if missing is None:
        return np.zeros(tile.core.shape, np.uint8)
    assert plan.receptive is not None
    fields: list[list[Interval]] = []
    for axis, interval in enumerate((tile.core.rows, tile.core.columns)):
        period, stride, extent = plan.receptive[axis], plan.stride[axis], plan.raster_shape[1 + axis]
        moved = [(divmod(i, len(period))) for i in range(interval.start, interval.stop)]
        # What a network sees beyond the raster's edge is no nodata pixel.
        fields.append(
            [
                Interval(start=period[phase][0] + times * stride, stop=period[phase][1] + times * stride).clamp(extent)
                for times, phase in moved
            ]
        )
    return (_count(missing, tile.window, fields) > 0).astype(np.uint8)


def _count(marked: npt.NDArray[np.bool_], window: Window, under: list[list[Interval]]) -> npt.NDArray[np.int32]:
    """How many marked pixels of a window lie in each product of a row interval and a column interval."""
    counts = marked.astype(np.int32)
    for axis, (intervals, origin) in enumerate(zip(under, (window.y, window.x), strict=True)):
        size = counts.shape[axis]
        first = np.clip([u.start - origin for u in intervals], 0, size)
        last = np.clip([u.stop - origin for u in intervals], 0, size)
        # Pixels up to each position, so that a difference counts those of any interval.
        sums = np.concatenate(
            [np.zeros_like(np.take(counts, [0], axis)), np.cumsum(counts, axis, dtype=np.int32)], axis
        )
        counts = np.take(sums, last, axis) - np.take(sums, first, axis)
    return counts


def as_stored(result: npt.NDArray[Any], missing: npt.NDArray[np.bool_] | None) -> npt.NDArray[Any]:
    """A result as it is stored, nodata where pixels are missing; where its dtype stays, in the memory that it has.

    Raises:
        OutputError: a class number, or a level of probability, that the stored dtype has no value for.
    """
    dtype = stored_dtype(result.dtype)
    if dtype != result.dtype:
        known, most = result if missing is None else result[:, ~missing], int(output_nodata(dtype)) - 1
        low, high = (int(known.min()), int(known.max())) if known.size else (0, 0)
        if low < 0 or high > most:
            raise OutputError(
                f"the network's classes or levels must be 0..{most}, got {low}..{high} (-1: what is no class or "
                "no probability); name all classes in a model file, or see --activation"
            )
        result = result.astype(dtype)
    if missing is not None:
        result[:, missing] = output_nodata(dtype)
    return result
