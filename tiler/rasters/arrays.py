"""Arrays of this process as rasters: written once into a private folder, which goes with the last raster of them."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..base.errors import RasterError, UsageError
from .nodata import Array

BLOCK = 512
"""Side of the squares that are stored."""


class KeptArray:
    """A Zarr store of one array, removed with the last raster that holds this."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="outsize-array-"))  # of mode 0700
        self.path = folder / "array.zarr"
        weakref.finalize(self, _remove, str(folder), os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies in other processes do not keep it: this process does, while they work for it."""
        return type(None), ()


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process ends without taking its parent's array along
        shutil.rmtree(folder, ignore_errors=True)


def keep_array(values: Any, axes: str | None) -> KeptArray:
    """Store a numpy array, a torch tensor or an xarray DataArray for workers to read.

    Args:
        axes: order of its dimensions, such as "yxb"; None: what its dimensions are called, "yx" for two of them, and
            "byx" where the first of three is the smallest.

    Raises:
        UsageError: no such array, or one whose order nobody tells.
        RasterError: its pixels are no numbers, or it cannot be written.
    """
    is_labelled = hasattr(values, "dims") and hasattr(values, "to_dataset")
    image = values if is_labelled else _plain(values)
    if image.dtype.kind not in "uif" or image.dtype.itemsize > 8:
        raise RasterError(f"the array's pixels must be integers or real numbers, got {image.dtype}; convert them first")
    kept = KeptArray()
    try:
        if is_labelled:
            _write_labelled(image, kept.path)
        else:
            _write(image, kept.path, axes)
    except OSError as error:
        raise RasterError(
            f"the array cannot be written to {kept.path.parent}: {error.strerror or error}; TMPDIR names another folder"
        ) from error
    return kept


def _plain(values: Any) -> Array:
    if isinstance(values, np.ma.MaskedArray):
        raise UsageError("an array must not be masked; give .filled(VALUE) with nodata=VALUE, or NaN for floats")
    if not hasattr(values, "__array__"):
        raise UsageError(
            f"a raster must be a path, a Raster, or an array of numpy, torch or xarray, got {type(values).__name__}"
        )
    return np.asarray(values)


def _write(image: Array, path: Path, axes: str | None) -> None:
    order = axes or _guess_axes(image)
    if sorted(order) not in (sorted("byx"), sorted("yx")) or len(order) != image.ndim:
        raise UsageError(f"axes must order b, y and x for {image.ndim} dimensions, such as yxb; got {order!r}")
    if not image.size:
        raise UsageError(f"an array must have pixels, got shape {image.shape}")
    chunks = tuple(min(extent, 1 if name == "b" else BLOCK) for name, extent in zip(order, image.shape, strict=True))
    names = tuple({"b": "band", "y": "y", "x": "x"}[name] for name in order)
    stored = zarr.create_array(
        path, shape=image.shape, chunks=chunks, dtype=image.dtype, dimension_names=names, compressors=None
    )
    stored[...] = image


def _guess_axes(image: Array) -> str:
    if image.ndim == 2:
        return "yx"
    if image.ndim == 3 and image.shape[0] < min(image.shape[1:]):
        return "byx"
    raise UsageError(f'an array of shape {image.shape} does not say what its dimensions are; give axes="yxb" or "byx"')


def _write_labelled(values: Any, path: Path) -> None:
    """By xarray, which knows its coordinates, their attributes and where its pixels are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what xarray thinks of Zarr v3
        try:
            values.drop_encoding().to_dataset(name="image").to_zarr(path, zarr_format=3, consolidated=False)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the DataArray cannot be stored for workers ({' '.join(str(error).split())}); drop attributes and "
                "coordinates that are no numbers or texts, such as with .drop_attrs()"
            ) from error
