"""Readers of rasters: what opens one of each kind."""

from __future__ import annotations

from typing import Any

from ..base.errors import RasterError
from ..base.registry import Registry

READERS: Registry[Any] = Registry(
    "kind of raster",
    "outsize.readers",
    {
        "gdal": "outsize.tiler.rasters.gdal_files:GdalReader",
        "zarr": "outsize.tiler.rasters.zarr_arrays:ZarrReader",
        "scaled": "outsize.tiler.rasters.scale:ScaledReader",
        "stack": "outsize.tiler.rasters.parts:PartsReader",
        "mosaic": "outsize.tiler.rasters.parts:PartsReader",
    },
    kind=RasterError,
)
"""(raster, blocks) -> `RasterReader`, by `Raster.kind`."""
