"""Rasters made of several files: bands on one grid (a stack), or pieces of one grid (a mosaic)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import RasterError
from ..base.geometry import Interval, Window
from .band_names import is_named
from .block_cache import BlockStore
from .georeference import find_offset
from .nodata import Array, Mask, NodataRule, find_missing, join_missing
from .opening import open_with
from .raster import Part, Raster, RasterReader, ReadOptions, find_bands, pick_bands
from .scale import apply_tags, describe_tags, known_tags

OPEN_FILES = 64
"""Files that one reader keeps open, at most."""
OPEN_BYTES = 64_000_000
"""Decoded blocks that open files may hold together, if it is more than one file's."""


def open_stack(sources: Sequence[str | os.PathLike[str]], options: ReadOptions | None = None) -> Raster:
    """Several files on one grid as the bands of one raster, in the order given.

    A pixel is nodata where all files hold their own nodata value, or where one file's mask says so.

    Args:
        options: for every file; its `bands` and `mask_band` count the bands of the stack.

    Raises:
        RasterError: no file, or files of different grids or dtypes; both are shown.
    """
    options = options or ReadOptions()
    rasters = _open_all(
        sources, replace(options, bands=(), names=(), mask_band=None, mask_values=(), apply_scale=False)
    )
    first = rasters[0]
    for raster in rasters[1:]:
        _require_equal(first, raster, "dtype", first.dtype, raster.dtype)
        if raster.shape_yx != first.shape_yx or _offset(first, raster) != (0, 0):
            raise RasterError(f"a stack's files must lie on one grid: {_grid(first)}, but {_grid(raster)}")
    names = [
        name if is_named(name) else (_name_of(raster) if raster.bands == 1 else f"{_name_of(raster)} {i}")
        for raster in rasters
        for i, name in enumerate(raster.band_names, start=1)
    ]
    if len(options.names) == len(names):
        names = list(options.names)
    stored = [Part(raster=pick_bands(raster, (band,))) for raster in rasters for band in range(1, raster.bands + 1)]
    mask_band = options.mask_band
    numbers = find_bands("the stack", names, options.bands)
    options = replace(options, bands=numbers)
    if mask_band is not None:
        find_bands("the stack", names, (mask_band,))
    chosen = numbers or tuple(band for band in range(1, len(stored) + 1) if band != mask_band)
    parts = tuple(stored[band - 1] for band in chosen)
    rules = {part.raster.nodata_rule for part in parts}
    plain = len(rules) == 1 and next(iter(rules)).is_plain
    # Where the files disagree, no one value speaks for the pixel.
    rule = next(iter(rules)) if plain else NodataRule(any_band=options.any_band, mask="parts")
    if mask_band is not None:
        # The mask band is one more part, behind those that are bands.
        parts = (*parts, stored[mask_band - 1])
        rule = replace(rule, mask_band=len(parts), mask_values=options.mask_values)
    tags = [tag for raster in rasters for tag in raster.scale_tags or ((1.0, 0.0),) * raster.bands]
    stack = Raster(
        path=str(sources[0]),
        kind="stack",
        shape=(len(chosen), *first.shape_yx),
        dtype=first.dtype,
        place=first.place,
        nodata_rule=rule,
        band_names=tuple(names[band - 1] for band in chosen),
        block=first.block,
        block_bytes=_open_bytes(rasters),
        identity=_identity(parts),
        state=_state(parts),
        parts=parts,
        sources=tuple(raster.location for raster in rasters),
        files=tuple(dict.fromkeys(file for raster in rasters for file in raster.files)),
        scale_tags=known_tags(*zip(*(tags[band - 1] for band in chosen), strict=True)),
        remarks=tuple(dict.fromkeys(remark for raster in rasters for remark in raster.remarks)),
        options=options,
    )
    return apply_tags(stack) if options.apply_scale else stack


def _name_of(raster: Raster) -> str:
    """That of the file, or of the array in a store."""
    return raster.array_path.rpartition("/")[2] or Path(raster.path).stem


def open_mosaic(sources: Sequence[str | os.PathLike[str]], options: ReadOptions | None = None) -> Raster:
    """Several pieces of one grid as one raster over the rectangle that holds them all.

    Where pieces overlap, the first of them that has data in the pixel counts; where there is none, the pixel is nodata.

    Args:
        options: for every piece.

    Raises:
        RasterError: no file; pieces without georeference, of different grids, dtypes or bands; both are shown.
    """
    options = options or ReadOptions()
    rasters = _open_all(sources, options)
    first = rasters[0]
    places: list[tuple[int, int]] = []
    for raster in rasters:
        if raster.place.transform is None:
            raise RasterError(f"{raster.path} does not say where it lies; a mosaic needs pieces with a transform")
        _require_equal(first, raster, "dtype", first.dtype, raster.dtype)
        _require_equal(first, raster, "number of bands", first.bands, raster.bands)
        if raster.scale_tags != first.scale_tags:
            raise RasterError(
                f"a mosaic's pieces must mean the same by their numbers: {first.path} has "
                f"{describe_tags(first.scale_tags) or 'no scale'}, {raster.path} "
                f"{describe_tags(raster.scale_tags) or 'no scale'}; join what they mean with --apply-scale"
            )
        offset = _offset(first, raster)
        if offset is None:
            raise RasterError(f"a mosaic's pieces must lie on one grid: {_grid(first)}, but {_grid(raster)}")
        places.append(offset)
    top, left = min(y for y, _ in places), min(x for _, x in places)
    parts = tuple(Part(raster=raster, y=y - top, x=x - left) for raster, (y, x) in zip(rasters, places, strict=True))
    rules = {raster.nodata_rule for raster in rasters}
    # One nodata value for all: missing pieces hold it too, and nothing else needs to be said.
    plain = len(rules) == 1 and next(iter(rules)).is_plain and bool(next(iter(rules)).values)
    return Raster(
        path=str(sources[0]),
        kind="mosaic",
        shape=(
            first.bands,
            max(part.y + part.raster.shape_yx[0] for part in parts),
            max(part.x + part.raster.shape_yx[1] for part in parts),
        ),
        dtype=first.dtype,
        place=first.place.moved(top, left),
        nodata_rule=next(iter(rules)) if plain else NodataRule(any_band=options.any_band, mask="parts"),
        band_names=first.band_names,
        block=first.block,
        block_bytes=_open_bytes(rasters),
        identity=_identity(parts),
        state=_state(parts),
        parts=parts,
        sources=tuple(raster.location for raster in rasters),
        files=tuple(dict.fromkeys(file for raster in rasters for file in raster.files)),
        scale_tags=first.scale_tags,
        remarks=tuple(dict.fromkeys(remark for raster in rasters for remark in raster.remarks)),
        options=options,
    )


def reference_to(raster: Raster) -> dict[str, Any]:
    """What `open_reference` needs to describe the raster again from any folder, as plain values."""
    stored = raster.parts[0].raster if raster.kind == "scaled" else raster
    return {
        "kind": stored.kind if stored.parts else "file",
        "paths": list(raster.sources) or [raster.location],
        "options": raster.options.to_json(),
    }


def open_reference(reference: dict[str, Any], *, trust: bool = False) -> Raster:
    """The raster that a reference names.

    Args:
        trust: as in `open_raster`; a reference does not say it, since it may come from others.

    Raises:
        RasterError: it is no longer there.
    """
    options = replace(ReadOptions.from_json(reference["options"]), trust=trust)
    if reference["kind"] == "file":
        return open_with(reference["paths"][0], options)
    return (open_stack if reference["kind"] == "stack" else open_mosaic)(reference["paths"], options)


def _count_open(rasters: Sequence[Raster]) -> int:
    """Files that a reader keeps open: each holds the block that it decoded last."""
    largest = max(raster.block_bytes for raster in rasters)
    return max(1, min(OPEN_FILES, len(rasters), OPEN_BYTES // max(1, largest)))


def _open_bytes(rasters: Sequence[Raster]) -> int:
    return _count_open(rasters) * max(raster.block_bytes for raster in rasters)


def _open_all(sources: Sequence[str | os.PathLike[str]], options: ReadOptions) -> list[Raster]:
    if not sources:
        raise RasterError("a stack or mosaic needs at least one file, got none")
    return [open_with(source, options) for source in sources]


def _require_equal(first: Raster, other: Raster, what: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise RasterError(f"all files must have one {what}: {first.path} has {wanted}, {other.path} has {got}")


def _offset(first: Raster, other: Raster) -> tuple[int, int] | None:
    """(rows, columns) from one raster's corner to the other's; None where they are not pieces of one grid."""
    return find_offset(first.place, other.place, other.shape_yx)


def _grid(raster: Raster) -> str:
    height, width = raster.shape_yx
    crs = raster.place.crs
    name = crs.to_string() if crs else "no CRS"
    where = "no transform"
    if raster.place.transform is not None:
        a, b, c, d, e, f = raster.place.transform
        turn = f", rotation {b:.10g} {d:.10g}" if raster.place.is_rotated else ""
        where = f"corner {c:.10g} {f:.10g}, pixel {a:.10g} {e:.10g}{turn}"
    return f"{raster.path} has {height} x {width} px, {name if len(name) < 60 else name[:57] + '...'}, {where}"


def _identity(parts: Sequence[Part]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.raster.identity} {part.raster.indexes} {part.y} {part.x}\n".encode())
    return digest.hexdigest()[:32]


def _state(parts: Sequence[Part]) -> str:
    states = [part.raster.state for part in parts]
    return hashlib.sha256(" ".join(states).encode()).hexdigest()[:32] if any(states) else ""


def count_pixel_bytes(raster: Raster) -> int:
    """Of all that is decoded for a pixel: bands, and masks beside them. Of a mosaic, where one piece lies."""
    if raster.kind == "scaled":
        return count_pixel_bytes(raster.parts[0].raster)
    if raster.kind == "mosaic":
        return max(count_pixel_bytes(part.raster) for part in raster.parts)
    if raster.kind == "stack":
        return sum(count_pixel_bytes(file) for file, _ in _group_files(raster.parts))
    beside = 1 if raster.nodata_rule.mask in ("dataset", "array") else len(raster.masked)
    return len(raster.decoded) * raster.dtype.itemsize + beside


def has_gdal(raster: Raster) -> bool:
    """Whether GDAL reads any of it."""
    return raster.kind == "gdal" or any(has_gdal(part.raster) for part in raster.parts)


def _group_files(parts: Sequence[Part]) -> list[tuple[Raster, list[int]]]:
    """The files of a stack, each with all bands that are read of it, and the places of those among the parts: a file
    whose bands lie together is decoded once for all of them."""
    places: dict[tuple[str, str], list[int]] = {}
    for index, part in enumerate(parts):
        places.setdefault((part.raster.path, part.raster.array_path), []).append(index)
    return [
        (
            replace(
                parts[found[0]].raster,
                indexes=tuple(parts[index].raster.indexes[0] for index in found),
                shape=(len(found), *parts[found[0]].raster.shape_yx),
            ),
            found,
        )
        for found in places.values()
    ]


class PartsReader:
    """Reads windows of a stack or a mosaic through its files' own readers.

    Args:
        blocks: keeps and counts decoded blocks of all files together.
    """

    def __init__(self, raster: Raster, blocks: BlockStore | None = None) -> None:
        self._raster, self._blocks = raster, blocks
        groups = _group_files(raster.parts) if raster.kind == "stack" else []
        self._places = [places for _, places in groups]
        """Of a stack: the parts that each file gives."""
        self._file_of = {place: file for file, places in enumerate(self._places) for place in places}
        self._files = [file for file, _ in groups] or [part.raster for part in raster.parts]
        self._masked: dict[int, int] = {}
        """Of a stack: places among the files of parts whose band has a mask of its own."""
        for place, part in enumerate(raster.parts if raster.kind == "stack" else ()):
            if part.raster.masked:
                self._masked[place] = len(self._files)
                self._files.append(part.raster)
        self._readers: dict[int, RasterReader] = {}
        self._most = _count_open(self._files)
        self._last: tuple[Window, Array, Mask | None] | None = None
        """Of a mosaic: what was read last, since its mask comes with its pixels."""
        self._marked: tuple[Window, Array] | None = None
        """Of a stack with a mask band: that band of the window that was read last."""

    def _reader(self, index: int) -> RasterReader:
        if index in self._readers:
            self._readers[index] = self._readers.pop(index)  # last used, last closed
        else:
            if len(self._readers) >= self._most:
                self._readers.pop(next(iter(self._readers))).close()
            self._readers[index] = self._files[index].open_reader(self._blocks)
        return self._readers[index]

    def read(self, window: Window) -> Array:
        return self._read_stack(window) if self._raster.kind == "stack" else self._read_mosaic(window)[0]

    def read_missing(self, window: Window, image: Array) -> Mask | None:
        rule = self._raster.nodata_rule
        if self._raster.kind == "mosaic":
            return self._read_mosaic(window)[1] if rule.mask == "parts" else find_missing(image, rule)
        if rule.mask is None:
            missing = find_missing(image, rule)
        else:
            missing = self._combine(
                [self._part_missing(i, window, image[i : i + 1]) for i in range(self._raster.bands)], window
            )
        if rule.mask_band:
            if self._marked is None or self._marked[0] != window:
                self._read_stack(window)
            assert self._marked is not None
            marked, self._marked = self._marked[1], None
            missing = join_missing(missing, find_missing(marked, rule.band_rule))
        return missing if missing is not None and missing.any() else None

    def _read_stack(self, window: Window) -> Array:
        image = np.empty((self._raster.bands, *window.shape), self._raster.dtype)
        marking = self._raster.nodata_rule.mask_band - 1
        for file, places in enumerate(self._places):
            pixels = self._reader(file).read(window)
            for place, band in zip(places, pixels, strict=True):
                if place < self._raster.bands:
                    image[place] = band
                if place == marking:
                    self._marked = window, band[None].copy()
        return image

    def _part_missing(self, index: int, window: Window, image: Array) -> tuple[Mask | None, Mask | None]:
        """(by value, by mask) of one file of a stack."""
        rule = self._raster.parts[index].raster.nodata_rule
        if index in self._masked:
            # A band's own mask speaks for the band alone, as its value does.
            return self._reader(self._masked[index]).read_missing(window, image), None
        by_value = find_missing(image, rule)
        masked = rule.mask is not None or rule.mask_band > 0
        return by_value, self._reader(self._file_of[index]).read_missing(window, image) if masked else None

    def _combine(self, own: list[tuple[Mask | None, Mask | None]], window: Window) -> Mask | None:
        by_value = [value for value, _ in own]
        nowhere = np.zeros(window.shape, np.bool_)
        join = np.logical_or if self._raster.nodata_rule.any_band else np.logical_and
        values = join.reduce([nowhere if mask is None else mask for mask in by_value])
        # A file's mask speaks for the pixel, its value for the band alone.
        masks = [
            everything & ~value if value is not None else everything
            for value, everything in own
            if everything is not None
        ]
        return join_missing(values, *masks)

    def _read_mosaic(self, window: Window) -> tuple[Array, Mask | None]:
        if self._last is not None and self._last[0] == window:
            return self._last[1:]
        raster = self._raster
        image = np.empty((raster.bands, *window.shape), raster.dtype)
        # In gaps without a nodata value NaN, where pixels can have it: a 0 would count as a pixel.
        nothing = 0 if raster.dtype.kind != "f" else np.nan
        image[:] = raster.dtype.type(raster.nodata if raster.nodata is not None else nothing)
        empty = np.ones(window.shape, np.bool_)
        for index, part in enumerate(raster.parts):
            height, width = part.raster.shape_yx
            rows = _common(window.rows, Interval(start=part.y, stop=part.y + height))
            columns = _common(window.columns, Interval(start=part.x, stop=part.x + width))
            if rows is None or columns is None:
                continue
            at = Window.from_intervals(rows, columns)
            inside = (slice(None), *at.slices(window))
            wanted = empty[inside[1:]]
            if not wanted.any():
                continue
            reader = self._reader(index)
            own = Window(y=at.y - part.y, x=at.x - part.x, height=at.height, width=at.width)
            pixels = reader.read(own)
            missing = reader.read_missing(own, pixels)
            taken = wanted if missing is None else wanted & ~missing
            image[inside] = np.where(taken, pixels, image[inside])
            empty[inside[1:]] &= ~taken
        missing = empty if empty.any() else None
        self._last = (window, image, missing)
        return image, missing

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._last = self._marked = None


def _common(a: Interval, b: Interval) -> Interval | None:
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    return Interval(start=start, stop=stop) if start < stop else None
