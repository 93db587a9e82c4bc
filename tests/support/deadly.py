"""A raster, one of whose pixels kills, stops or fails the process that reads it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.block_cache import BlockStore
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.raster import Raster, RasterReader


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlyRaster(Raster):
    """Workers that read the pixel `at` get a signal, or an error."""

    at: tuple[int, int] = (0, 0)
    how: str = "kill"
    """"kill", "stop", "error", or "once": killed once, told by a file beside the raster."""

    def open_reader(self, blocks: BlockStore | None = None) -> RasterReader:
        # super() without arguments does not work in classes with slots.
        return _DeadlyReader(Raster.open_reader(self, blocks), self)


def make_deadly(path: Path, at: tuple[int, int], how: str) -> DeadlyRaster:
    raster = open_raster(path)
    return DeadlyRaster(**{f.name: getattr(raster, f.name) for f in fields(raster)}, at=at, how=how)


class _DeadlyReader:
    def __init__(self, reader: RasterReader, raster: DeadlyRaster) -> None:
        self._reader, self._raster = reader, raster

    def read(self, window: Window) -> Any:
        y, x = self._raster.at
        if window.y <= y < window.rows.stop and window.x <= x < window.columns.stop:
            self._die()
        return self._reader.read(window)

    def _die(self) -> None:
        how = self._raster.how
        if how == "error":
            raise RasterError("bad sector")
        if how == "once":
            mark = Path(self._raster.path).with_name("killed-once")
            if mark.exists():
                return
            mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)

    def read_missing(self, window: Window, image: Any) -> Any:
        return self._reader.read_missing(window, image)

    def close(self) -> None:
        self._reader.close()
