"""What writes exports: formats by the suffixes of their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...tiler.base.registry import Registry
from ...tiler.rasters.opening import open_raster
from ...tiler.rasters.raster import Raster
from ..base.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An output that is exported."""

    console: Console
    """Shows progress: `console.step(label, pixels)`."""
    out: Path
    """The output's store."""
    header: dict[str, Any]
    """What the store says of itself: model, classes, kind, source."""
    trust: bool
    """The output's source may be read with trust, as in `open_raster`."""

    @property
    def kind(self) -> str:
        """Of the result: class, probability, logits or values."""
        return self.header["kind"]

    def open_raster(self) -> Raster:
        """The result itself, (bands, height, width): to be read in windows, for it may be larger than memory."""
        return open_raster(self.out / self.kind)


class NamedWriter(Protocol):
    """A function that writes one file."""

    def __call__(self, export: Export, target: Path) -> None:
        """Write TARGET, a path of this machine whose folder is there and which is moved to its place when all is
        written. A failure is an OutputError."""
        ...


WRITERS: Registry[NamedWriter] = Registry(
    "export writer",
    "outsize.writers",
    {
        "tif": "outsize.pipelines.segment.cog:write_cog",
        "tiff": "outsize.pipelines.segment.cog:write_cog",
        "png": "outsize.pipelines.segment.quicklook:write_quicklook",
    },
    protocol=NamedWriter,
)
"""`NamedWriter` by the suffix of its files, without the dot, in small letters."""
