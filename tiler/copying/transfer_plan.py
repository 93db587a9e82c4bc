"""Transfer plan: cells, processes and memory of a copy, before anything of the raster is read."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.errors import BudgetError
from ..base.geometry import Grid
from ..base.text import MB, format_bytes, parse_bytes
from ..planning.plan import STORE_BYTES
from ..rasters.raster import Raster
from ..system.machine import cpu_count

CHUNK = 512
CELL_BYTES = 48 * MB
"""Of the pixels of one cell: what one task reads and writes."""
HERE_BYTES = 64 * MB
"""Rasters up to this size are copied in this process: starting workers would take longer."""
CLIENT_BYTES = 200 * MB
"""The commanding process with Dask, and each worker process with GDAL and Zarr; measured (docs/benchmarks.md)."""
WORKER_BYTES = 140 * MB
CACHE_BYTES = 64 * MB
COPIES = 3
"""Of a cell's pixels at once: as read, as chunks, and half of that encoded, twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """How a raster is copied; a pure function of (raster, budget, number of workers)."""

    grid: Grid
    chunk: tuple[int, int]
    workers: int
    """Processes; 0: this one."""
    cache_bytes: int
    """GDAL's block cache in each."""
    predicted_peak_bytes: int


def plan_transfer(
    raster: Raster, memory: str | int = "2GB", workers: int | None = None, *, to_store: bool = False
) -> TransferPlan:
    """Cut a raster into cells of whole chunks so that all processes together keep the budget.

    Args:
        to_store: the copy goes to an object store.

    Raises:
        BudgetError: one chunk of all bands, or one block of the file, is too large for it; names what would do.
    """
    budget = parse_bytes(memory)
    bands, height, width = raster.shape
    chunk = (min(CHUNK, height), min(CHUNK, width))
    chunk_bytes = (raster.pixel_bytes + raster.beside_bytes) * chunk[0] * chunk[1]
    here = raster.pixel_bytes * height * width <= HERE_BYTES and workers is None
    # Row and column centres are written as arrays.
    store = STORE_BYTES if to_store or raster.is_far else 0
    fixed = CLIENT_BYTES + store + 16 * (height + width)
    cache = CACHE_BYTES + (raster.block_bytes if raster.kind != "zarr" else 0)
    each = (0 if here else WORKER_BYTES + store) + cache + 2 * raster.block_bytes
    wanted = 0 if here else (workers or cpu_count())
    most = _cell_bytes_for(budget, fixed, each, max(1, wanted))
    while most < chunk_bytes and wanted > 1:
        wanted -= 1
        most = _cell_bytes_for(budget, fixed, each, wanted)
    if most < chunk_bytes:
        least = fixed + COPIES * chunk_bytes + each
        centres = 16 * (height + width)
        _, what, remedy = max(
            (centres, f"the positions of {height} rows and {width} columns are {format_bytes(centres)}", "cut it"),
            (
                raster.block_bytes,
                f"one of its blocks, {raster.block[0]} x {raster.block[1]} px, is {format_bytes(raster.block_bytes)}",
                "rewrite it in tiles",
            ),
            (
                chunk_bytes,
                f"{chunk[0]} x {chunk[1]} px of its {bands} bands are {format_bytes(chunk_bytes)}",
                "choose --bands",
            ),
        )
        raise BudgetError(
            f"memory must be at least {format_bytes(least + 0.5 * MB)} for {raster.path}: {what}; got "
            f"{format_bytes(budget)}; raise --memory, or {remedy}"
        )
    # Whole rows of chunks as far as memory allows: files in strips are then decoded once.
    fitting = int(min(most, CELL_BYTES) // chunk_bytes)
    across = max(1, min(-(-width // CHUNK), fitting))
    down = max(1, min(fitting // across, -(-raster.block[0] // CHUNK), -(-height // CHUNK)))
    grid = Grid(shape=(height, width), cell=(down * CHUNK, across * CHUNK))
    cell_bytes = (raster.pixel_bytes + raster.beside_bytes) * min(down * CHUNK, height) * min(across * CHUNK, width)
    process_bytes = max(1, min(wanted, len(grid))) * each
    return TransferPlan(
        grid=grid,
        chunk=chunk,
        workers=0 if here else min(wanted, len(grid)),
        cache_bytes=cache,
        predicted_peak_bytes=int(fixed + process_bytes + max(1, min(wanted, len(grid))) * COPIES * cell_bytes),
    )


def _cell_bytes_for(budget: int, fixed: int, each: int, workers: int) -> float:
    return (budget - fixed - workers * each) / workers / COPIES
