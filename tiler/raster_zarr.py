"""Rasters in Zarr v2 and v3: our own stores and those of others."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.errors import BaseZarrError

from .errors import RasterError
from .geometry import Window
from .georeference import Georeference, from_attributes, from_centres
from .nodata import Array, Mask, NodataRule, find_missing, join_missing
from .raster import Raster

_AXIS_NAMES = {
    "b": ("b", "band", "bands", "c", "channel", "channels", "class"),
    "y": ("y", "lat", "latitude", "northing", "row", "rows", "height"),
    "x": ("x", "lon", "longitude", "easting", "column", "columns", "col", "width"),
}
_METADATA_FILES = ("zarr.json", ".zarray", ".zgroup")


def split_zarr_path(path: Path) -> tuple[Path, str] | None:
    """(store, path inside it) where `path` is a Zarr node or lies below one; None where it is no Zarr."""
    if path.is_file():
        return None
    top: Path | None = None
    for folder in (path, *path.parents):
        if any((folder / name).is_file() for name in _METADATA_FILES):
            top = folder
        elif top is not None:
            break
    return None if top is None else (top, path.relative_to(top).as_posix().removeprefix("."))


def describe_zarr(store: Path, inner: str, axes: str | None = None) -> Raster:
    """Describe a raster array in a Zarr store.

    Raises:
        RasterError: no such node, an ambiguous group, or an array whose axis order nobody tells.
    """
    name = f"{store}/{inner}".rstrip("/")
    try:
        node = zarr.open(str(store), mode="r", path=inner or None)
    except (BaseZarrError, OSError, ValueError, KeyError) as error:
        raise RasterError(f"{name} is not a Zarr raster: {str(error).splitlines()[0]}") from error
    if isinstance(node, zarr.Group):
        arrays = {key: array for key, array in node.arrays() if array.ndim in (2, 3)}
        beside = {_mask_name(array) for array in arrays.values()}
        candidates = sorted(key for key in arrays if key not in beside)
        ours = dict(node.attrs).get("outsize")
        if isinstance(ours, dict) and ours.get("kind") in candidates:
            # A result of ours: the arrays beside it tell of tiles and context.
            candidates = [str(ours["kind"])]
        if len(candidates) != 1:
            found = f"it has {', '.join(candidates)}" if candidates else "it has none"
            raise RasterError(f"{name} must hold one raster array, {found}; name one, such as {name}/NAME")
        inner = f"{inner}/{candidates[0]}".lstrip("/")
        array, group = node[candidates[0]], node
    else:
        array = node
        parent = inner.rpartition("/")[0]
        try:
            group = zarr.open_group(str(store), mode="r", path=parent or None) if inner else None
        except (BaseZarrError, OSError, ValueError, KeyError):
            group = None
    if not isinstance(array, zarr.Array):
        raise RasterError(f"{name} is not a Zarr array")
    if array.ndim not in (2, 3):
        raise RasterError(f"{name}: a raster has 2 or 3 dimensions, got shape {array.shape}")

    attributes = dict(array.attrs)
    order = _axis_order(name, array, attributes, axes)
    extents = dict(zip(order, array.shape, strict=True))
    chunks = dict(zip(order, array.chunks, strict=True))
    shape = (int(extents.get("b", 1)), int(extents["y"]), int(extents["x"]))
    group_attributes = dict(group.attrs) if group is not None else {}
    mask = _mask_name(array)
    if mask and (group is None or mask not in group):
        raise RasterError(f"{name} names {mask} as its mask, but there is none; the store is damaged")
    dtype = np.dtype(array.dtype)
    return Raster(
        path=str(store),
        kind="zarr",
        shape=shape,
        dtype=dtype,
        place=_georeference(group, attributes, group_attributes, order, array),
        nodata_rule=NodataRule(values=_nodata(attributes), mask="array" if mask else None),
        band_names=_band_names(group, shape[0]),
        block=(int(chunks["y"]), int(chunks["x"])),
        block_bytes=int(np.prod([int(extent) for extent in array.chunks], dtype=object)) * dtype.itemsize,
        identity=_identity(store, inner),
        axes=order,
        array_path=inner,
        mask_path=f"{inner.rpartition('/')[0]}/{mask}".lstrip("/") if mask else "",
    )


def _mask_name(array: zarr.Array[Any]) -> str:
    """Of the array beside this one that says where its pixels are valid; as CF's ancillary variables go."""
    named = str(dict(array.attrs).get("ancillary_variables", "")).split()
    return "mask" if "mask" in named else ""


def _axis_order(name: str, array: zarr.Array[Any], attributes: Mapping[str, Any], axes: str | None) -> str:
    if axes is not None:
        if sorted(axes) not in (sorted("byx"), sorted("yx")) or len(axes) != array.ndim:
            raise RasterError(f"--axes must order b, y and x for {array.ndim} dimensions, such as yxb; got {axes!r}")
        return axes
    names = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    if names is None or any(entry is None for entry in names):
        if array.ndim == 2:
            return "yx"
        raise RasterError(f"{name} does not say which of its dimensions {array.shape} are bands, y, x; give --axes yxb")
    letters = [
        next((letter for letter, known in _AXIS_NAMES.items() if str(entry).lower() in known), "?") for entry in names
    ]
    order = "".join(letters)
    if sorted(order) not in (sorted("byx"), sorted("yx")):
        raise RasterError(f"{name}: dimensions {list(names)} are not bands, y, x; give --axes yxb")
    return order


def _georeference(
    group: zarr.Group | None,
    attributes: Mapping[str, Any],
    group_attributes: Mapping[str, Any],
    order: str,
    array: zarr.Array[Any],
) -> Georeference:
    mapping = attributes.get("grid_mapping", "spatial_ref")
    spatial_ref: Mapping[str, Any] | None = None
    if group is not None and isinstance(mapping, str) and mapping in group:
        spatial_ref = dict(group[mapping].attrs)
    place = from_attributes({**group_attributes, **attributes}, spatial_ref)
    if place.transform is None and group is not None:
        names = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS") or ()
        coordinates = {letter: str(entry) for letter, entry in zip(order, names, strict=False) if entry in group}
        if "y" in coordinates and "x" in coordinates:
            y, x = group[coordinates["y"]], group[coordinates["x"]]
            if isinstance(y, zarr.Array) and isinstance(x, zarr.Array) and y.ndim == x.ndim == 1:
                return Georeference(crs_wkt=place.crs_wkt, transform=from_centres(np.asarray(y[:]), np.asarray(x[:])))
    return place


def _nodata(attributes: Mapping[str, Any]) -> tuple[float, ...]:
    for key in ("nodata", "_FillValue", "missing_value"):
        value = attributes.get(key)
        if isinstance(value, str):
            if value.lower() == "nan":
                return (float("nan"),)
            try:
                # xarray stores the fill value of floats in Zarr v3 as base64 of a little-endian double.
                return (float(struct.unpack("<d", base64.standard_b64decode(value))[0]),)
            except (ValueError, struct.error):
                continue
        if isinstance(value, (int, float)):
            return (float(value),)
    return ()


def _band_names(group: zarr.Group | None, count: int) -> tuple[str, ...]:
    if group is not None and "band" in group:
        names = group["band"]
        if isinstance(names, zarr.Array) and names.shape == (count,):
            return tuple(str(entry) for entry in names[:])  # pyright: ignore[reportGeneralTypeIssues]
    recorded = (dict(group.attrs) if group is not None else {}).get("band_names")
    if isinstance(recorded, list) and len(recorded) == count:
        return tuple(str(entry) for entry in recorded)
    return tuple(f"band {number}" for number in range(1, count + 1))


def _identity(store: Path, inner: str) -> str:
    """Hash of the metadata, with the times at which the array's folders changed."""
    digest = hashlib.sha256()
    folder = store / inner
    for name in _METADATA_FILES:
        file = folder / name
        if file.is_file():
            digest.update(json.dumps([name, file.read_text()]).encode())
    for path in (folder, folder / "c"):
        if path.is_dir():
            digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:32]


class ZarrReader:
    """Reads windows of one Zarr array, whatever the order of its axes."""

    def __init__(self, raster: Raster) -> None:
        self._raster = raster
        array = zarr.open(raster.path, mode="r", path=raster.array_path or None)
        assert isinstance(array, zarr.Array)
        self._array = array
        self._mask = zarr.open_array(raster.path, mode="r", path=raster.mask_path) if raster.mask_path else None

    def _take(self, array: zarr.Array[Any], window: Window, pick: tuple[Any, ...]) -> Array:
        try:
            return np.asarray(array.oindex[pick] if any(isinstance(p, list) for p in pick) else array[pick])
        except (BaseZarrError, OSError, ValueError, RuntimeError, MemoryError) as error:
            name = f"{self._raster.path}/{array.path}".rstrip("/")
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RasterError(f"{name}: window {window} cannot be read: {reason}") from error

    def _read(self, window: Window, indexes: tuple[int, ...]) -> Array:
        rows, columns = window.slices()
        bands = [index - 1 for index in indexes] if indexes else slice(None)
        pick = {"b": bands, "y": rows, "x": columns}
        block = self._take(self._array, window, tuple(pick[letter] for letter in self._raster.axes))
        if "b" not in self._raster.axes:
            block = block[None]
            order = "b" + self._raster.axes
        else:
            order = self._raster.axes
        return np.ascontiguousarray(block.transpose([order.index(letter) for letter in "byx"]))

    def read(self, window: Window) -> Array:
        return self._read(window, self._raster.indexes)

    def read_missing(self, window: Window, image: Array) -> Mask | None:
        rule = self._raster.nodata_rule
        missing = find_missing(image, rule)
        if rule.mask == "band":
            marked = NodataRule(values=rule.mask_values)
            return join_missing(missing, find_missing(self._read(window, (rule.mask_band,)), marked))
        if self._mask is not None:
            missing = join_missing(missing, self._take(self._mask, window, window.slices()) == 0)
            return missing if missing is not None and missing.any() else None
        return missing

    def close(self) -> None:
        pass
