"""Readers of rasters: what opens one of each kind. Formats of files are added by `FORMATS`, not here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..base.errors import RasterError
from ..base.registry import Registry

if TYPE_CHECKING:
    from ..base.geometry import Window
    from .block_cache import BlockStore


class NamedReader(Protocol):
    """A class of readers, each for one thread at a time."""

    def __call__(self, raster: Any, blocks: BlockStore | None) -> Any: ...

    def read(self, window: Window) -> Any:
        """As of `RasterReader`."""
        ...

    def read_missing(self, window: Window, image: Any) -> Any:
        """As of `RasterReader`."""
        ...

    def close(self) -> None:
        """As of `RasterReader`."""
        ...


READERS: Registry[Any] = Registry(
    "kind of raster",
    "outsize.readers",
    {
        "gdal": "outsize.tiler.rasters.gdal_files:GdalReader",
        "added": "outsize.tiler.rasters.added:AddedReader",
        "zarr": "outsize.tiler.rasters.zarr_arrays:ZarrReader",
        "scaled": "outsize.tiler.rasters.scale:ScaledReader",
        "stack": "outsize.tiler.rasters.parts:PartsReader",
        "mosaic": "outsize.tiler.rasters.parts:PartsReader",
    },
    protocol=NamedReader,
    kind=RasterError,
)
"""(raster, blocks) -> `RasterReader`, by `Raster.kind`."""
