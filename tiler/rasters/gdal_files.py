"""Rasters that GDAL opens: GeoTIFF, COG, VRT and the rest."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.env import get_gdal_config
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.session import DummySession
from rasterio.windows import Window as RasterioWindow

from ..base.errors import RasterError
from ..base.geometry import Window
from ..system.file_state import states_of
from ..system.places import identify, is_far, place_of, set_gdal_options, url_of
from ..system.process_locks import ProcessLock
from .band_names import assumed_name
from .block_cache import BlockStore
from .gdal_trust import drivers_for, explain_drivers, open_by
from .georeference import from_rasterio
from .nodata import Array, Mask, NodataRule, find_missing, join_missing
from .raster import Raster, ReadOptions, file_identity
from .scale import known_tags
from .stored_bands import StoredBands, StoredMasks

# GDAL's warnings and errors reach Python's logging through rasterio, and from there a terminal as soon as nobody else
# listens. What matters of them stands in the error that is raised.
logging.getLogger("rasterio").addHandler(logging.NullHandler())
# While a file is opened they go to stderr past Python, unless GDAL is told of a log.
os.environ.setdefault("CPL_LOG", os.devnull)


def _reason(error: BaseException) -> str:
    """GDAL's first complaint, in one line: the last is often no more than "see previous exception"."""
    deepest = error
    while (cause := deepest.__cause__ or deepest.__context__) is not None:
        deepest = cause
    return " ".join(str(deepest).split()) or type(deepest).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """A raster without georeference is an ordinary case, told by its description."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


_LISTING = "GDAL_DISABLE_READDIR_ON_OPEN"
"""How GDAL learns what lies beside a file, such as its mask. By default it lists the folder, and takes the first
GDAL_READDIR_LIMIT_ON_OPEN (1000) names for all; with EMPTY_DIR it does not look; with TRUE it asks by name. All but
the last lose masks in a bucket without a word."""

log = logging.getLogger(__name__)


@cache
def warn_of_overlooking(value: str) -> None:
    """Say once in each process what a setting of the user's, which is obeyed, may cost."""
    log.warning(
        "%s=%s is set: nodata in a file beside a raster, such as a .msk, may be overlooked; unset it to have all found",
        _LISTING,
        value,
    )


_IN_TURN = ProcessLock()
"""GDAL holds locks of its own while it tells of a request that failed, and rasterio wants Python's lock to pass that
on; another thread may hold that one while it waits for GDAL's: both would wait for ever. So what goes through a network
is asked for by one thread of a process at a time."""
_NAMES = "CPL_VSIL_CURL_ALLOWED_EXTENSIONS"
_OF_TIFFS = (".tif", ".tiff", ".msk", ".aux.xml", ".tfw", ".wld")
"""All that GDAL need ask for by name: else it asks for some fifty that only other formats have, at each opening."""


@contextmanager
def _reaching(*names: str) -> Iterator[None]:
    """Around what GDAL does for files, with options if one of them is far: those of the process would hold for local
    files too.

    In the main thread other threads see them, and may take these for the user's: TRUE is set again therefore, or it
    could end before their calls do. To ask by name finds the same beside local files.
    """
    far, value = list(filter(is_far, names)), get_gdal_config(_LISTING)
    is_users = value not in (None, "TRUE")
    if is_users and (far or str(value).upper() == "EMPTY_DIR"):
        warn_of_overlooking(str(value))
    # Below a VRT may be anything.
    if not far and not any(name.startswith("/vsi") or name.lower().endswith(".vrt") for name in names):
        yield
        return
    options = {} if is_users or not far else {_LISTING: "TRUE"}
    if far and all(name.lower().endswith(_OF_TIFFS) for name in far) and _NAMES not in os.environ:
        options[_NAMES] = ",".join(_OF_TIFFS)
    # GDAL finds credentials itself, as without an Env; to make a session of them takes 57 ms each time.
    with _IN_TURN, rasterio.Env.from_defaults(session=DummySession(), **options) if options else nullcontext():
        yield


def _open(path: str, files: Iterable[str] = (), *, trust: bool = False) -> rasterio.DatasetReader:
    """Open a file; of what is made of others, such as a VRT, `files` are those."""
    if path.startswith("/vsi"):
        set_gdal_options()
    try:
        with _quiet():
            drivers = drivers_for(path, trust=trust)
    except (RasterioError, TypeError, ValueError) as error:
        raise RasterError(f"{path} names a raster that GDAL cannot open: {_reason(error)}") from error
    try:
        with _quiet(), _reaching(path, *files):
            return rasterio.open(path) if drivers is None else open_by(path, drivers)
    except (RasterioError, TypeError, ValueError) as error:
        reason = _reason(error) if drivers is None else explain_drivers(path, _reason(error))
        raise RasterError(f"{path} is not a raster that GDAL can open: {reason}") from error


def describe_gdal(path: str, options: ReadOptions) -> Raster:
    """Describe a file that GDAL reads; with `options.alpha` the band tagged alpha is its mask.

    Raises:
        RasterError: GDAL cannot open it, its bands differ in dtype, or its pixels are complex.
    """
    with _reaching(path), _quiet(), _open(path, trust=options.trust) as dataset, _reaching(path, *dataset.files):
        try:
            _require_bands(path, dataset)
            dtypes = set(dataset.dtypes)
            if len(dtypes) != 1:
                raise RasterError(f"{path}: all bands must have one dtype, got {sorted(dtypes)}; convert them first")
            name = dtypes.pop()
            if "complex" in name:
                raise RasterError(
                    f"{path}: pixels must be integers or real numbers, got {name}; take magnitude or parts first"
                )
            dtype = np.dtype(name)
            rule = _find_rule(dataset, options)
            block = dataset.block_shapes[0]
            together = dataset.count if dataset.interleaving == Interleaving.pixel else 1
            return Raster(
                path=path,
                kind="gdal",
                shape=(dataset.count, dataset.height, dataset.width),
                dtype=dtype,
                place=from_rasterio(dataset.crs, dataset.transform, _ask(dataset, "gcps")),
                nodata_rule=rule,
                band_names=_band_names(dataset),
                block=block,
                block_bytes=block[0] * block[1] * dtype.itemsize * together,
                identity=_identity(path, dataset.files),
                state=_state(path, dataset.files),
                files=tuple(dataset.files[:10_000]),
                scale_tags=known_tags(_ask(dataset, "scales"), _ask(dataset, "offsets")),
                remarks=tuple(_list_remarks(dataset)),
            )
        except RasterError:
            raise
        except Exception as error:  # GDAL's own classes too, which rasterio does not export
            raise RasterError(f"{path} cannot be described: {_reason(error)}") from error


def _ask(dataset: rasterio.DatasetReader, what: str) -> Any:
    """A property of a dataset. What GDAL remarked before, such as a tag that it does not know, may fail the next
    question, and that one alone: so it is put again."""
    with suppress(Exception):
        return getattr(dataset, what)
    return getattr(dataset, what)


_SHOWN = 8
"""Rasters of a container that a message names."""


def _require_bands(path: str, dataset: rasterio.DatasetReader) -> None:
    """Refuse what holds other rasters, such as a netCDF file of several variables, and none of its own."""
    if dataset.count:
        return
    names = list(_ask(dataset, "subdatasets"))
    if not names:
        raise RasterError(f"{path} has no raster band; does it hold vectors or a table?")
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    raise RasterError(
        f"{path} holds {len(names)} rasters, {', '.join(names[:_SHOWN])}{more}; name one of them in its place, such as "
        f"'{names[0]}'"
    )


def _list_remarks(dataset: rasterio.DatasetReader) -> Iterator[str]:
    points, others = _ask(dataset, "gcps")[0], _ask(dataset, "subdatasets")
    if _ask(dataset, "rpcs") is not None:
        yield "rational polynomial coefficients (RPC), which outputs do not keep"
    if points and not dataset.transform.is_identity:
        yield f"{len(points)} ground control points beside its transform, which outputs do not keep"
    if others:
        yield f"the first of {len(others)} rasters in the file; others are named {others[-1]}"


_COLOURS = frozenset(
    (
        ColorInterp.red,
        ColorInterp.green,
        ColorInterp.blue,
        ColorInterp.coastal,
        ColorInterp.pan,
        ColorInterp.rededge,
        ColorInterp.nir,
        ColorInterp.swir,
        ColorInterp.lwir,
        ColorInterp.tir,
    )
)
"""Of GDAL's colour interpretations those that say what a band is; an alpha tag says nothing."""


def _band_names(dataset: rasterio.DatasetReader) -> tuple[str, ...]:
    """Descriptions; of a file without any, the colours that its bands are tagged with."""
    texts = [text or "" for text in dataset.descriptions]
    if not any(texts):
        texts = [meaning.name if meaning in _COLOURS else "" for meaning in _ask(dataset, "colorinterp")]
        # A colour that two bands have names neither.
        texts = [text if texts.count(text) == 1 else "" for text in texts]
        if texts[:3] == ["red", "green", "blue"] and not any(texts[3:]):
            # GDAL tags three or four bytes so by itself, whatever they are.
            texts = [assumed_name(i, text) if text else "" for i, text in enumerate(texts, start=1)]
    return tuple(" ".join(text.split()) or f"band {i}" for i, text in enumerate(texts, start=1))


_FLOATS = 2**53
"""From here on floats are not every whole number."""


def _find_rule(dataset: rasterio.DatasetReader, options: ReadOptions) -> NodataRule:
    """Nodata as the file says it: by a value, by masks, or both. An alpha band counts only when asked for."""
    rule = NodataRule(values=tuple(value for value in dataset.nodatavals if value is not None))
    if options.alpha:
        tagged = [i for i, meaning in enumerate(_ask(dataset, "colorinterp"), start=1) if meaning == ColorInterp.alpha]
        return replace(rule, mask="alpha", alpha_band=tagged[0]) if tagged else rule
    flags = dataset.mask_flag_enums
    # GDAL has no word for a mask of one band's own.
    own = [band for band, found in enumerate(flags, start=1) if not found]
    # Numbers of 64 bits come through floats, which are not all of them, or not at all.
    said = [band for band, found in enumerate(flags, start=1) if MaskFlags.nodata in found]
    is_wide = np.dtype(dataset.dtypes[0]) in (np.int64, np.uint64)
    is_rounded = is_wide and any(
        abs(_FLOATS if (value := dataset.nodatavals[band - 1]) is None else value) >= _FLOATS for band in said
    )
    if (len(rule.values) > 1 or is_rounded) and options.nodata is None:
        # No one value speaks for all bands, or we do not know it, but GDAL's masks know each band's.
        own += [band for band, value in enumerate(dataset.nodatavals, start=1) if value is not None or band in said]
        rule = NodataRule()
    if own:
        return replace(rule, mask="bands", masked_bands=tuple(sorted(set(own))))
    if MaskFlags.per_dataset in flags[0] and MaskFlags.alpha not in flags[0]:
        return replace(rule, mask="dataset")
    return rule


def _identity(path: str, files: list[str]) -> str:
    """Of the file, its sidecars and, for a VRT, its sources; the same however its path is spelled."""
    found = list(dict.fromkeys(file_identity(file) for file in _read_files(path, files)))
    for url in filter(None, map(url_of, (path, *files))):
        # What GDAL reads without credentials of ours may not be asked here: then its name must do.
        with suppress(Exception):
            found.append(identify(place_of(url)))
    return hashlib.sha256(";".join([_resolved(path, files), *found]).encode()).hexdigest()[:32]


def _state(path: str, files: list[str]) -> str:
    """Of the files that its identity speaks of."""
    found = sorted(set(states_of(_read_files(path, files))))
    return hashlib.sha256(";".join(found).encode()).hexdigest()[:32] if found else ""


def _read_files(path: str, files: list[str]) -> list[Path]:
    """The files on this machine that pixels come from."""
    paths = [_inside(path), *(_inside(file) for file in files)]
    # What viewers leave beside a file changes no pixel; the nodata value that it may name is in the fingerprint.
    return [file for file in dict.fromkeys(paths) if file.is_file() and not file.name.endswith(_OF_VIEWERS)]


_OF_VIEWERS = (".aux.xml", ".ovr")
"""Statistics and overviews, which QGIS writes as soon as it shows a file."""


def _resolved(path: str, files: list[str]) -> str:
    """One of GDAL's names with the file in it by its resolved path: of GTIFF_DIR:2:a.tif, GTIFF_DIR:2:/there/a.tif."""
    if Path(path).exists():
        return str(Path(path).resolve())
    for name in (str(_inside(path)), *files):
        if name in path and Path(name).is_file():
            return path.replace(name, str(Path(name).resolve()), 1)
    return path


def _inside(name: str) -> Path:
    """The file on disk that one of GDAL's names means: of /vsizip/a.zip/b.tif, a.zip."""
    path = Path(name)
    if name.startswith("/vsi"):
        path = Path("/", *path.parts[2:]) if Path("/", *path.parts[2:3]).exists() else Path(*path.parts[2:])
    return next((part for part in (path, *path.parents) if part.is_file()), path)


class GdalReader:
    """Reads windows through one open dataset.

    Args:
        blocks: keeps and counts decoded blocks from window to window. GDAL's own cache is one for all files of a
            process, as large as it was told at its start, and counts nothing.
    """

    def __init__(self, raster: Raster, blocks: BlockStore | None = None) -> None:
        self._raster = raster
        # Looked at for every window; of thousands of files of a VRT, only those that matter.
        self._far_files = tuple(filter(is_far, raster.files))
        self._dataset: rasterio.DatasetReader | None = self._open()
        self._bands = StoredBands(raster, blocks, (raster.path, raster.decoded), self._read_bands)
        self._masks = StoredMasks(
            blocks,
            (raster.path, "mask", raster.masked),
            shape_yx=raster.shape_yx,
            block=raster.block,
            count=max(1, len(raster.masked)),
            decode=self._read_valid,
        )

    def _open(self) -> rasterio.DatasetReader:
        return _open(self._raster.path, self._far_files, trust=self._raster.options.trust)

    def _read_bands(self, window: Window, indexes: tuple[int, ...], *, mask: bool = False) -> Array:
        if self._dataset is None:
            self._dataset = self._open()
        dataset = self._dataset
        place = RasterioWindow(window.x, window.y, window.width, window.height)  # pyright: ignore[reportCallIssue]
        try:
            # A VRT opens its files as they are read.
            with _reaching(self._raster.path, *self._far_files):
                if mask:
                    return dataset.read_masks(list(indexes), window=place)
                return dataset.read(list(indexes), window=place)
        except (RasterioError, ValueError, MemoryError) as error:
            # An open dataset may answer a later read with zeros after a failed one: never use it again.
            self.close()
            raise RasterError(f"{self._raster.path}: window {window} cannot be read: {_reason(error)}") from error

    def _read_valid(self, window: Window) -> Array:
        """(masks, height, width): 0 where there is nothing; of the dataset, or of each band that has its own."""
        return self._read_bands(window, self._raster.masked or (1,), mask=True)

    def read(self, window: Window) -> Array:
        return self._bands.read(window, self._raster.chosen)

    def read_missing(self, window: Window, image: Array) -> Mask | None:
        rule = self._raster.nodata_rule
        marked = self._bands.find_marked(window)
        if self._raster.masked:
            return join_missing(self._find_in_bands(window, image), marked)
        return join_missing(find_missing(image, rule), self._find_in_mask(window, rule), marked)

    def _find_in_bands(self, window: Window, image: Array) -> Mask | None:
        """Where all bands hold nothing, or one does, each by its value or by its own mask."""
        raster, rule = self._raster, self._raster.nodata_rule
        valid = self._masks.read(window)
        holes = [
            join_missing(
                find_missing(image[place : place + 1], rule),
                valid[raster.masked.index(band)] == 0 if band in raster.masked else None,
            )
            for place, band in enumerate(raster.chosen)
        ]
        found = [hole for hole in holes if hole is not None]
        if not found or (len(found) < len(holes) and not rule.any_band):
            return None
        missing = (np.logical_or if rule.any_band else np.logical_and).reduce(found)
        return missing if missing.any() else None

    def _find_in_mask(self, window: Window, rule: NodataRule) -> Mask | None:
        if rule.mask == "dataset":
            return self._masks.find_missing(window)
        if rule.mask == "alpha":
            missing = self._bands.read(window, (rule.alpha_band,))[0] == 0
            return missing if missing.any() else None
        return None

    def close(self) -> None:
        if self._dataset is not None:
            with _reaching(self._raster.path, *self._far_files):
                self._dataset.close()
            self._dataset = None
