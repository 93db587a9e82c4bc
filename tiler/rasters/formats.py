"""Formats of raster files that others add, by the suffixes of their files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

from ..base.errors import RasterError, UsageError
from ..base.registry import Registry
from .georeference import Georeference

if TYPE_CHECKING:
    import numpy as np

    from ..base.geometry import Window
    from .nodata import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDescription:
    """What a file says of itself, without its pixels."""

    shape: tuple[int, int, int]
    """(bands, height, width)."""
    dtype: np.dtype[Any]
    """Of integers or real numbers."""
    block: tuple[int, int]
    """(height, width) of the blocks that are decoded together, of all bands."""
    place: Georeference = field(default_factory=Georeference)
    nodata: tuple[float, ...] = ()
    """Values of pixels that hold nothing."""
    band_names: tuple[str, ...] = ()
    """Of each band; empty: they are numbered."""
    files: tuple[str, ...] = ()
    """That pixels come from, beside the file itself."""


class NamedFormat(Protocol):
    """A class of open files, each for one thread at a time."""

    def __call__(self, path: str) -> Any:
        """Open a file of this machine."""
        ...

    def describe(self) -> FileDescription:
        """Without reading pixels."""
        ...

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """(bands, height, width) of a window inside the raster and of these bands, from 1, in this order; in the
        file's dtype. A file that cannot be read is an error, never zeros."""
        ...

    def close(self) -> None:
        """Nothing is read afterwards."""
        ...


FORMATS: Registry[Any] = Registry("raster format", "outsize.formats", {}, protocol=NamedFormat, kind=RasterError)
"""`NamedFormat` by suffix, without the dot, in small letters. Those of GDAL and Zarr are not to be had."""


def find_format(path: str) -> str:
    """The name of the added format that a file's suffix means; "": none.

    Raises:
        UsageError: GDAL or Zarr reads files of that suffix.
    """
    name = PurePath(path).suffix.lower().removeprefix(".")
    if not name or name not in FORMATS.names():
        return ""
    from rasterio.drivers import raster_driver_extensions

    if name == "zarr" or name in raster_driver_extensions():
        raise UsageError(
            f"raster format {name} is added, and .{name} files are GDAL's or Zarr's; register it by another suffix"
        )
    return name
