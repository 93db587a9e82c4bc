"""Rasters whose every pixel is unique, so that a wrong offset cannot pass."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from outsize.tiler.base.choices import ZarrFormat
from outsize.tiler.base.geometry import Window
from outsize.tiler.base.tile import Tile
from outsize.tiler.output.store import chunks_of
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.rasters.raster import Raster
from rasterio.errors import NotGeoreferencedWarning

TRANSFORM = Affine(2.5, 0, 400_000, 0, -2.5, 5_600_000)
CRS = "EPSG:32633"


def unique_pixels(bands: int, height: int, width: int, dtype: Any = np.int32) -> np.ndarray:
    return np.arange(1, bands * height * width + 1).reshape(bands, height, width).astype(dtype)


def write_geotiff(path: Path, image: np.ndarray, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "driver": "GTiff",
        "count": image.shape[0],
        "height": image.shape[1],
        "width": image.shape[2],
        "dtype": image.dtype,
        "crs": CRS,
        "transform": TRANSFORM,
    }
    with warnings.catch_warnings():
        # A raster without georeference is what some tests want.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **{**settings, **options}) as dataset:
            dataset.write(image)
    return path


def has_all_chunks(path: Path, kind: str, plan: TilePlan, tile: Tile, zarr_format: ZarrFormat = 3) -> bool:
    """Whether every chunk of a tile is there."""
    return all((path / name).is_file() for name in chunks_of(kind, plan, tile, zarr_format))


def damage(path: Path, window: tuple[int, int]) -> None:
    """Overwrite one compressed tile so that it cannot be decoded."""
    with rasterio.open(path) as dataset:
        tile = f"{window[1]}_{window[0]}"
        offset = int(dataset.get_tag_item(f"BLOCK_OFFSET_{tile}", "TIFF", bidx=1))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 40)


def missing_of(raster: Raster) -> list[list[bool]]:
    window = Window.whole(raster.shape_yx)
    reader = raster.open_reader()
    missing = reader.read_missing(window, reader.read(window))
    reader.close()
    return (np.zeros(raster.shape_yx, bool) if missing is None else missing).tolist()
