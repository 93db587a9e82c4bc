"""Rasters that GDAL opens: GeoTIFF, COG, VRT and the rest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.windows import Window as RasterioWindow

from .errors import RasterError
from .geometry import Window
from .georeference import from_rasterio
from .raster import Array, Raster, file_identity


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """A raster without georeference is an ordinary case, told by its description."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _open(path: str) -> rasterio.DatasetReader:
    with _quiet():
        return rasterio.open(path)


def describe_gdal(path: str) -> Raster:
    """Describe a file that GDAL reads.

    Raises:
        RasterError: GDAL cannot open it, or its bands differ in dtype.
    """
    try:
        with _quiet(), rasterio.open(path) as dataset:
            dtypes = set(dataset.dtypes)
            if len(dtypes) != 1:
                raise RasterError(f"{path}: all bands must have one dtype, got {sorted(dtypes)}; convert them first")
            nodata = {value for value in dataset.nodatavals if value is not None}
            if len({repr(value) for value in nodata}) > 1:
                raise RasterError(f"{path}: all bands must have one nodata value, got {sorted(nodata)}")
            names = tuple(text or f"band {i}" for i, text in enumerate(dataset.descriptions, start=1))
            dtype = dtypes.pop()
            return Raster(
                path=path,
                kind="gdal",
                shape=(dataset.count, dataset.height, dataset.width),
                dtype=np.dtype("int8" if dtype == "int8" else dtype),
                place=from_rasterio(dataset.crs, dataset.transform),
                nodata=nodata.pop() if nodata else None,
                band_names=names,
                block=dataset.block_shapes[0],
                identity=file_identity(Path(path)) if Path(path).exists() else "",
            )
    except TypeError as error:
        raise RasterError(f"{path}: pixels must be integers or real numbers; {_one_line(error)}") from error
    except RasterioError as error:
        raise RasterError(f"{path} is not a raster that GDAL can open: {_one_line(error)}") from error


class GdalReader:
    """Reads windows through one open dataset."""

    def __init__(self, raster: Raster) -> None:
        self._raster = raster
        try:
            self._dataset = _open(raster.path)
        except RasterioIOError as error:
            raise RasterError(f"{raster.path} is not a raster that GDAL can open: {_one_line(error)}") from error

    def read(self, window: Window) -> Array:
        place = RasterioWindow(window.x, window.y, window.width, window.height)  # pyright: ignore[reportCallIssue]
        try:
            return self._dataset.read(window=place)
        except RasterioError as error:
            # An open dataset may answer a later read with zeros after a failed one: open it again.
            self._dataset.close()
            self._dataset = _open(self._raster.path)
            raise RasterError(f"{self._raster.path}: window {window} cannot be read: {_one_line(error)}") from error

    def close(self) -> None:
        self._dataset.close()
