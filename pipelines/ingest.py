"""`outsize ingest`: a raster file into Zarr v3."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ..tiler.errors import OutputError
from ..tiler.geometry import Grid
from ..tiler.meter import MemoryMeter
from ..tiler.raster import open_raster
from ..tiler.store import create_raster_group, writable
from .console import Console, count_of, describe_memory

CHUNK = 512
_BYTES_AT_ONCE = 64_000_000


def run_ingest(console: Console, source: str, target: Path, *, axes: str | None, overwrite: bool) -> None:
    """Copy a raster, pixel by pixel equal, with its georeference, nodata and band names.

    The store appears under its name only when it is whole.
    """
    raster = open_raster(source, axes)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another path, or --overwrite")
    if target.resolve() == Path(raster.path).resolve():
        raise OutputError(f"{target} is the source itself; choose another path")
    unfinished = target.with_name(target.name + ".creating")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = raster.shape
    chunk = (min(CHUNK, height), min(CHUNK, width))
    array = writable(
        create_raster_group(
            unfinished,
            name="image",
            shape=raster.shape,
            dims=("band", "y", "x"),
            dtype=raster.dtype,
            chunks=(bands, *chunk),
            place=raster.place,
            fill=raster.nodata if raster.nodata is not None else 0,
            nodata=raster.nodata,
            group_attributes={"band_names": list(raster.band_names), "ingested_from": Path(source).name},
        )
    )
    # Whole rows of chunks as far as memory allows: files in strips are then decoded once.
    across = max(1, min(-(-width // CHUNK), _BYTES_AT_ONCE // (bands * raster.dtype.itemsize * CHUNK * CHUNK)))
    grid = Grid(shape=(height, width), cell=(CHUNK, across * CHUNK))
    began = time.perf_counter()
    try:
        with MemoryMeter() as meter, console.step("ingest", height * width) as step:
            reader = raster.open_reader()
            try:
                for at in grid:
                    window = grid.window(*at)
                    rows, columns = window.slices()
                    array[:, rows, columns] = reader.read(window)
                    step.advance(window.pixels, describe_memory(meter.current_bytes))
            finally:
                reader.close()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    seconds = time.perf_counter() - began
    place = "georeferenced" if raster.place.crs_wkt else "no CRS"
    console.result(
        f"{target}: {height} x {width} px, {count_of(bands, 'band')} {raster.dtype}, {place}",
        {
            "out": str(target),
            "shape": list(raster.shape),
            "dtype": str(raster.dtype),
            "pixels": height * width,
            "seconds": round(seconds, 3),
            "mpx_per_s": round(height * width / seconds / 1e6, 3),
            "peak_bytes": meter.peak_bytes,
        },
    )
