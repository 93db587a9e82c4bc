"""The small scene that is part of the package: GeoTIFF image and labels, made from the sample scene.

python -m outsize.sample_data.small FOLDER
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import numpy as np
import rasterio
import rasterio.crs
from affine import Affine
from rasterio.enums import ColorInterp

from ..tiler.base.geometry import Window
from .scene import BANDS, CLASSES, COLOURS, CRS, LABEL_NODATA, NODATA, ORIGIN_XY, PIXEL_METRES, Scene, render_window

SCENE = Scene(height=2048, width=2048, seed=25)
WINDOW = Window(y=0, x=60, height=401, width=389)
"""All six classes and a part of the nodata corner; two primes, so that no tile size divides it."""


def small_scene_path() -> Path:
    """The image; `labels.tif` lies beside it."""
    return Path(str(resources.files("outsize.sample_data") / "small" / "scene.tif"))


def write_small_scene(folder: Path) -> None:
    """Write FOLDER/scene.tif and FOLDER/labels.tif."""
    image, labels = render_window(SCENE, WINDOW)
    x, y = ORIGIN_XY
    transform = Affine(PIXEL_METRES, 0, x + WINDOW.x, 0, -PIXEL_METRES, y - WINDOW.y)
    common = {
        "driver": "GTiff",
        "height": WINDOW.height,
        "width": WINDOW.width,
        "dtype": "uint8",
        "crs": rasterio.crs.CRS.from_user_input(CRS),
        "transform": transform,
        "tiled": True,
        "blockxsize": 128,
        "blockysize": 128,
        "compress": "DEFLATE",
        "predictor": 2,
        "zlevel": 9,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with rasterio.open(folder / "scene.tif", "w", count=len(BANDS), nodata=NODATA, **common) as dataset:
        # Without this GDAL takes a fourth byte band for alpha.
        dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined]
        dataset.write(image)
        for number, name in enumerate(BANDS, start=1):
            dataset.set_band_description(number, name)
    with rasterio.open(folder / "labels.tif", "w", count=1, nodata=LABEL_NODATA, **common) as dataset:
        dataset.write(labels, 1)
        colours: dict[int, tuple[int, ...]] = dict(enumerate(COLOURS))
        dataset.write_colormap(1, colours)
        dataset.set_band_description(1, "land cover")
        dataset.update_tags(1, **{f"class_{value}": name for value, name in enumerate(CLASSES)})


def count_classes(folder: Path) -> dict[str, int]:
    """Pixels of each class in FOLDER/labels.tif."""
    with rasterio.open(folder / "labels.tif") as dataset:
        counts = np.bincount(dataset.read(1).ravel(), minlength=256)
    return {name: int(counts[value]) for value, name in enumerate(CLASSES)}


if __name__ == "__main__":
    write_small_scene(Path(sys.argv[1]))
