"""Rasters: what is known of one before a pixel is read, and readers of windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from affine import Affine
from rasterio.crs import CRS

from ..base.errors import OutputError, RasterError, UsageError
from ..base.exact_numbers import parse_number
from ..base.geometry import Window
from ..base.html import render_table
from ..base.typed import find_misfit
from ..system.places import is_far, place_of, scheme_of, url_of
from .band_names import find_named
from .block_cache import BlockStore
from .georeference import Georeference
from .nodata import Array, Mask, NodataRule, can_hold, find_not_finite, find_undeclared, require_finite
from .readers import READERS

if TYPE_CHECKING:
    from .arrays import KeptArray

_LISTED_BANDS = 16
"""That a refusal shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How a file is to be read where it does not say so itself, or says it wrongly."""

    axes: str | None = None
    """Order of a Zarr array's dimensions, such as "yxb"; t is one of length 1."""
    bands: tuple[int | str, ...] = ()
    """Bands to read, in this order, by their numbers from 1 or their names; empty: all. Of a raster that was opened:
    numbers."""
    names: tuple[str, ...] = ()
    """Of all bands, in place of the file's own, if they are as many; empty: those."""
    nodata: tuple[float, ...] | None = None
    """Nodata values in place of the file's own; empty: none; None: the file's own."""
    any_band: bool = False
    """One band's nodata makes the pixel nodata."""
    alpha: bool = False
    """The band tagged alpha is a mask (0: nodata), and no band. Without it an alpha tag means nothing: cameras' fourth
    bands carry it often."""
    mask_band: int | None = None
    """A data band that is a mask, from 1; it is no band then, unless `bands` names it."""
    mask_values: tuple[float, ...] = ()
    """Values of the mask band that mean nodata."""
    apply_scale: bool = False
    """Pixels are what the file's scale and offset tags make of stored numbers; nodata values are stored numbers."""
    trust: bool = False
    """The file may name other places and run code."""

    def to_json(self) -> dict[str, Any]:
        """Without `trust`: who reads this later is another user, perhaps."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, (), False)}
        values.pop("trust", None)
        if self.nodata is not None:
            values["nodata"] = [repr(value) for value in self.nodata]  # JSON has no NaN
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ReadOptions:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name != "trust"
        }
        try:
            if "nodata" in fields:
                fields["nodata"] = tuple(parse_number(value) for value in fields["nodata"])
            options = cls(**fields)
            misfit = find_misfit(options)
        except (TypeError, ValueError) as error:
            raise RasterError(f"options of reading are damaged: {error}") from error
        if misfit:
            raise RasterError(f"options of reading are damaged: {misfit} is {fields[misfit]!r:.60}")
        return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a stack or a mosaic."""

    raster: Raster
    y: int = 0
    """Of its first row and column in the whole."""
    x: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Raster:
    """A georeferenced (bands, y, x) array on disk, described; pixels are read through `open_reader`."""

    path: str
    kind: Literal["gdal", "zarr", "added", "stack", "mosaic", "scaled"]
    shape: tuple[int, int, int]
    """(bands, height, width)."""
    dtype: np.dtype[Any]
    place: Georeference
    nodata_rule: NodataRule
    band_names: tuple[str, ...]
    block: tuple[int, int]
    """(height, width) of the blocks that are decoded together."""
    block_bytes: int
    """What one decoded block holds."""
    identity: str
    """Changes when the raster's content does, as far as metadata tell: size and times of its files."""
    state: str = ""
    """Changes when its files on this machine are written to or replaced, whatever times they are given; empty: in an
    object store, whose tags are in the identity."""
    axes: str = "byx"
    """Order of the stored dimensions; 1: one of length 1 that is none of bands, y, x."""
    array_path: str = ""
    """Of the array inside a Zarr group."""
    format: str = ""
    """Of a file in an added format: its name."""
    format_place: str = ""
    """"module:name" of that format, where other processes do not know it by its name."""
    indexes: tuple[int, ...] = ()
    """Stored bands that are read, from 1, in order; empty: all."""
    mask_path: str = ""
    """Of the mask array inside a Zarr group."""
    parts: tuple[Part, ...] = ()
    """Of a stack or a mosaic; of a scaled raster that of the stored numbers."""
    sources: tuple[str, ...] = ()
    """All files of a stack or a mosaic."""
    files: tuple[str, ...] = ()
    """All files that it is read from, sidecars and a VRT's sources too."""
    scale_tags: tuple[tuple[float, float], ...] = ()
    """(scale, offset) of each band, which the file says and nobody has applied; empty: none."""
    remarks: tuple[str, ...] = ()
    """What the file holds beside this that is not read, or not kept; a line each."""
    options: ReadOptions = field(default_factory=ReadOptions)
    """As it was opened."""
    kept: KeptArray | None = field(default=None, repr=False, compare=False)
    """Where an array of this process lies."""

    @property
    def bands(self) -> int:
        return self.shape[0]

    @property
    def shape_yx(self) -> tuple[int, int]:
        return self.shape[1:]

    @property
    def crs(self) -> CRS | None:
        """None: the raster does not say where on the Earth it lies."""
        return self.place.crs

    @property
    def transform(self) -> Affine:
        """From (column, row) of a pixel's corner to (x, y) in the CRS; the identity where there is none."""
        return self.place.affine

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) in the CRS; of a rotated grid those of the rectangle around it."""
        height, width = self.shape_yx
        corners = [self.place.position_of(row, column) for row in (0, height) for column in (0, width)]
        xs, ys = zip(*corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def nodata(self) -> float | None:
        """The value of nodata pixels; the first of several."""
        return self.nodata_rule.values[0] if self.nodata_rule.values else None

    @property
    def pixel_bytes(self) -> int:
        """Of all bands."""
        return self.bands * self.dtype.itemsize

    @property
    def beside_bytes(self) -> int:
        """Of what a reader holds of each pixel beside the pixel itself: stored numbers, masks of bands."""
        if self.kind == "scaled":
            return self.parts[0].raster.pixel_bytes + self.parts[0].raster.beside_bytes
        return len(self.masked)

    @property
    def is_far(self) -> bool:
        """Whether any of it is reached through a network."""
        return any(is_far(name) for name in (self.path, *self.sources))

    @property
    def location(self) -> str:
        """Absolute path by which `open_raster` finds it again from any folder; GDAL's own names stay as they are."""
        if scheme_of(self.path):
            return f"{self.path}/{self.array_path}".rstrip("/")
        if not Path(self.path).exists():
            return self.path
        return str(Path(self.path).absolute() / self.array_path)

    def made_absolute(self) -> Raster:
        """The same raster, for processes in other folders: by absolute paths where it lies on this machine."""
        local = self.path and not scheme_of(self.path) and Path(self.path).exists()
        return replace(
            self,
            path=str(Path(self.path).absolute()) if local else self.path,
            parts=tuple(replace(part, raster=part.raster.made_absolute()) for part in self.parts),
        )

    @property
    def chosen(self) -> tuple[int, ...]:
        """Stored bands, from 1, that are read."""
        return self.indexes or tuple(range(1, self.bands + 1))

    @property
    def chosen_bands(self) -> tuple[int, ...]:
        """Its bands among all of the file, or of the stack, from 1: as `ReadOptions.bands` counts them."""
        if self.options.bands:
            return tuple(band for band in self.options.bands if isinstance(band, int))
        if self.kind in ("mosaic", "scaled"):
            return self.parts[0].raster.chosen_bands
        if self.kind == "stack":
            masked = self.options.mask_band
            return tuple(band for band in range(1, len(self.parts) + 1) if band != masked)
        return self.chosen

    @property
    def decoded(self) -> tuple[int, ...]:
        """Stored bands, from 1, that are decoded together, each once: those that are read, alpha and mask band."""
        rule = self.nodata_rule
        alpha = (rule.alpha_band,) if rule.mask == "alpha" else ()
        return tuple(dict.fromkeys((*self.chosen, *alpha, *((rule.mask_band,) if rule.mask_band else ()))))

    @property
    def masked(self) -> tuple[int, ...]:
        """Stored bands, from 1, that are read and have masks of their own; in order, each once."""
        own = self.nodata_rule.masked_bands
        return tuple(dict.fromkeys(band for band in self.chosen if band in own))

    def find_decoded(self, bands: Sequence[int]) -> slice | list[int]:
        """Where stored bands are among those that are decoded."""
        places = [self.decoded.index(band) for band in bands]
        run = slice(places[0], places[0] + len(places))
        return run if places == list(range(run.start, run.stop)) else places

    def read(self, window: Window | None = None, *, masked: bool = False) -> Array:
        """(bands, height, width) of a window inside the raster, in its dtype. None: the whole raster.

        For many windows `open_reader` is faster: it opens the file once.

        Args:
            masked: a numpy.ma array, nodata pixels masked in all bands.

        Raises:
            UsageError: the window reaches beyond the raster.
            RasterError: it cannot be read; names file and window.
        """
        whole = Window.whole(self.shape_yx)
        window = whole if window is None else window
        if not whole.contains(window):
            raise UsageError(f"a window must lie inside the raster of {whole.height} x {whole.width} px, got {window}")
        reader = self.open_reader()
        try:
            image = reader.read(window)
            if not masked:
                return image
            missing = reader.read_missing(window, image)
            mask = np.ma.nomask if missing is None else np.broadcast_to(missing, image.shape)
            return np.ma.MaskedArray(image, mask, fill_value=self.nodata)
        finally:
            reader.close()

    @property
    def name(self) -> str:
        """For people: its path, with the array's in it."""
        return f"{self.path}/{self.array_path}".rstrip("/") if self.path else "array"

    def __repr__(self) -> str:
        height, width = self.shape_yx
        nodata = "" if self.nodata is None else f", nodata {self.nodata:g}"
        bands = f"{self.bands} band{'s' if self.bands != 1 else ''}"
        return f"<Raster {self.name}: {bands} of {height} x {width} px, {self.dtype}{nodata}, {self.place.crs_name}>"

    def _repr_html_(self) -> str:
        rows = {
            "shape": f"{self.bands} x {self.shape_yx[0]} x {self.shape_yx[1]}, {self.dtype}",
            "bands": ", ".join(self.band_names[:_LISTED_BANDS]) + (", …" if self.bands > _LISTED_BANDS else ""),
            "nodata": "none" if self.nodata is None else f"{self.nodata:g}",
            "CRS": self.place.crs_name,
            "bounds": ", ".join(f"{number:.10g}" for number in self.bounds),
            "blocks": f"{self.block[0]} x {self.block[1]} px",
        }
        return render_table(f"Raster {self.name}", rows)

    def open_reader(self, blocks: BlockStore | None = None) -> RasterReader:
        """A reader for one thread at a time.

        Args:
            blocks: keeps and counts decoded blocks between windows; None: nothing is kept here.
        """
        return READERS.find(self.kind)(self, blocks)


class RasterReader(Protocol):
    """Reads windows of one raster; for one thread at a time."""

    def read(self, window: Window) -> Array:
        """(bands, height, width) of a window inside the raster, in the raster's dtype.

        Raises:
            RasterError: the window cannot be read; names file and window.
        """
        ...

    def read_missing(self, window: Window, image: Array) -> Mask | None:
        """(height, width), True where a pixel is nodata; `image` is what `read` gave for the window. None: nowhere.

        Raises:
            RasterError: the mask cannot be read.
        """
        ...

    def close(self) -> None: ...


def find_bands(src: str, names: Sequence[str], bands: Sequence[int | str]) -> tuple[int, ...]:
    """Numbers, from 1, of bands that are named or numbered.

    Args:
        names: of all bands that the file has.

    Raises:
        UsageError: no such band, or a name that several may have.
    """
    named = [band for band in bands if isinstance(band, str)]
    places = dict(zip(named, find_named(named, names), strict=True)) if named else {}
    found: list[int] = []
    for band in bands:
        if isinstance(band, int):
            if not 1 <= band <= len(names):
                raise UsageError(f"{src} has bands 1 to {len(names)}, got {band}")
            found.append(band)
            continue
        place = places[band]
        if place is None:
            listed = ", ".join(f"{number} {name}" for number, name in enumerate(names[:_LISTED_BANDS], start=1))
            more = f", ... ({len(names)})" if len(names) > _LISTED_BANDS else ""
            raise UsageError(f"{src} has no one band {band}, it has {listed}{more}; choose with --bands by number")
        found.append(place + 1)
    return tuple(found)


def pick_bands(raster: Raster, bands: tuple[int, ...]) -> Raster:
    """The raster with only those of its bands, from 1, in that order."""
    stored = raster.indexes or tuple(range(1, raster.bands + 1))
    return replace(
        raster,
        indexes=tuple(stored[band - 1] for band in bands),
        shape=(len(bands), *raster.shape_yx),
        band_names=tuple(raster.band_names[band - 1] for band in bands),
        scale_tags=tuple(raster.scale_tags[band - 1] for band in bands if raster.scale_tags),
    )


@dataclass(frozen=True, slots=True)
class FilledWindow:
    """What a network gets for a window, and which of its pixels were nodata."""

    image: Array
    """(bands, height, width), nodata and everything beyond the raster replaced by the fill value."""
    missing: npt.NDArray[np.bool_] | None
    """(height, width); None where every pixel is valid."""
    undeclared: Mask | None = None
    """(height, width), True at nodata pixels for NaN or infinity that the raster does not declare; None: nowhere."""


def read_filled(
    reader: RasterReader, raster: Raster, window: Window, fill: tuple[float, ...] | None = None
) -> FilledWindow:
    """Read a window that may reach beyond the raster's bottom and right, with nodata replaced by the fill value.

    Args:
        fill: one value a band; None: 0.

    Raises:
        RasterError: the window cannot be read.
        NotFiniteError: a pixel holds NaN or infinity in some of its bands only, and is not nodata.
        UsageError: a fill value that pixels cannot have.
    """
    values = fill_values(fill, raster)[:, None, None]
    inside = window.clamp(raster.shape_yx)
    image = reader.read(inside)
    missing = reader.read_missing(inside, image)
    strange = find_not_finite(image)
    require_finite(image, missing, strange, raster.path, inside)
    # Where masks speak too, or files of their own rules, nobody knows what is declared.
    is_plain = raster.nodata_rule.mask is None and not raster.nodata_rule.mask_band
    undeclared = find_undeclared(image, strange, raster.nodata_rule) if is_plain else None
    if missing is not None:
        image = np.where(missing[None], values, image)
    if inside != window:
        whole = np.empty((raster.bands, *window.shape), raster.dtype)
        whole[:] = values
        whole[:, : inside.height, : inside.width] = image
        image = whole
        if missing is not None:
            # Beyond the raster there is nothing valid either.
            beyond = np.ones(window.shape, np.bool_)
            beyond[: inside.height, : inside.width] = missing
            missing = beyond
        if undeclared is not None:
            rest = np.subtract(window.shape, inside.shape)
            undeclared = np.pad(undeclared, ((0, rest[0]), (0, rest[1])))
    return FilledWindow(np.ascontiguousarray(image), missing, undeclared)


def fill_values(fill: tuple[float, ...] | None, raster: Raster) -> Array:
    """(bands,) what stands in for nodata, in the raster's dtype; a fraction is cut off for integer pixels.

    Raises:
        UsageError: another number of values than bands, or one that pixels of that type cannot have.
    """
    values = fill if fill is not None else (0.0,) * raster.bands
    if not isinstance(values, Sequence) or not all(isinstance(value, Real) for value in values):
        raise UsageError(f"fill must be a number a band, got {fill!r}; give a tuple of {raster.bands}")
    if len(values) != raster.bands:
        raise UsageError(f"fill must have one value a band, {raster.bands} bands, got {len(values)} values")
    dtype = raster.dtype
    for band, value in enumerate(values, 1):
        if not math.isfinite(value) or not can_hold(dtype, value if dtype.kind == "f" else math.trunc(value)):
            limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
            raise UsageError(
                f"fill must be a value that {dtype} pixels can have, got {value:g} for band {band} of {raster.path}; "
                f"give one from {limits.min:g} to {limits.max:g}"
            )
    return np.asarray([value if dtype.kind == "f" else math.trunc(value) for value in values]).astype(dtype)


def file_identity(path: Path) -> str:
    """Place, size and modification time of a file."""
    status = path.stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def require_apart(raster: Raster, out: Path) -> None:
    """Refuse an output that is, or holds, what the raster is read from.

    Raises:
        OutputError: names both.
    """
    place = out.resolve()
    for file in (raster.path, *raster.sources, *raster.files):
        source = place_of(url_of(file) or file).resolve()
        if place == source or place in source.parents or (source.exists() and source in place.parents):
            raise OutputError(f"{out} and its source {file} lie in one another; choose another path")
