"""The backdrop: a coarse grey picture of a raster, from small windows spread over it, in a second or three."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from .errors import RasterError
from .geometry import Window
from .raster import Raster
from .tile_map import shrink

SIDE = 24
"""Windows along the longer side."""
WINDOW = 8
"""Side of each, in pixels."""
LIMIT_S = 3.0
LARGEST_BLOCK = 8 << 20
"""Bytes of a file's block; rasters of larger ones get no backdrop, since each window decodes one."""


@contextlib.contextmanager
def draw_backdrop(raster: Raster, area: Window, show: Callable[[npt.NDArray[np.float32]], None]) -> Iterator[None]:
    """Make a backdrop in a thread of its own and show it; ended early when this is left."""
    stop = threading.Event()

    def draw() -> None:
        with contextlib.suppress(Exception):  # a picture is worth no run
            grey = make_backdrop(raster, area, stop)
            if grey is not None and not stop.is_set():
                show(grey)

    thread = threading.Thread(target=draw, name="backdrop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def make_backdrop(raster: Raster, area: Window, stop: threading.Event | None = None) -> npt.NDArray[np.float32] | None:
    """(rows, columns) of an area in grey; nan for what is nodata, unreadable, or was not reached in `LIMIT_S`. None
    where there is nothing to show.

    Args:
        stop: ends it early.
    """
    if raster.block_bytes > LARGEST_BLOCK:
        return None
    longer = max(area.shape)
    down, across = (max(1, min(extent // WINDOW, round(SIDE * extent / longer))) for extent in area.shape)
    grey = np.full((down, across), np.nan, np.float32)
    deadline = time.monotonic() + LIMIT_S
    for row in _spread(down):
        # One reader a row: GDAL keeps the blocks of an open file.
        reader = raster.open_reader()
        try:
            for column in range(across):
                if time.monotonic() > deadline or (stop is not None and stop.is_set()):
                    return grey if np.isfinite(grey).any() else None
                window = _at(area, (row, column), (down, across))
                with contextlib.suppress(RasterError):
                    image = reader.read(window)
                    missing = reader.read_missing(window, image)
                    grey[row, column] = shrink(image, window.shape, missing)[0, 0]
        finally:
            reader.close()
    return grey if np.isfinite(grey).any() else None


def _spread(count: int) -> Iterator[int]:
    """0 .. count - 1, so that any first few are spread over all."""
    bits = max(1, (count - 1).bit_length())
    for number in range(1 << bits):
        mirrored = int(f"{number:0{bits}b}"[::-1], 2)
        if mirrored < count:
            yield mirrored


def _at(area: Window, place: tuple[int, int], counts: tuple[int, int]) -> Window:
    """The window in the middle of one of the area's equal parts."""
    starts, sizes = list[int](), list[int]()
    for index, count, extent, origin in zip(place, counts, area.shape, (area.y, area.x), strict=True):
        size = min(WINDOW, extent)
        starts.append(origin + min(extent - size, (2 * index + 1) * extent // (2 * count) - size // 2))
        sizes.append(size)
    return Window(y=max(area.y, starts[0]), x=max(area.x, starts[1]), height=sizes[0], width=sizes[1])
