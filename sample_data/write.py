"""Writes a sample scene and its labels as Zarr stores, window by window."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import rasterio.crs
import zarr
from affine import Affine

from ..tiler.base.errors import OutputError, UsageError
from ..tiler.base.geometry import Grid, Window
from ..tiler.output.store import create_raster_group, require_replaceable
from ..tiler.rasters.georeference import Georeference, from_rasterio
from .scene import BANDS, CLASSES, COLOURS, CRS, LABEL_NODATA, NODATA, ORIGIN_XY, PIXEL_METRES, Scene, render_window

CHUNK = 512
_RENDER = 256
"""Side of the windows rendered at once: their arrays stay in the processor's cache (4 times faster than 1024)."""


def scene_place() -> Georeference:
    """CRS and transform of every sample scene."""
    x, y = ORIGIN_XY
    return from_rasterio(rasterio.crs.CRS.from_user_input(CRS), Affine(PIXEL_METRES, 0, x, 0, -PIXEL_METRES, y))


def _create(folder: Path, scene: Scene, axes: str) -> tuple[zarr.Array, zarr.Array]:
    place = scene_place()
    chunk = (min(CHUNK, scene.height), min(CHUNK, scene.width))
    sizes = {"b": len(BANDS), "y": scene.height, "x": scene.width}
    chunks = {"b": len(BANDS), "y": chunk[0], "x": chunk[1]}
    names = {"b": "band", "y": "y", "x": "x"}
    image = create_raster_group(
        folder / "scene.zarr",
        name="image",
        shape=tuple(sizes[axis] for axis in axes),
        dims=tuple(names[axis] for axis in axes),
        dtype=np.dtype(np.uint8),
        chunks=tuple(chunks[axis] for axis in axes),
        place=place,
        fill=NODATA,
        nodata=NODATA,
        group_attributes={"band_names": list(BANDS), "sample_seed": scene.seed},
    )
    labels = create_raster_group(
        folder / "labels.zarr",
        name="label",
        shape=scene.shape,
        dims=("y", "x"),
        dtype=np.dtype(np.uint8),
        chunks=chunk,
        place=place,
        fill=LABEL_NODATA,
        nodata=LABEL_NODATA,
        array_attributes={"flag_values": list(range(len(CLASSES))), "flag_meanings": " ".join(CLASSES)},
        group_attributes={
            "classes": [
                {"value": value, "name": name, "colour": list(colour)}
                for value, (name, colour) in enumerate(zip(CLASSES, COLOURS, strict=True))
            ],
            "sample_seed": scene.seed,
        },
    )
    return image, labels


def write_scene(
    folder: Path,
    scene: Scene,
    *,
    axes: str = "byx",
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write FOLDER/scene.zarr and FOLDER/labels.zarr; both appear under their names only when whole.

    Args:
        axes: order of the scene's dimensions, "byx" or "yxb"; the array names them.
        overwrite: replace stores that are there.
        advance: called with the number of pixels just written.

    Raises:
        OutputError: a store of that name is there.
        UsageError: another order of dimensions.
    """
    if axes not in ("byx", "yxb"):
        raise UsageError(f"axes must be byx or yxb, got {axes!r}")
    targets = [folder / "scene.zarr", folder / "labels.zarr"]
    for target in targets:
        if target.exists() and not overwrite:
            raise OutputError(f"{target} exists; choose another folder, or --overwrite")
        require_replaceable(target, "sample_seed", "sample")
    unfinished = folder / ".creating"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    image, labels = _create(unfinished, scene, axes)
    grid = Grid(shape=scene.shape, cell=(CHUNK, CHUNK))

    def write(window: Window) -> int:
        pixels = np.empty((len(BANDS), *window.shape), np.uint8)
        classes = np.empty(window.shape, np.uint8)
        for row, column in (inner := Grid(shape=window.shape, cell=(_RENDER, _RENDER))):
            part = inner.window(row, column)
            rows, columns = part.slices()
            whole = Window(y=window.y + part.y, x=window.x + part.x, height=part.height, width=part.width)
            pixels[:, rows, columns], classes[rows, columns] = render_window(scene, whole)
        rows, columns = window.slices()
        if axes == "byx":
            image[:, rows, columns] = pixels
        else:
            image[rows, columns] = np.moveaxis(pixels, 0, 2)
        labels[rows, columns] = classes
        return window.pixels

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for pixels in _bounded(pool, write, (grid.window(*at) for at in grid), 2 * workers):
            if advance is not None:
                advance(pixels)
    for target in targets:
        shutil.rmtree(target, ignore_errors=True)
        (unfinished / target.name).rename(target)
    unfinished.rmdir()


def _bounded(
    pool: ThreadPoolExecutor, work: Callable[[Window], int], windows: Iterator[Window], limit: int
) -> Iterator[int]:
    """Results of `work` in the order they end, with at most `limit` windows under way."""
    running: set[Future[int]] = set()
    for window in windows:
        running.add(pool.submit(work, window))
        if len(running) >= limit:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in running)
