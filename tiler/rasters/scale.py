"""Scale and offset tags: what stored numbers mean, and rasters that give that."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..base.errors import RasterError
from ..base.geometry import Window
from .block_cache import BlockStore
from .nodata import Array, Mask, NodataRule, find_missing, join_missing
from .raster import Part, Raster

ScaleTags = tuple[tuple[float, float], ...]
"""(scale, offset) of each band."""
_PART = 1 << 17
"""Pixels that are computed at once, so that float64 takes no memory to speak of."""
_KEPT_TAG = "bands"
"""Attribute for tags that differ between bands, as STAC's extension raster has them: CF knows one pair for an array."""


def known_tags(scales: Sequence[float], offsets: Sequence[float]) -> ScaleTags:
    """Of bands with such tags; empty where they change nothing."""
    tags = tuple((float(scale), float(offset)) for scale, offset in zip(scales, offsets, strict=True))
    return () if all(pair == (1.0, 0.0) for pair in tags) else tags


def describe_tags(tags: ScaleTags) -> str:
    """In words: one pair, or the first of several."""
    pairs = list(dict.fromkeys(tags))
    shown = "; ".join(f"scale {scale:.10g}, offset {offset:.10g}" for scale, offset in pairs[:3])
    return shown if len(pairs) == 1 else f"{shown}{'; ...' if len(pairs) > 3 else ''} (of bands in turn)"


def scaled_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Of values that stored numbers mean: float32 for numbers of up to 16 bits and for float32, else float64."""
    small = dtype.itemsize <= 2 or dtype == np.float32
    return np.dtype(np.float32 if small else np.float64)


def apply_tags(raster: Raster) -> Raster:
    """The raster whose pixels are number * scale + offset of the stored numbers, computed in float64 and rounded once;
    as it is where tags change nothing. What is nodata is decided on stored numbers.

    Raises:
        RasterError: tags that are no finite numbers, or a scale of 0.
    """
    if not raster.scale_tags:
        return raster
    for scale, offset in raster.scale_tags:
        if not (math.isfinite(scale) and math.isfinite(offset) and scale != 0):
            raise RasterError(
                f"{raster.path}: scale must be a number other than 0 and offset a number, its tags say {scale} and "
                f"{offset}; leave --apply-scale out"
            )
    rule = raster.nodata_rule
    has_nodata = bool(rule.values) or rule.mask is not None or bool(rule.mask_band)
    return replace(
        raster,
        kind="scaled",
        dtype=scaled_dtype(raster.dtype),
        # What is no number stays none.
        nodata_rule=NodataRule(
            values=tuple(value for value in rule.values if not math.isfinite(value)),
            mask="parts" if has_nodata else None,
        ),
        parts=(Part(raster=raster),),
        scale_tags=(),
    )


def tag_attributes(raster: Raster, zarr_format: int) -> dict[str, Any]:
    """Attributes of an array in a Zarr store that keep the tags: CF's where all bands have the same."""
    tags, nodata = raster.scale_tags, raster.nodata
    if not tags:
        return {}
    if len(set(tags)) > 1:
        entries = zip(raster.band_names, tags, strict=True)
        return {
            _KEPT_TAG: [
                {"name": name, "raster:scale": scale, "raster:offset": offset} for name, (scale, offset) in entries
            ]
        }
    kept: dict[str, Any] = {"scale_factor": tags[0][0], "add_offset": tags[0][1]}
    if nodata is not None and zarr_format == 3:
        # xarray makes floats of such numbers anyway, and looks here for those that are none: of Zarr v3, where its own
        # fill value says nothing, as base64 of a double.
        packed = base64.standard_b64encode(struct.pack("<d", nodata)).decode()
        kept["_FillValue"] = int(nodata) if raster.dtype.kind in "ui" else packed
    return kept


def tags_of_attributes(attributes: Mapping[str, Any], bands: int) -> ScaleTags:
    """What `tag_attributes`, CF or STAC says of an array's stored numbers."""
    pairs: list[list[float]] = []
    for key, neutral in (("scale_factor", 1.0), ("add_offset", 0.0)):
        value = attributes.get(key, neutral)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in values):
            return ()
        pairs.append([float(entry) for entry in values] * (bands if len(values) == 1 else 1))
    if any(len(values) != bands for values in pairs):
        return ()
    tags = known_tags(*pairs)
    if tags:
        return tags
    for key in (_KEPT_TAG, "raster:bands"):
        entries = attributes.get(key)
        if isinstance(entries, list) and len(entries) == bands and all(isinstance(entry, dict) for entry in entries):
            scales, offsets = (
                [entry.get(f"raster:{name}", entry.get(name, neutral)) for entry in entries]
                for name, neutral in (("scale", 1.0), ("offset", 0.0))
            )
            if all(isinstance(value, (int, float)) for value in (*scales, *offsets)):
                return known_tags(scales, offsets)
    return ()


class ScaledReader:
    """Reads windows of a raster's stored numbers, and gives what they mean.

    Args:
        raster: of kind "scaled".
        blocks: keeps and counts decoded blocks between windows.
    """

    def __init__(self, raster: Raster, blocks: BlockStore | None = None) -> None:
        self._stored = raster.parts[0].raster
        self._dtype = raster.dtype
        self._reader = self._stored.open_reader(blocks)
        self._last: tuple[Window, Array] | None = None
        """Stored numbers of the window that was read last, since nodata is decided on those."""

    def read(self, window: Window) -> Array:
        numbers = self._reader.read(window)
        self._last = window, numbers
        image = np.empty(numbers.shape, self._dtype)
        rows = max(1, _PART // max(1, window.width))
        with np.errstate(over="ignore", invalid="ignore"):
            for band, (scale, offset) in enumerate(self._stored.scale_tags):
                for row in range(0, window.height, rows):
                    part = numbers[band, row : row + rows].astype(np.float64)
                    image[band, row : row + rows] = part * scale + offset
        return image

    def read_missing(self, window: Window, image: Array) -> Mask | None:
        if self._last is None or self._last[0] != window:
            self.read(window)
        assert self._last is not None
        # A number that the type of what it means cannot hold means nothing.
        beyond = find_missing(image, NodataRule(any_band=self._stored.nodata_rule.any_band))
        return join_missing(self._reader.read_missing(window, self._last[1]), beyond)

    def close(self) -> None:
        self._reader.close()
        self._last = None
