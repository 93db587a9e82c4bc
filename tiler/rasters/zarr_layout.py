"""Where in a Zarr store a raster lies: its array among others, the largest level of a pyramid, its order of axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr

from ..base.errors import RasterError

_AXIS_NAMES = {
    "b": ("b", "band", "bands", "c", "channel", "channels", "class"),
    "y": ("y", "lat", "latitude", "northing", "row", "rows", "height"),
    "x": ("x", "lon", "longitude", "easting", "column", "columns", "col", "width"),
}
ONE = "1"
"""In place of an axis's letter: an axis of length 1 beside bands, rows and columns, such as a time."""
_SHOWN = 12


def find_array(group: zarr.Group, name: str) -> str:
    """The path of the one raster in a group, below it where it is a pyramid whose metadata name its levels.

    Raises:
        RasterError: none, or several; names them.
    """
    level = _find_level(group, name)
    if level:
        node = group[level]
        return f"{level}/{find_array(node, f'{name}/{level}')}" if isinstance(node, zarr.Group) else level
    arrays = {key: array for key, array in group.arrays() if array.ndim >= 2}
    plain = {key: array for key, array in arrays.items() if array.ndim <= 3 or _count_long(array.shape) <= 3}
    beside = {other for array in arrays.values() for other in _named_beside(array, group)}
    candidates = sorted(key for key in plain or arrays if key not in beside)
    ours = dict(group.attrs).get("outsize")
    if isinstance(ours, dict) and ours.get("kind") in candidates:
        # A result of ours: the arrays beside it tell of tiles and context.
        candidates = [str(ours["kind"])]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise RasterError(
            f"{name} must hold one raster array, it has {_few(candidates)}; name one, such as {name}/{candidates[0]}"
        )
    groups = sorted(key for key, _ in group.groups())
    if groups:
        raise RasterError(
            f"{name} has no array of its own, but the groups {_few(groups)}; name one, such as {name}/{groups[0]}"
        )
    raise RasterError(f"{name} must hold one raster array, it has none; name a group or an array that has one")


def mask_name(array: zarr.Array[Any], group: zarr.Group | None) -> str:
    """Of the array beside this one that says where its pixels are valid, if it is one of ours.

    CF lets any array be called ancillary, so ours is known by its flags: 0 nodata, 255 valid.
    """
    named = str(dict(array.attrs).get("ancillary_variables", "")).split()
    if "mask" not in named or group is None or "mask" not in group:
        return ""
    mask = group["mask"]
    if not isinstance(mask, zarr.Array) or mask.ndim != 2 or mask.dtype != np.uint8:
        return ""
    attributes = dict(mask.attrs)
    ours = attributes.get("flag_values") == [0, 255] and attributes.get("flag_meanings") == "nodata valid"
    return "mask" if ours else ""


def _named_beside(array: zarr.Array[Any], group: zarr.Group) -> list[str]:
    """Arrays that an array names as what it is described by, as CF does, and its mask."""
    attributes = dict(array.attrs)
    named = [str(attributes.get(key, "")) for key in ("coordinates", "bounds", "grid_mapping")]
    return [mask_name(array, group), *" ".join(named).split()]


def _find_level(group: zarr.Group, name: str) -> str:
    """The level of most pixels of a pyramid, by multiscales metadata of OME-NGFF, ndpyramid or GeoZarr; empty where
    there are none. The first is not always the largest."""
    attributes = dict(group.attrs)
    ome = attributes.get("ome")
    said = attributes.get("multiscales") or (ome.get("multiscales") if isinstance(ome, Mapping) else None)
    entries = said if isinstance(said, list) else [said]
    if len(entries) > 1:
        raise RasterError(f"{name} holds {len(entries)} pyramids; name a level of one, such as {name}/0")
    entry: Any = entries[0]
    listed = (entry.get("datasets") or entry.get("layout")) if isinstance(entry, Mapping) else None
    if not isinstance(listed, list):
        return ""
    sizes: dict[str, int] = {}
    for level in listed:
        path = str(next((level[key] for key in ("path", "asset", "group") if level.get(key) is not None), ""))
        path = path.strip("/")
        if not path or path == "." or path not in group:
            continue
        node = group[path]
        shapes = [node.shape] if isinstance(node, zarr.Array) else [a.shape for _, a in node.arrays() if a.ndim >= 2]
        if shapes:
            sizes[path] = max(int(np.prod(shape, dtype=object)) for shape in shapes)
    return max(sizes, key=lambda path: sizes[path]) if sizes else ""


def dimension_names(array: zarr.Array[Any]) -> Any:
    return getattr(array.metadata, "dimension_names", None) or dict(array.attrs).get("_ARRAY_DIMENSIONS")


def order_axes(name: str, array: zarr.Array[Any], axes: str | None) -> str:
    """A letter for each dimension: b, y, x, and `ONE` for others, whose length is 1.

    Args:
        axes: what a user says of them.

    Raises:
        RasterError: an order that nobody tells, or another dimension that is longer than 1.
    """
    shape = array.shape
    if axes is not None:
        order = "".join(letter if letter in "byx" else ONE for letter in axes)
        fits = len(axes) == len(shape) and _is_order(order)
        if not fits or any(letter == ONE and extent != 1 for letter, extent in zip(order, shape, strict=True)):
            such = (
                f", such as {suggest_axes(shape)}" if _count_long(shape) <= 3 else ", more than 3 of which are longer"
            )
            raise RasterError(
                f"--axes must order b, y and x, and t for any other of length 1, for the {array.ndim} dimensions "
                f"{shape} of {name}{such}; got {axes!r}"
            )
        return order
    names = dimension_names(array)
    if names is None or any(entry is None for entry in names):
        if array.ndim == 2:
            return "yx"
        if _count_long(shape) > 3:
            raise RasterError(f"{name}: a raster has bands, rows and columns, got dimensions of {shape}; take one out")
        raise RasterError(
            f"{name} does not say which of its dimensions {shape} are bands, y, x; give --axes {suggest_axes(shape)}"
        )
    letters = [
        next((letter for letter, known in _AXIS_NAMES.items() if str(entry).lower() in known), "?") for entry in names
    ]
    for index, (letter, extent) in enumerate(zip(letters, shape, strict=True)):
        if extent == 1 and (letter == "?" or letters.count(letter) > 1):
            letters[index] = ONE
    order = "".join(letters)
    if _is_order(order):
        return order
    long = [(str(entry), extent) for entry, letter, extent in zip(names, letters, shape, strict=True) if letter == "?"]
    if "y" in letters and "x" in letters and long:
        entry, extent = long[0]
        remedy = f"take one out, such as with xarray's isel({entry}=0)"
        if "b" not in letters and len(long) == 1:
            remedy += f", or read them as bands: --axes {order.replace('?', 'b').replace(ONE, 't')}"
        raise RasterError(f"{name}: its dimension {entry} has {extent} entries, which are no bands, y or x; {remedy}")
    raise RasterError(
        f"{name}: dimensions {list(names)} of {shape} are not bands, y, x; give --axes {suggest_axes(shape)}"
    )


def _is_order(order: str) -> bool:
    return sorted(order.replace(ONE, "")) in (sorted("byx"), sorted("yx"))


def _count_long(shape: Sequence[int]) -> int:
    return sum(extent != 1 for extent in shape)


def suggest_axes(shape: Sequence[int]) -> str:
    """The likeliest order of an array's dimensions: the shortest of three are bands."""
    if len(shape) == 2:
        return "yx"
    # Of dimensions of length 1 the last ones may count.
    counted = sorted(range(len(shape)), key=lambda index: (shape[index] == 1, -index if shape[index] == 1 else 0))[:3]
    bands = min(sorted(counted), key=lambda index: shape[index])
    rest = iter("yx")
    return "".join(
        "b" if index == bands else next(rest, "?") if index in counted else "t" for index in range(len(shape))
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)})" if len(names) > _SHOWN else "")
