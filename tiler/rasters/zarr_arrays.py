"""Rasters in Zarr v2 and v3: our own stores and those of others."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.errors import BaseZarrError

from ..base.errors import RasterError, TilerError
from ..base.exact_numbers import exact_number, parse_number
from ..base.geometry import Window
from ..base.text import first_line
from ..system.file_state import keeps_numbers, state_of
from ..system.places import is_remote, place_of
from ..system.stores import store_at
from .band_names import band_name_of
from .block_cache import BlockStore
from .georeference import Georeference, from_attributes, from_centres
from .nodata import Array, Mask, NodataRule, find_missing, join_missing
from .raster import Raster
from .scale import tags_of_attributes
from .stored_bands import StoredBands, StoredMasks
from .zarr_bounds import MOST_BESIDE, bound_array
from .zarr_layout import ONE, dimension_names, find_array, mask_name, order_axes, suggest_axes

_MOST_BANDS = 65_535
_MOST_CENTRES = 1 << 22
"""Coordinates that are compared one by one; of more only the ends are looked at."""
_METADATA_FILES = ("zarr.json", ".zarray", ".zgroup")


def split_zarr_path(path: Path) -> tuple[Path, str] | None:
    """(store, path inside it) where `path` is a Zarr node or lies below one; None where it is no Zarr."""
    if path.is_file():
        return None
    if ".." in path.parts:
        path = path.resolve()
    top: Path | None = None
    for folder in (path, *path.parents):
        if any((folder / name).is_file() for name in _METADATA_FILES):
            top = folder
        elif top is not None:
            break
    return None if top is None else (top, path.relative_to(top).as_posix().removeprefix("."))


def describe_zarr(store: Path, inner: str, axes: str | None = None, *, trust: bool = False) -> Raster:
    """Describe a raster array in a Zarr store.

    Args:
        trust: codecs that are not known may be used.

    Raises:
        RasterError: no such node, an ambiguous group, an array whose axis order nobody tells, or damaged metadata.
    """
    name = f"{store}/{inner}".rstrip("/")
    try:
        return _describe(store, inner, name, axes, trust=trust)
    except TilerError:
        raise
    except Exception as error:
        # Whatever stands in somebody's metadata must not look like a fault of this program.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RasterError(f"{name} is not a Zarr raster that can be described: {reason}") from error


def _describe(store: Path, inner: str, name: str, axes: str | None, *, trust: bool) -> Raster:
    try:
        node = zarr.open(store_at(store, read_only=True), mode="r", path=inner or None)
    except (BaseZarrError, OSError, ValueError, KeyError) as error:
        raise RasterError(f"{name} is not a Zarr raster: {first_line(error)}") from error
    if isinstance(node, zarr.Group):
        inner = f"{inner}/{find_array(node, name)}".lstrip("/")
        node = zarr.open(store_at(store, read_only=True), mode="r", path=inner)
    array, parent = node, inner.rpartition("/")[0]
    try:
        group = zarr.open_group(store_at(store, read_only=True), mode="r", path=parent or None) if inner else None
    except (BaseZarrError, OSError, ValueError, KeyError):
        group = None
    if not isinstance(array, zarr.Array):
        raise RasterError(f"{name} is not a Zarr array")
    if array.ndim < 2:
        raise RasterError(f"{name}: a raster has 2 or 3 dimensions beside those of length 1, got shape {array.shape}")

    attributes = dict(array.attrs)
    order = order_axes(name, array, axes)
    extents = dict(zip(order, array.shape, strict=True))
    chunks = dict(zip(order, array.chunks, strict=True))
    array = bound_array(array, trust=trust)
    shape = (int(extents.get("b", 1)), int(extents["y"]), int(extents["x"]))
    if min(shape) < 1:
        raise RasterError(f"{name} has no pixels: bands, rows and columns are {shape}")
    if min(array.chunks) < 1:
        raise RasterError(f"{name} has chunks of {array.chunks} pixels; the store is damaged")
    if shape[0] > _MOST_BANDS:
        raise RasterError(
            f"{name} has {shape[0]} bands, more than {_MOST_BANDS}; is the order another? give --axes "
            f"{suggest_axes(array.shape)}"
        )
    group_attributes = dict(group.attrs) if group is not None else {}
    mask = mask_name(array, group)
    # As this machine orders bytes, whatever the store does.
    dtype = np.dtype(array.dtype).newbyteorder("=")
    block_bytes = int(np.prod([int(extent) for extent in array.chunks], dtype=object)) * dtype.itemsize
    if mask and group is not None:
        _bound_mask(group[mask], block_bytes)
    identity, state = _identify(store, inner)
    return Raster(
        path=str(store),
        kind="zarr",
        shape=shape,
        dtype=dtype,
        place=_georeference(group, attributes, group_attributes, order, array),
        nodata_rule=NodataRule(values=_nodata(array), mask="array" if mask else None),
        band_names=_band_names(array, group, order, shape[0], attributes),
        block=(int(chunks["y"]), int(chunks["x"])),
        block_bytes=block_bytes,
        identity=identity,
        state=state,
        axes=order,
        array_path=inner,
        files=(str(store),),
        scale_tags=tags_of_attributes(attributes, shape[0]),
        mask_path=f"{inner.rpartition('/')[0]}/{mask}".lstrip("/") if mask else "",
    )


def _bound_mask(mask: Any, block_bytes: int) -> zarr.Array[Any]:
    """The mask beside pixels whose chunks take so many bytes."""
    return bound_array(mask, most=max(MOST_BESIDE, block_bytes))


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
    if group is None or place.is_rotated:
        return place
    names = dimension_names(array) or ()
    coordinates = {letter: str(entry) for letter, entry in zip(order, names, strict=False) if entry in group}
    if "y" not in coordinates or "x" not in coordinates:
        return place
    y, x = group[coordinates["y"]], group[coordinates["x"]]
    extents = dict(zip(order, array.shape, strict=True))
    if not (isinstance(y, zarr.Array) and isinstance(x, zarr.Array)):
        return place
    if (
        y.shape != (extents["y"],)
        or x.shape != (extents["x"],)
        or y.dtype.kind not in "iuf"
        or x.dtype.kind not in "iuf"
    ):
        return place
    found = from_centres(_centres(y), _centres(x), (extents["y"], extents["x"]))
    if found is None:
        return place
    # A part that was cut out keeps the whole's transform among its attributes; coordinates are cut with the pixels.
    step = max(abs(found[0]), abs(found[4]))
    stale = place.transform is None or not np.allclose(found, place.transform, rtol=1e-9, atol=1e-3 * step)
    return Georeference(crs_wkt=place.crs_wkt, transform=found) if stale else place


def _centres(coordinate: zarr.Array[Any]) -> Array:
    """All values, or the first two and the last of very many."""
    bounded = bound_array(coordinate, most=MOST_BESIDE)
    if coordinate.shape[0] <= _MOST_CENTRES:
        return np.asarray(bounded[:])
    return np.concatenate([np.asarray(bounded[:2]), np.asarray(bounded[-1:])])


def _nodata(array: zarr.Array[Any]) -> tuple[float, ...]:
    """The nodata value by its attributes; of v2, where xarray keeps it there alone, by a fill value other than 0."""
    attributes = dict(array.attrs)
    ours = _number(attributes.get("nodata"))
    if ours is not None:
        return (ours,)
    # CF has two words for it; xarray takes what either says, and missing_value may say several.
    said = [attributes.get("_FillValue"), attributes.get("missing_value")]
    listed = [entry for value in said for entry in (value if isinstance(value, list) else [value])]
    values = [value for value in map(_number, listed) if value is not None]
    if values:
        return tuple(dict.fromkeys(values))
    fill = array.fill_value
    if getattr(array.metadata, "zarr_format", 3) == 2 and fill is not None:
        value = _number(fill.item() if hasattr(fill, "item") else fill)
        return (value,) if value is not None and value != 0 else ()
    return ()


def _number(value: Any) -> float | None:
    """A number, or a text that means one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return parse_number(value) if isinstance(value, str) else exact_number(value)
    except OverflowError:
        return None
    except ValueError:
        pass
    try:
        # xarray stores the fill value of floats in Zarr v3 as base64 of a little-endian double.
        return float(struct.unpack("<d", base64.standard_b64decode(str(value)))[0])
    except (ValueError, struct.error):
        return None


def _band_names(
    array: zarr.Array[Any], group: zarr.Group | None, order: str, count: int, attributes: Mapping[str, Any]
) -> tuple[str, ...]:
    """What a coordinate of the bands says, or a list among the attributes, of STAC's bands too; else numbers."""
    dimensions = dimension_names(array) or ()
    coordinate = str(dimensions[order.index("b")]) if "b" in order and len(dimensions) == len(order) else "band"
    numbers: tuple[str, ...] = ()
    if group is not None and coordinate in group:
        stored = group[coordinate]
        if isinstance(stored, zarr.Array) and stored.shape == (count,):
            values: Any = np.asarray(bound_array(stored, most=MOST_BESIDE)[:])
            found = tuple(
                band_name_of(entry.decode("utf-8", "replace") if isinstance(entry, bytes) else entry)
                for entry in values
            )
            if values.dtype.kind not in "iuf":
                return found
            numbers = found
    for said in (attributes, dict(group.attrs) if group is not None else {}):
        for key in ("band_names", "bands", "eo:bands", "long_name"):
            recorded = said.get(key)
            if isinstance(recorded, list) and len(recorded) == count:
                return tuple(band_name_of(entry) or f"band {number}" for number, entry in enumerate(recorded, start=1))
    return numbers or tuple(f"band {number}" for number in range(1, count + 1))


_MOST_ENTRIES = 200_000


def _identify(store: Path, inner: str) -> tuple[str, str]:
    """Identity and state: hashes of the metadata, and of the sizes, times and states of chunks and folders, up to very
    many."""
    digest, states = hashlib.sha256(str(store.resolve()).encode()), hashlib.sha256()
    if is_remote(store):
        # One listing, whose entries have sizes and ETags, or times.
        found: Any = store
        for name, entry in sorted(found.fs.find(found.path, detail=True).items())[:_MOST_ENTRIES]:
            digest.update(f"{name}:{entry.get('size')}:{entry.get('ETag') or entry.get('LastModified')}".encode())
        return digest.hexdigest()[:32], ""
    folder, numbered = store / inner, keeps_numbers(store)
    pending, seen = [folder], 0
    mask = folder.parent / "mask"
    if inner and mask.is_dir():
        pending.append(mask)
    while pending and seen < _MOST_ENTRIES:
        here = pending.pop()
        status = here.stat()
        digest.update(str(status.st_mtime_ns).encode())
        states.update(state_of(status, numbered=numbered).encode())
        with os.scandir(here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                seen += 1
                if entry.name in _METADATA_FILES:
                    digest.update(json.dumps([entry.name, Path(entry.path).read_text(errors="replace")]).encode())
                elif entry.is_dir():
                    pending.append(Path(entry.path))
                else:
                    status = entry.stat()
                    digest.update(f"{entry.name}:{status.st_size}:{status.st_mtime_ns}".encode())
                    states.update(f"{entry.name}:{state_of(status, numbered=numbered)}".encode())
    return digest.hexdigest()[:32], states.hexdigest()[:32]


class ZarrReader:
    """Reads windows of one Zarr array, and of the mask beside it, whatever the order of its axes.

    Args:
        blocks: keeps and counts decoded blocks from window to window.
    """

    def __init__(self, raster: Raster, blocks: BlockStore | None = None) -> None:
        self._raster = raster
        store = store_at(place_of(raster.path), read_only=True)
        array = zarr.open(store, mode="r", path=raster.array_path or None)
        assert isinstance(array, zarr.Array)
        self._array = bound_array(array, trust=raster.options.trust)
        self._bands = StoredBands(raster, blocks, (raster.path, raster.array_path, raster.decoded), self._read_bands)
        self._mask = self._masks = None
        if raster.mask_path:
            mask = zarr.open_array(store, mode="r", path=raster.mask_path)
            self._mask = _bound_mask(mask, raster.block_bytes)
            self._masks = StoredMasks(
                blocks,
                (raster.path, raster.mask_path),
                shape_yx=raster.shape_yx,
                block=(self._mask.chunks[0], self._mask.chunks[1]),
                count=1,
                decode=self._read_valid,
            )

    def _take(self, array: zarr.Array[Any], window: Window, pick: tuple[Any, ...]) -> Array:
        try:
            return np.asarray(array.oindex[pick] if any(isinstance(p, list) for p in pick) else array[pick])
        except Exception as error:  # codecs raise what they like
            name = f"{self._raster.path}/{array.path}".rstrip("/")
            reason = first_line(error)
            raise RasterError(f"{name}: window {window} cannot be read: {reason}") from error

    def _read_bands(self, window: Window, indexes: tuple[int, ...]) -> Array:
        rows, columns = window.slices()
        bands = slice(None) if indexes == tuple(range(1, self._stored + 1)) else [index - 1 for index in indexes]
        pick = {"b": bands, "y": rows, "x": columns, ONE: 0}
        block = self._take(self._array, window, tuple(pick[letter] for letter in self._raster.axes))
        order = self._raster.axes.replace(ONE, "")
        if "b" not in order:
            block = np.repeat(block[None], len(indexes), axis=0)
            order = "b" + order
        turned = block.transpose([order.index(letter) for letter in "byx"])
        return np.ascontiguousarray(turned, self._raster.dtype)

    @property
    def _stored(self) -> int:
        """Bands of the array."""
        return self._array.shape[self._raster.axes.index("b")] if "b" in self._raster.axes else 1

    def _read_valid(self, window: Window) -> Array:
        """(1, height, width) of the mask array: 0 where there is nothing."""
        assert self._mask is not None
        return self._take(self._mask, window, window.slices())[None]

    def read(self, window: Window) -> Array:
        return self._bands.read(window, self._raster.chosen)

    def read_missing(self, window: Window, image: Array) -> Mask | None:
        return join_missing(
            find_missing(image, self._raster.nodata_rule),
            self._bands.find_marked(window),
            self._masks.find_missing(window) if self._masks is not None else None,
        )

    def close(self) -> None:
        pass
