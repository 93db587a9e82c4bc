"""An output as a cloud-optimised GeoTIFF with overviews."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window as RasterioWindow

from ...tiler.base.dtypes import output_nodata
from ...tiler.base.errors import OutputError
from ...tiler.base.geometry import Grid
from ...tiler.base.text import first_line
from ...tiler.output.store import LEVELS, channel_numbers, open_array
from ...tiler.rasters.georeference import to_rasterio
from .writers import Export

_BLOCK = 512
_STRIP = 4096
"""Width of the windows written at once."""


def write_cog(export: Export, target: Path) -> None:
    """Write TARGET, a GeoTIFF in GDAL's COG layout.

    Raises:
        OutputError: it cannot be written.
    """
    header, kind = export.header, export.kind
    array = open_array(export.out, kind)
    raster = export.open_raster()
    bands, height, width = raster.shape
    is_class = kind == "class"
    plain = target.with_name(f"{target.stem}-plain.tif")
    try:
        with (
            rasterio.Env(GDAL_CACHEMAX=128),
            rasterio.open(
                plain,
                "w",
                driver="GTiff",
                height=height,
                width=width,
                count=bands,
                dtype=raster.dtype,
                **to_rasterio(raster.place),
                nodata=output_nodata(raster.dtype),
                tiled=True,
                blockxsize=_BLOCK,
                blockysize=_BLOCK,
                compress="DEFLATE",
                zlevel=1,
                bigtiff="IF_SAFER",
            ) as dataset,
        ):
            _describe(dataset, header, bands, is_class)
            grid = Grid(shape=(height, width), cell=(_BLOCK, _STRIP))
            with export.console.step("export", height * width) as step:
                for at in grid:
                    window = grid.window(*at)
                    rows, columns = window.slices()
                    block = np.asarray(array[rows, columns] if is_class else array[:, rows, columns])
                    place = RasterioWindow(window.x, window.y, window.width, window.height)  # pyright: ignore[reportCallIssue]
                    dataset.write(block if block.ndim == 3 else block[None], window=place)
                    step.advance(window.pixels)
        with rasterio.Env(GDAL_CACHEMAX=128):
            rasterio.shutil.copy(
                plain,
                target,
                driver="COG",
                compress="DEFLATE",
                predictor="YES" if not is_class else "NO",
                blocksize=_BLOCK,
                # The mean of two class numbers is no class.
                overview_resampling="MODE" if is_class else "AVERAGE",
                bigtiff="IF_SAFER",
                num_threads="ALL_CPUS",
            )
    except RasterioError as error:
        raise OutputError(f"{target} cannot be written: {first_line(error)}") from error
    finally:
        for leftover in (plain, plain.with_name(plain.name + ".aux.xml")):
            leftover.unlink(missing_ok=True)


def _describe(dataset: Any, header: dict[str, Any], bands: int, is_class: bool) -> None:
    """Colour map, class names and provenance."""
    classes = header["classes"]
    dataset.update_tags(OUTSIZE_MODEL=header["model"], OUTSIZE_MODEL_SHA256=header["model_sha256"])
    if is_class:
        dataset.set_band_description(1, "class")
        if classes:
            dataset.colorinterp = [ColorInterp.palette]
            colours = {entry["value"]: (*entry["colour"], 255) for entry in classes}
            dataset.write_colormap(1, {**colours, int(dataset.nodata): (0, 0, 0, 0)})
            dataset.update_tags(1, CLASS_NAMES=json.dumps({str(e["value"]): e["name"] for e in classes}))
    else:
        for band, number in enumerate(channel_numbers(header, bands), 1):
            dataset.set_band_description(band, classes[number]["name"] if classes else f"channel {band}")
        if header["kind"] == "probability":
            # GDAL, rasterio and QGIS show value * scale; 255 stays nodata.
            dataset.scales = [1 / LEVELS] * bands
            dataset.units = ["probability"] * bands
