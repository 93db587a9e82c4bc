"""Rasters: what is known of one before a pixel is read, and readers of windows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import RasterError
from .geometry import Window
from .georeference import Georeference

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raster:
    """A georeferenced (bands, y, x) array on disk, described; pixels are read through `open_reader`."""

    path: str
    kind: str
    """"gdal" or "zarr"."""
    shape: tuple[int, int, int]
    """(bands, height, width)."""
    dtype: np.dtype[Any]
    place: Georeference
    nodata: float | None
    band_names: tuple[str, ...]
    block: tuple[int, int]
    """(height, width) of the blocks that are decoded together."""
    identity: str
    """Changes when the raster's content does, as far as metadata tell: size and times of its files."""
    axes: str = "byx"
    """Order of the stored dimensions."""
    array_path: str = ""
    """Of the array inside a Zarr group."""

    @property
    def bands(self) -> int:
        return self.shape[0]

    @property
    def shape_yx(self) -> tuple[int, int]:
        return self.shape[1:]

    @property
    def location(self) -> str:
        """Absolute path by which `open_raster` finds it again from any folder; GDAL's own names stay as they are."""
        if not Path(self.path).exists():
            return self.path
        return str(Path(self.path).absolute() / self.array_path)

    def open_reader(self) -> RasterReader:
        """A reader for one thread at a time."""
        if self.kind == "zarr":
            from .raster_zarr import ZarrReader

            return ZarrReader(self)
        from .raster_gdal import GdalReader

        return GdalReader(self)


class RasterReader(Protocol):
    """Reads windows of one raster; for one thread at a time."""

    def read(self, window: Window) -> Array:
        """(bands, height, width) of a window inside the raster, in the raster's dtype.

        Raises:
            RasterError: the window cannot be read; names file and window.
        """
        ...

    def close(self) -> None: ...


def open_raster(src: str | os.PathLike[str], axes: str | None = None) -> Raster:
    """Describe a raster without reading pixels: whatever GDAL opens, and Zarr v2 and v3 groups and arrays.

    Args:
        src: a path. A Zarr group must hold one raster array, or the array is named: `scene.zarr/image`.
        axes: order of a Zarr array's dimensions, such as "yxb"; needed only where the array does not say it.

    Raises:
        RasterError: no such file, not a raster, complex or non-numeric pixels, an ambiguous group or axis order.
    """
    path = Path(src)
    from .raster_zarr import describe_zarr, split_zarr_path

    zarr_location = split_zarr_path(path)
    if zarr_location is not None:
        raster = describe_zarr(*zarr_location, axes=axes)
    else:
        from .raster_gdal import describe_gdal

        if not path.exists() and "://" not in str(src) and not str(src).startswith("/vsi"):
            raise RasterError(f"no such raster: {src}")
        if axes is not None:
            raise RasterError(f"--axes is for Zarr arrays, got a file that GDAL reads: {src}; leave it out")
        raster = describe_gdal(str(src))
    if raster.dtype.kind not in "uif":
        raise RasterError(f"{src}: pixels must be integers or real numbers, got {raster.dtype}; convert them first")
    return raster


def nodata_mask(image: Array, nodata: float | None) -> npt.NDArray[np.bool_] | None:
    """(height, width), True where all bands hold the nodata value; None where no pixel does."""
    if nodata is None:
        return None
    if np.isnan(nodata):
        if image.dtype.kind != "f":
            return None
        missing = np.asarray(np.isnan(image).all(axis=0))
    else:
        missing = np.asarray(image[0] == nodata)
        for band in image[1:]:
            if not missing.any():
                return None
            missing &= np.asarray(band == nodata)
    return missing if missing.any() else None


@dataclass(frozen=True, slots=True)
class FilledWindow:
    """What a network gets for a window, and which of its pixels were nodata."""

    image: Array
    """(bands, height, width), nodata and everything beyond the raster replaced by the fill value."""
    missing: npt.NDArray[np.bool_] | None
    """(height, width); None where every pixel is valid."""


def read_filled(
    reader: RasterReader, raster: Raster, window: Window, fill: tuple[float, ...] | None = None
) -> FilledWindow:
    """Read a window that may reach beyond the raster's bottom and right, with nodata replaced by the fill value.

    Args:
        fill: one value a band; None: 0.

    Raises:
        RasterError: the window cannot be read.
    """
    values = np.asarray(fill if fill is not None else (0,) * raster.bands).astype(raster.dtype)[:, None, None]
    inside = window.clamp(raster.shape_yx)
    image = reader.read(inside)
    missing = nodata_mask(image, raster.nodata)
    if missing is not None:
        image = np.where(missing[None], values, image)
    if inside != window:
        whole = np.empty((raster.bands, *window.shape), raster.dtype)
        whole[:] = values
        whole[:, : inside.height, : inside.width] = image
        image = whole
        if missing is not None:
            # Beyond the raster there is nothing valid either.
            beyond = [(0, window.height - inside.height), (0, window.width - inside.width)]
            missing = np.pad(missing, beyond, constant_values=True)
    return FilledWindow(np.ascontiguousarray(image), missing)


def file_identity(path: Path) -> str:
    """Size and modification time of a file or of a folder's own metadata file."""
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"
