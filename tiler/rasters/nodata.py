"""Nodata: which pixels of a raster hold nothing, by their values or by a mask beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..base.errors import NotFiniteError
from ..base.exact_numbers import exact_number
from ..base.geometry import Window

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
MaskSource = Literal["dataset", "bands", "alpha", "array", "parts"]
"""GDAL's mask of the dataset, those of its bands, its alpha band, a Zarr array beside the pixels, the files of a stack
or mosaic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodataRule:
    """A pixel is nodata where all bands hold one of `values` (`any_band`: where one does), or where a mask says so.

    NaN and infinity count among the values of every float raster, declared or not.
    """

    values: tuple[float, ...] = ()
    any_band: bool = False
    mask: MaskSource | None = None
    masked_bands: tuple[int, ...] = ()
    """Of mask "bands": stored bands, from 1, whose own mask says where they hold nothing, as `values` does."""
    alpha_band: int = 0
    """Of mask "alpha": the stored band, from 1, that is 0 where a pixel is nodata."""
    mask_band: int = 0
    """A stored band, from 1, that is a mask too; 0: none."""
    mask_values: tuple[float, ...] = ()
    """The mask band's values that mean nodata."""

    def __post_init__(self) -> None:
        # NaN differs from every NaN but itself: one object for all, so that rules that say the same are equal.
        for name in ("values", "mask_values"):
            given = getattr(self, name)
            once = dict.fromkeys(math.nan if math.isnan(value) else exact_number(value) for value in given)
            object.__setattr__(self, name, tuple(once))

    @property
    def is_plain(self) -> bool:
        """Whether one number says it all."""
        return len(self.values) <= 1 and not self.any_band and self.mask is None and not self.mask_band

    @property
    def band_rule(self) -> NodataRule:
        """What the mask band alone says."""
        return NodataRule(values=self.mask_values)

    def __str__(self) -> str:
        parts = [exact_text(value) for value in self.values] or ["none"]
        parts += ["in any band"] if self.any_band and (self.values or self.mask in ("bands", "parts")) else []
        parts += [f"{self.mask} mask{f' {self.masked_bands}' if self.masked_bands else ''}"] if self.mask else []
        parts += [f"band {self.mask_band} = {self.mask_values}"] if self.mask_band else []
        return ", ".join(parts)

    def may_miss(self, dtype: np.dtype[Any]) -> bool:
        """Whether a raster of that dtype can have nodata pixels; one of floats always can."""
        return dtype.kind == "f" or bool(self.values) or self.mask is not None or bool(self.mask_band)


def exact_text(value: float) -> str:
    """All digits of a value: two that differ must not look alike."""
    short = f"{value:g}"
    return short if math.isnan(value) or float(short) == value else repr(value)


def can_hold(dtype: np.dtype[Any], value: float) -> bool:
    """Whether a pixel of that type can have the value; of floats, one that rounds to it, as in the file."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # as written in 15 digits the largest number is a little larger
            return not math.isfinite(value) or bool(np.isfinite(dtype.type(value)))
    limits = np.iinfo(dtype)
    return math.isfinite(value) and limits.min <= value <= limits.max and value == int(value)


def find_missing(image: Array, rule: NodataRule) -> Mask | None:
    """(height, width) of an image (bands, height, width), True where its values say nodata; None where no pixel is."""
    if not rule.values and image.dtype.kind != "f":
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


def find_not_finite(image: Array) -> Mask | None:
    """(height, width) of an image (bands, height, width), True where a band holds NaN or infinity; None: nowhere."""
    found: Mask | None = None
    for band in image if image.dtype.kind == "f" else ():
        with np.errstate(over="ignore", invalid="ignore"):
            # One pass without a mask in memory: a sum is finite only where all of its terms are.
            if np.isfinite(band.sum()):
                continue
        strange = ~np.isfinite(band)
        if strange.any():
            found = strange if found is None else found | strange
    return found


def find_undeclared(image: Array, strange: Mask | None, rule: NodataRule) -> Mask | None:
    """The not finite pixels of which a band holds NaN or infinity that is none of the rule's values; None: nowhere.

    Args:
        strange: what `find_not_finite` gave.
    """
    if strange is None:
        return None
    pixels = image[:, strange]
    declared = np.isfinite(pixels)
    for value in rule.values:
        declared |= np.isnan(pixels) if math.isnan(value) else pixels == value
    found = np.zeros(strange.shape, np.bool_)
    found[strange] = ~declared.all(axis=0)
    return found if found.any() else None


def require_finite(image: Array, missing: Mask | None, strange: Mask | None, name: str, window: Window) -> None:
    """Refuse pixels that are not nodata and not finite in all of their bands.

    Args:
        strange: what `find_not_finite` gave.
        name: of the raster.

    Raises:
        NotFiniteError: names the first such pixel, its bands, and the remedy.
    """
    left = strange if strange is None or missing is None else strange & ~missing
    if left is None or not left.any():
        return
    y, x = (int(place[0]) for place in np.nonzero(left))
    held = [(band, value) for band, value in enumerate(image[:, y, x], 1) if not np.isfinite(value)]
    bands = "band " + ", ".join(str(band) for band, _ in held)
    raise NotFiniteError(
        f"{name}: networks get finite pixels, but row {window.y + y}, column {window.x + x} holds {held[0][1]:g} in "
        f"{bands} of {len(image)} and numbers in the others; --nodata-any (any_band=True) makes such pixels nodata"
    )


def join_missing(*masks: Mask | None) -> Mask | None:
    """True where one of the masks is; None where all are None."""
    found = [mask for mask in masks if mask is not None]
    return None if not found else np.logical_or.reduce(found)


def _holds(band: Array, values: tuple[float, ...]) -> Mask:
    found = ~np.isfinite(band) if band.dtype.kind == "f" else np.zeros(band.shape, np.bool_)
    for value in values:
        if math.isfinite(value) and can_hold(band.dtype, value):
            found |= band == band.dtype.type(value if band.dtype.kind == "f" else int(value))
    return found
