"""The backdrop: a coarse grey picture of a raster, from some of its rows, within seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..base.errors import RasterError
from ..base.geometry import Window, halve
from ..rasters.raster import Raster
from .tile_map import shrink

Grey = npt.NDArray[np.float32]

ROWS, COLUMNS = 64, 256
"""Of the picture, at most."""
LIMIT_S, LIMIT_CPU_S = 3.0, 1.0
"""Of the clock and of one core: the start check beside it takes most of all cores."""
LEAST_S = 1.0
"""What it gets where the run is over before."""
BLOCKS_BYTES = 16 << 20
"""Of a file's blocks that one read touches, at most: what it holds meanwhile."""


@contextlib.contextmanager
def draw_backdrop(raster: Raster, area: Window, show: Callable[[Grey], None]) -> Iterator[None]:
    """Make a backdrop in a thread of its own and show it, at the latest when this is left; not after an exception."""
    stop, failed = threading.Event(), threading.Event()

    def draw() -> None:
        with contextlib.suppress(Exception):  # a picture is worth no run
            grey = make_backdrop(raster, area, stop)
            if grey is not None and not failed.is_set():
                show(grey)

    thread = threading.Thread(target=draw, name="backdrop", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        failed.set()
        raise
    finally:
        if not failed.is_set():
            thread.join(LEAST_S)
        stop.set()
        thread.join(0.5)  # a raster that does not answer must not hold the run


def make_backdrop(raster: Raster, area: Window, stop: threading.Event | None = None) -> Grey | None:
    """(rows, columns) of an area in grey; nan for nodata and what cannot be read. Rows that were not reached are like
    their neighbours. None where there is nothing to show.

    Args:
        stop: ends it early.
    """
    if raster.block_bytes > BLOCKS_BYTES:
        return None
    down, across = min(ROWS, area.height), min(COLUMNS, area.width)
    cell = -(-area.width // across)
    # Whole cells, over as many blocks as may be held at once.
    blocks = max(1, BLOCKS_BYTES // max(1, raster.block_bytes))
    step = max(1, blocks * raster.block[1] // cell) * cell
    grey = np.full((down, -(-area.width // cell)), np.nan, np.float32)
    reached: list[int] = []
    deadline, deadline_cpu = time.monotonic() + LIMIT_S, time.thread_time() + LIMIT_CPU_S

    def is_late() -> bool:
        at_end = time.monotonic() > deadline or time.thread_time() > deadline_cpu
        return at_end or (stop is not None and stop.is_set())

    for row in _spread(down):
        y = area.y + (2 * row + 1) * area.height // (2 * down)
        if _draw_row(raster, replace(area, y=y, height=1), grey[row], (cell, step), is_late):
            reached.append(row)
        if is_late():
            break
    if not np.isfinite(grey[reached]).any():
        return None
    near = np.abs(np.arange(down)[:, None] - np.array(reached)).argmin(1)
    return grey[np.array(reached)[near]]


def _draw_row(
    raster: Raster, line: Window, grey: Grey, cell_and_step: tuple[int, int], is_late: Callable[[], bool]
) -> bool:
    """Fill a row of the picture from one line of the raster; returns whether its end was reached. What cannot be read
    is tried by halves: a damaged block leaves a gap of its own width."""
    cell, step = cell_and_step
    windows = [
        replace(line, x=x, width=min(step, line.x + line.width - x)) for x in range(line.x, line.x + line.width, step)
    ]
    windows.reverse()
    # One reader a row: GDAL keeps the blocks of an open file.
    reader = raster.open_reader()
    try:
        while windows and not is_late():
            window = windows.pop()
            try:
                image = reader.read(window)
                part = shrink(image, (1, cell), reader.read_missing(window, image))
            except RasterError:
                # What was open may answer with zeros after a failure.
                reader.close()
                reader = raster.open_reader()
                windows += halve(window, raster.block, (1, cell))
            else:
                start = (window.x - line.x) // cell
                grey[start : start + part.shape[1]] = part[0]
    finally:
        reader.close()
    return not windows


def _spread(count: int) -> Iterator[int]:
    """0 .. count - 1, so that any first few are spread over all."""
    bits = max(1, (count - 1).bit_length())
    for number in range(1 << bits):
        mirrored = int(f"{number:0{bits}b}"[::-1], 2)
        if mirrored < count:
            yield mirrored
