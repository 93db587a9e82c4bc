"""Readers of rasters: what opens one of each kind."""

from __future__ import annotations

from typing import Any

from .errors import RasterError
from .registry import Registry

READERS: Registry[Any] = Registry(
    "kind of raster",
    "outsize.readers",
    {
        "gdal": "outsize.tiler.raster_gdal:GdalReader",
        "zarr": "outsize.tiler.raster_zarr:ZarrReader",
        "scaled": "outsize.tiler.raster_scale:ScaledReader",
        "stack": "outsize.tiler.raster_parts:PartsReader",
        "mosaic": "outsize.tiler.raster_parts:PartsReader",
    },
    kind=RasterError,
)
"""(raster, blocks) -> `RasterReader`, by `Raster.kind`."""
