"""Rasters in formats that others add: described, and read with the rules for bands and nodata that all rasters have."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import RasterError
from ..base.geometry import Window
from ..base.text import first_line
from ..system.file_state import states_of
from .block_cache import BlockStore
from .formats import FORMATS, FileDescription
from .nodata import Array, Mask, NodataRule, find_missing, join_missing
from .raster import Raster, file_identity
from .stored_bands import StoredBands


def describe_added(path: str, name: str) -> Raster:
    """Describe a file of an added format.

    Raises:
        RasterError: it cannot be opened, or its description is none.
        UsageError: workers could not import the format.
    """
    place = FORMATS.place(name)
    file = _open(path, name, place)
    try:
        said = file.describe()
    except RasterError:
        raise
    except Exception as error:  # of another package's code
        raise RasterError(f"{path} cannot be described: {first_line(error)}") from error
    finally:
        file.close()
    _require_whole(path, said)
    files = (path, *said.files)
    paths = [Path(file) for file in files]
    identity = ";".join((name, *map(file_identity, paths)))
    bands, dtype = said.shape[0], np.dtype(said.dtype)
    return Raster(
        path=path,
        kind="added",
        format=name,
        format_place=place,
        shape=said.shape,
        dtype=dtype,
        place=said.place,
        nodata_rule=NodataRule(values=said.nodata),
        band_names=said.band_names or tuple(f"band {number}" for number in range(1, bands + 1)),
        block=said.block,
        block_bytes=said.block[0] * said.block[1] * dtype.itemsize * bands,
        identity=hashlib.sha256(identity.encode()).hexdigest()[:32],
        state=hashlib.sha256(";".join(states_of(paths)).encode()).hexdigest()[:32],
        files=files,
    )


def _open(path: str, name: str, place: str) -> Any:
    try:
        return FORMATS.find(name, place)(path)
    except RasterError:
        raise
    except Exception as error:  # of another package's code
        raise RasterError(f"{path} cannot be opened as {name}: {first_line(error)}") from error


def _require_whole(path: str, said: Any) -> None:
    """
    Raises:
        RasterError: not a description, or one that contradicts itself.
    """
    if not isinstance(said, FileDescription):
        raise RasterError(f"{path}: a format must describe a file by FileDescription, got {type(said).__name__}")
    if len(said.shape) != 3 or min(said.shape) < 1 or len(said.block) != 2 or min(said.block) < 1:
        raise RasterError(f"{path}: bands, height, width and block must be >= 1, got {said.shape} and {said.block}")
    if said.band_names and len(said.band_names) != said.shape[0]:
        raise RasterError(f"{path} names {len(said.band_names)} bands, and has {said.shape[0]}")


class AddedReader:
    """Reads windows through one open file of an added format.

    Args:
        blocks: keeps and counts decoded blocks from window to window.
    """

    def __init__(self, raster: Raster, blocks: BlockStore | None = None) -> None:
        self._raster = raster
        self._file: Any = None
        self._bands = StoredBands(raster, blocks, (raster.path, raster.decoded), self._decode)

    def _decode(self, window: Window, bands: tuple[int, ...]) -> Array:
        raster = self._raster
        if self._file is None:
            self._file = _open(raster.path, raster.format, raster.format_place)
        try:
            image = self._file.read(window, bands)
        except Exception as error:  # of another package's code
            # What failed once may answer wrongly later: it is opened anew.
            self.close()
            raise RasterError(f"{raster.path}: window {window} cannot be read: {first_line(error)}") from error
        expected = (len(bands), *window.shape)
        if not isinstance(image, np.ndarray) or image.shape != expected or image.dtype != raster.dtype:
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise RasterError(
                f"{raster.path}: format {raster.format} must read {raster.dtype} {expected} of window {window}, "
                f"got {got}"
            )
        return image

    def read(self, window: Window) -> Array:
        return self._bands.read(window, self._raster.chosen)

    def read_missing(self, window: Window, image: Array) -> Mask | None:
        return join_missing(find_missing(image, self._raster.nodata_rule), self._bands.find_marked(window))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
