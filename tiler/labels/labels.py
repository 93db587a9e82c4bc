"""Labels: the class of every pixel of a raster, from a raster on its grid or from polygons, window by window."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from affine import Affine
from rasterio.features import rasterize

from ..base.errors import RasterError, UsageError
from ..base.geometry import Grid, Window
from ..rasters.georeference import Georeference
from ..rasters.opening import open_raster
from ..rasters.raster import Raster, RasterReader, file_identity
from .extent import describe_extent, find_origins
from .vectors import Features, Geometry, bounds_of, is_vector_file, read_features, to_pixels

UNLABELLED = 65535
"""Of pixels whose class is not known: nodata of the labels, or outside of all polygons."""
_UNSAID = (255, UNLABELLED)
"""What stands for that in rasters of bytes, and of two, that name no nodata; a class of this number goes before."""
BLOCK = 512
"""Side of the blocks in which polygons are burnt."""
_KEPT = 16
"""Burnt blocks that a reader keeps, 4 MB."""

Classes = npt.NDArray[np.uint16]


class LabelReader(Protocol):
    """Reads windows of labels; for one thread at a time."""

    def read(self, window: Window) -> Classes:
        """(height, width) of a window inside the raster: class numbers, UNLABELLED where none is known.

        Raises:
            RasterError: the window cannot be read.
            UsageError: a value that is no class.
        """
        ...

    @property
    def ignored(self) -> Mapping[int, int]:
        """Pixels, read so far, of each negative value that is no class."""
        ...

    def close(self) -> None: ...


class Labels(Protocol):
    """The class of every pixel of one raster."""

    @property
    def path(self) -> str: ...

    @property
    def class_values(self) -> tuple[str, ...]:
        """Value of each class in the file, in the order of the class numbers."""
        ...

    @property
    def note(self) -> str:
        """What is to be said of them: of what part they tell nothing; empty: nothing."""
        ...

    def open_reader(self) -> LabelReader: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterLabels:
    """A raster of one band on the grid of another."""

    raster: Raster
    values: tuple[int, ...]
    """Stored value of each class."""
    origins: tuple[tuple[int, int], ...] = ((0, 0),)
    """(y, x) of the grid's first pixel in the raster of labels, which may reach less far, or further. More than one
    where turns around the Earth bring it there again."""
    note: str = ""

    @property
    def path(self) -> str:
        return self.raster.path

    @property
    def class_values(self) -> tuple[str, ...]:
        return tuple(map(str, self.values))

    def open_reader(self) -> LabelReader:
        return _RasterLabelReader(self)


class _RasterLabelReader:
    def __init__(self, labels: RasterLabels) -> None:
        self._labels = labels
        self._reader: RasterReader = labels.raster.open_reader()
        order = np.argsort(labels.values)
        self._sorted = np.asarray(labels.values, np.int64)[order]
        self._class = order.astype(np.uint16)
        self._ignored: Counter[int] = Counter()

    @property
    def ignored(self) -> Mapping[int, int]:
        return self._ignored

    def read(self, window: Window) -> Classes:
        found = np.full(window.shape, UNLABELLED, np.uint16)
        height, width = self._labels.raster.shape_yx
        for top, left in self._labels.origins:
            y, x = window.y + top, window.x + left
            first, last = max(y, 0), min(y + window.height, height)
            start, stop = max(x, 0), min(x + window.width, width)
            if first < last and start < stop:
                place = Window(y=first, x=start, height=last - first, width=stop - start)
                found[first - y : last - y, start - x : stop - x] = self._read_stored(place)
        return found

    def _read_stored(self, place: Window) -> Classes:
        raster = self._labels.raster
        image = self._reader.read(place)
        missing, pixels = self._reader.read_missing(place, image), image[0]
        known = np.ones(pixels.shape, np.bool_) if missing is None else ~missing
        for value in unsaid_values(raster):
            if value not in self._labels.values:
                known &= pixels != value
        if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 8:
            # Beyond what int64 has, and no class either.
            pixels = pixels.clip(max=np.iinfo(np.int64).max)
        stored = pixels.astype(np.int64)
        at = np.searchsorted(self._sorted, stored).clip(max=len(self._sorted) - 1)
        strange = known & (self._sorted[at] != stored)
        # Nobody counts classes from below 0: such values say that there is none, as torch's ignore_index of -100 does.
        negative = strange & (stored < 0)
        if negative.any():
            values, counts = np.unique(stored[negative], return_counts=True)
            self._ignored.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            known &= ~negative
            strange &= ~negative
        if strange.any():
            raise UsageError(
                f"{raster.path}: labels must be {_numbers(self._labels.values)}, got {stored[strange].max()} in "
                f"window {place}; name its classes' values with --class-values, or what is no class with --label-nodata"
            )
        return np.where(known, self._class[at], np.uint16(UNLABELLED))

    def close(self) -> None:
        self._reader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class PolygonLabels:
    """Polygons burnt on a raster's grid: a pixel has the class of the last polygon that its centre lies in.

    They are burnt in blocks that lie fixed on the grid, so that a pixel's class does not depend on the window it is
    read in, and no more than some blocks are in memory.
    """

    path: str
    class_values: tuple[str, ...]
    shape_yx: tuple[int, int]
    geometries: tuple[Geometry, ...] = field(repr=False)
    """In (column, row) of the grid."""
    classes: Classes = field(repr=False)
    """Of each polygon."""
    bounds: npt.NDArray[np.float64] = field(repr=False)
    """(polygons, 4): least column and row, greatest column and row."""
    note: str = ""

    def open_reader(self) -> LabelReader:
        return _PolygonLabelReader(self)

    def burn(self, window: Window) -> Classes:
        """The classes of one window, burnt there and then."""
        left, top, right, bottom = self.bounds.T
        touching = (
            (left <= window.columns.stop) & (right >= window.x) & (top <= window.rows.stop) & (bottom >= window.y)
        )
        chosen = np.flatnonzero(touching)
        if not len(chosen):
            return np.full(window.shape, UNLABELLED, np.uint16)
        return rasterize(
            [(self.geometries[index], int(self.classes[index])) for index in chosen],
            out_shape=window.shape,
            fill=UNLABELLED,
            transform=Affine.translation(window.x, window.y),
            dtype="uint16",
        )


class _PolygonLabelReader:
    def __init__(self, labels: PolygonLabels) -> None:
        self._labels = labels
        self._grid = Grid(shape=labels.shape_yx, cell=(BLOCK, BLOCK))
        self._blocks: OrderedDict[tuple[int, int], Classes] = OrderedDict()

    @property
    def ignored(self) -> Mapping[int, int]:
        return {}

    def _block(self, row: int, column: int) -> Classes:
        at = (row, column)
        if at not in self._blocks:
            self._blocks[at] = self._labels.burn(self._grid.window(row, column))
            if len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(at)
        return self._blocks[at]

    def read(self, window: Window) -> Classes:
        found = np.empty(window.shape, np.uint16)
        for at in self._grid.cells_touching(window):
            block = self._grid.window(*at)
            y, x = max(block.y, window.y), max(block.x, window.x)
            height = min(block.rows.stop, window.rows.stop) - y
            width = min(block.columns.stop, window.columns.stop) - x
            part = Window(y=y, x=x, height=height, width=width)
            found[part.slices(window)] = self._block(*at)[part.slices(block)]
        return found

    def close(self) -> None:
        self._blocks.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions:
    """How labels are to be read."""

    values: tuple[str, ...] = ()
    """Of the classes, in the order of their numbers; empty: the classes' names for polygons that hold such texts,
    else 0, 1, 2, ..."""
    nodata: tuple[float, ...] | None = None
    """Values of a raster of labels that mean "not known", in place of its own."""
    field: str | None = None
    """Attribute of polygons that tells the class."""
    encoding: str | None = None
    """Of a vector file's texts."""
    trust: bool = False
    """Files may name other places and run code."""

    def require_use(self, sources: Sequence[str]) -> None:
        """Raises:
        UsageError: an option that is for labels of a kind of which there are none.
        """
        vectors = [is_vector_file(source) for source in sources]
        of_polygons = [
            name for name, value in (("--label-field", self.field), ("--label-encoding", self.encoding)) if value
        ]
        if of_polygons and not any(vectors):
            raise UsageError(f"{of_polygons[0]} is for polygons, but all labels are rasters; leave it out")
        if self.nodata and all(vectors):
            raise UsageError("--label-nodata is for rasters of labels, but all labels are polygons; leave it out")


def open_labels(
    src: str,
    place: Georeference,
    shape_yx: tuple[int, int],
    *,
    of: str,
    names: Sequence[str],
    options: LabelOptions,
    whole: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Labels:
    """Labels for a raster's grid; of rasters metadata are read, of vector files everything.

    Args:
        place: of the raster, and `shape_yx` its height and width.
        of: the raster's name, for messages.
        names: of the classes; as many as there are.
        whole: (shape, origin) of a larger grid of which the raster is a part, if labels of all of it will do too; only
            where it, or they, do not say where they lie.

    Raises:
        UsageError: labels on another grid, of several bands, or not of whole numbers; values that do not fit the names.
        RasterError: a file that cannot be read, or polygons of values that are no class.
    """
    if options.values and len(options.values) != len(names):
        raise UsageError(f"--class-values must be as many as the {len(names)} classes, got {len(options.values)}")
    if is_vector_file(src):
        return _open_polygons(src, place, shape_yx, of, names, options)
    raster = open_raster(src, nodata=options.nodata, trust=options.trust)
    if raster.bands != 1:
        raise UsageError(f"labels must be one band on the grid of {of}, got {raster.bands} bands in {src}")
    if raster.dtype.kind not in "ui":
        raise UsageError(f"labels must be whole numbers, {src} has {raster.dtype}; convert them first")
    origins = find_origins(raster, place, shape_yx, of, whole)
    try:
        values = tuple(int(value) for value in options.values) or tuple(range(len(names)))
    except ValueError:
        raise UsageError(
            f"--class-values of labels in a raster must be whole numbers, got {_few(options.values)}"
        ) from None
    if len(set(values)) != len(values):
        raise UsageError(f"--class-values must differ from each other, got {_few(options.values)}")
    return RasterLabels(
        raster=raster, values=values, origins=origins, note=describe_extent(raster, origins, shape_yx, of)
    )


def _open_polygons(
    src: str,
    place: Georeference,
    shape_yx: tuple[int, int],
    of: str,
    names: Sequence[str],
    options: LabelOptions,
) -> PolygonLabels:
    features = read_features(src, options.field, encoding=options.encoding, trust=options.trust)
    values = polygon_values(features, names, options)
    number = {value: index for index, value in enumerate(values)}
    ignored = find_ignored(set(features.values) - set(values))
    number |= dict.fromkeys(ignored, UNLABELLED)
    strange = sorted(set(features.values) - set(number))
    if strange:
        raise RasterError(
            f"{src}: {features.field} must be one of {_few(values)}, got {_few(strange)}; name all with --classes"
        )
    geometries = to_pixels(features, place, of, shape_yx)
    bounds = np.asarray([bounds_of(geometry) for geometry in geometries], np.float64)
    outside = (bounds[:, 2] < 0) | (bounds[:, 3] < 0) | (bounds[:, 0] > shape_yx[1]) | (bounds[:, 1] > shape_yx[0])
    if outside.all():
        raise RasterError(f"{src}: all polygons lie outside of {of}; are they of one place?")
    return PolygonLabels(
        path=src,
        class_values=values,
        shape_yx=shape_yx,
        geometries=tuple(geometries),
        classes=np.asarray([number[value] for value in features.values], np.uint16),
        bounds=bounds,
        note=f"{src}: polygons of {_few(ignored)} are of no class, and unlabelled" if ignored else "",
    )


def unsaid_values(raster: Raster) -> tuple[int, ...]:
    """Values of a raster of labels that mean "not known" though it names no nodata, unless they are classes."""
    return _UNSAID[: 2 if raster.dtype == np.uint16 else 1] if raster.nodata is None else ()


def find_ignored(values: Collection[str]) -> list[str]:
    """Of values of polygons that are no class, those that mean that there is none: numbers below 0, such as -100."""
    return sorted(value for value in values if value.startswith("-") and value[1:].isdecimal())


def describe_ignored(path: str, ignored: Mapping[int, int]) -> str:
    """One line on pixels whose value means no class."""
    values = ", ".join(f"{count:,} px of {value}" for value, count in sorted(ignored.items())[:8])
    return f"{path}: labels below 0 are of no class, and left out: {values}"


def identify_labels(src: str, *, trust: bool = False) -> str:
    """What changes when a file of labels does, as far as metadata tell.

    Raises:
        RasterError: no such file.
    """
    if not is_vector_file(src):
        return open_raster(src, trust=trust).identity
    # Of a shapefile the attributes lie beside it.
    files = [Path(src), *(Path(src).with_suffix(suffix) for suffix in (".dbf", ".cpg", ".prj"))]
    if not files[0].exists():
        raise RasterError(f"no such vector file: {src}")
    return " ".join(file_identity(file) for file in files if file.exists())


def polygon_values(features: Features, names: Sequence[str], options: LabelOptions) -> tuple[str, ...]:
    """Value of each class: as said, else the classes' names, else 0, 1, 2, ... where all polygons hold such numbers."""
    if options.values:
        return options.values
    numbers = tuple(map(str, range(len(names))))
    found = set(features.values) - set(find_ignored(features.values))
    return numbers if found <= set(numbers) and not set(features.values) & set(names) else tuple(names)


def _numbers(values: tuple[int, ...]) -> str:
    """0..5, or 3, 5, 9."""
    return f"0..{len(values) - 1}" if values == tuple(range(len(values))) else _few(values)


def _few(values: Sequence[Any]) -> str:
    """The first of several values."""
    shown = ", ".join(map(str, values[:8]))
    return f"{shown}, ... ({len(values)})" if len(values) > 8 else shown


def flag_meanings(raster: Raster) -> dict[int, str]:
    """Names of a raster's values where it says them, as CF does (flag_values, flag_meanings); Zarr only."""
    if raster.kind != "zarr":
        return {}
    import zarr

    attributes = dict(zarr.open_array(f"{raster.path}/{raster.array_path}".rstrip("/"), mode="r").attrs)
    values, meanings = attributes.get("flag_values"), attributes.get("flag_meanings")
    if not isinstance(values, list) or not isinstance(meanings, str) or len(values) != len(meanings.split()):
        return {}
    return {int(str(value)): name for value, name in zip(values, meanings.split(), strict=True)}
