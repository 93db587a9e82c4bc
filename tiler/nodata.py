"""Nodata: which pixels of a raster hold nothing, by their values or by a mask beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
MaskSource = Literal["dataset", "alpha", "band", "array", "parts"]
"""GDAL's mask of the dataset, its alpha band, a data band, a Zarr array beside the pixels, the pieces of a mosaic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodataRule:
    """A pixel is nodata where all bands hold one of `values` (`any_band`: where one does), or where a mask says so."""

    values: tuple[float, ...] = ()
    any_band: bool = False
    mask: MaskSource | None = None
    mask_band: int = 0
    """Of mask "band" and "alpha": the stored band that holds it, from 1."""
    mask_values: tuple[float, ...] = ()
    """Of mask "band": its values that mean nodata."""

    def __post_init__(self) -> None:
        # NaN differs from every NaN but itself: one object for all, so that rules that say the same are equal.
        once = dict.fromkeys(math.nan if math.isnan(value) else float(value) for value in self.values)
        object.__setattr__(self, "values", tuple(once))

    @property
    def is_plain(self) -> bool:
        """Whether one number says it all."""
        return len(self.values) <= 1 and not self.any_band and self.mask is None

    def to_json(self) -> dict[str, Any]:
        return {name: repr(getattr(self, name)) for name in self.__slots__}


def find_missing(image: Array, rule: NodataRule) -> Mask | None:
    """(height, width) of an image (bands, height, width), True where its values say nodata; None where no pixel is."""
    if not rule.values:
        return None
    missing: Mask | None = None
    for band in image:
        here = _holds(band, rule.values)
        if missing is None:
            missing = here
        elif rule.any_band:
            missing |= here
        else:
            missing &= here
        if not rule.any_band and not missing.any():
            return None
    return missing if missing is not None and missing.any() else None


def join_missing(*masks: Mask | None) -> Mask | None:
    """True where one of the masks is; None where all are None."""
    found = [mask for mask in masks if mask is not None]
    return None if not found else np.logical_or.reduce(found)


def _holds(band: Array, values: tuple[float, ...]) -> Mask:
    found = np.zeros(band.shape, np.bool_)
    for value in values:
        if np.isnan(value):
            if band.dtype.kind == "f":
                found |= np.isnan(band)
        # A value that the type cannot hold is no pixel's.
        elif band.dtype.kind == "f":
            if np.isinf(value) or abs(value) <= np.finfo(band.dtype).max:
                found |= band == band.dtype.type(value)
        elif np.iinfo(band.dtype).min <= value <= np.iinfo(band.dtype).max and value == int(value):
            found |= band == band.dtype.type(int(value))
    return found
