"""Opening rasters: what a file or an array is, without reading its pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any

from ..base.errors import RasterError, UsageError
from ..base.exact_numbers import exact_number
from ..system.places import archive_name, gdal_name, is_path, is_remote, place_of
from .formats import find_format
from .nodata import can_hold, exact_text
from .raster import Raster, ReadOptions, find_bands, pick_bands

if TYPE_CHECKING:
    pass


def open_raster(
    src: Any,
    axes: str | None = None,
    *,
    bands: Sequence[int | str] = (),
    nodata: float | Sequence[float] | None = None,
    any_band: bool = False,
    alpha: bool = False,
    mask_band: int | None = None,
    mask_values: Sequence[float] = (),
    apply_scale: bool = False,
    trust: bool = False,
) -> Raster:
    """Describe a raster without reading pixels: whatever GDAL opens, Zarr v2 and v3 groups and arrays, and formats that
    were added.

    An array of numpy, torch or xarray is written into a private folder of TMPDIR first, for workers to read, which is
    removed with the last raster of it; an output of it is continued by this process alone.

    Args:
        src: a path, or an array. A Zarr group must hold one raster array, or the array is named: `scene.zarr/image`.
        axes: order of a Zarr array's dimensions, such as "yxb"; needed only where the array does not say it.
        bands: bands to read, in this order, by numbers from 1 or by names ("B04", "red"); empty: all.
        nodata: nodata value or values in place of the file's own; an empty sequence: none.
        any_band: a pixel is nodata where one band holds the value; False: where all do.
        alpha: take the band tagged alpha for a mask, not for a band.
        mask_band: a data band that is a mask, from 1, not to be read as a band.
        mask_values: its values that mean nodata.
        apply_scale: pixels are number * scale + offset, as the file's tags say; computed in float64, given in float32
            for numbers of up to 16 bits, else in float64. Nodata values are stored numbers.
        trust: the file may name other files and the network, use any driver and codec, and run code of its own.

    Raises:
        RasterError: no such file, not a raster, complex or non-numeric pixels, an ambiguous group or axis order, no
            such band.
    """
    values: tuple[float, ...] | None = None
    if nodata is not None:
        given: Sequence[Any] = (nodata,) if isinstance(nodata, int | float | Real) else nodata
        if isinstance(given, str) or not all(isinstance(value, Real) for value in given):
            raise UsageError(f"nodata must be a number or several, got {nodata!r}")
        values = tuple(exact_number(value) for value in given)
    if isinstance(bands, str):
        raise UsageError(f"bands must be a list of numbers or names, got {bands!r}; give ({bands!r},)")
    options = ReadOptions(
        axes=axes,
        bands=tuple(band if isinstance(band, str) else index(band) for band in bands),
        nodata=values,
        any_band=any_band,
        alpha=alpha,
        mask_band=mask_band,
        mask_values=tuple(map(exact_number, mask_values)),
        apply_scale=apply_scale,
        trust=trust,
    )
    if is_path(src):
        return open_with(src, options)
    from .arrays import keep_array

    kept = keep_array(src, options.axes)
    # A plain array is stored with the names of its axes; of a DataArray a user may know better than its own.
    axes = options.axes if hasattr(src, "dims") else None
    return replace(open_with(kept.path, replace(options, axes=axes)), kept=kept)


def as_raster(raster: Any) -> Raster:
    """The raster itself; whatever `open_raster` takes, opened."""
    return raster if isinstance(raster, Raster) else open_raster(raster)


def open_with(src: str | os.PathLike[str], options: ReadOptions) -> Raster:
    """`open_raster` with its options in one object."""
    if (options.mask_band is None) != (not options.mask_values):
        raise UsageError("a mask band needs the values that mean nodata, such as --mask-band 8=2,4; got one without")
    src = archive_name(str(src))
    path = place_of(src)
    from .zarr_arrays import describe_zarr, split_zarr_path

    try:
        zarr_location = split_zarr_path(path)
    except Exception as error:
        if not is_remote(path):
            raise
        raise RasterError(f"{src} cannot be reached: {' '.join(str(error).split())}") from error
    if zarr_location is not None:
        raster = describe_zarr(*zarr_location, axes=options.axes, trust=options.trust)
    else:
        name = find_format(str(src))
        # GDAL's own names (/vsizip/..., GTIFF_DIR:1:a.tif) are no paths.
        if not is_remote(path) and not path.exists() and ":" not in str(src) and not str(src).startswith("/vsi"):
            raise RasterError(f"no such raster: {src}")
        if not is_remote(path) and path.exists() and not (path.is_file() or path.is_dir()):
            raise RasterError(f"{src} is no file, but a pipe, a device or a socket; write it to a file first")
        if options.axes is not None:
            raise UsageError(f"--axes is for Zarr arrays, got a file: {src}; leave it out")
        if name:
            raster = _describe_added(str(src), name)
        else:
            from .gdal_files import describe_gdal

            raster = describe_gdal(gdal_name(str(src)), options)
    if raster.dtype.kind not in "uif":
        raise RasterError(f"{src}: pixels must be integers or real numbers, got {raster.dtype}; convert them first")
    return _apply(str(src), raster, options)


def _describe_added(src: str, name: str) -> Raster:
    from .added import describe_added

    if is_remote(place_of(src)):
        raise RasterError(f"{src}: files of the added format {name} are read on this machine; copy it here first")
    return describe_added(src, name)


def _apply(src: str, raster: Raster, options: ReadOptions) -> Raster:
    """The raster with the options' nodata and bands in place of its own."""
    rule, stored = raster.nodata_rule, raster.bands
    if options.alpha and rule.mask != "alpha":
        raise RasterError(f"{src} has no band tagged alpha; leave --alpha out, or name its mask with --mask-band")
    if options.nodata is not None:
        for value in options.nodata:
            if not can_hold(raster.dtype, value):
                raise UsageError(f"nodata must be a value of {src}'s {raster.dtype} pixels, got {exact_text(value)}")
        rule = replace(rule, values=options.nodata)
    # A file may name a value that its own pixels cannot have: then none is nodata by value.
    values = tuple(value for value in rule.values if can_hold(raster.dtype, value))
    rule = replace(rule, values=values, any_band=options.any_band)
    if options.mask_band is not None:
        rule = replace(rule, mask_band=options.mask_band, mask_values=options.mask_values)
    if len(options.names) == stored:
        raster = replace(raster, band_names=options.names)
    numbers = find_bands(src, raster.band_names, options.bands)
    options = replace(options, bands=numbers)
    if options.mask_band is not None:
        find_bands(src, raster.band_names, (options.mask_band,))
    masks = {rule.alpha_band, rule.mask_band}
    chosen = numbers or tuple(band for band in range(1, stored + 1) if band not in masks)
    if not chosen:
        raise RasterError(f"{src} has no band beside its mask")
    raster = replace(raster, nodata_rule=rule, options=options)
    if chosen != tuple(range(1, stored + 1)):
        raster = pick_bands(raster, chosen)
    if not options.apply_scale:
        return raster
    from .scale import apply_tags

    return apply_tags(raster)
