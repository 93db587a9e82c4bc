"""Odd and broken rasters written by others: each is copied pixel by pixel, or refused in one line."""

from __future__ import annotations

import csv
import re
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from outsize.tiler.base.errors import TilerError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.cluster.client import ClusterOptions
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.rasters.opening import open_raster
from rasterio.errors import NotGeoreferencedWarning, RasterioError

pytestmark = pytest.mark.system

SECONDS = 20
PARTLY = {"image-tiff/text.tif", "rasterio/corrupt.tif"}
"""Files of which rasterio reads some windows and fails on others."""
REFUSED = {
    "gdal/bigtiff_header_extract.tif": "none of 16 windows spread over it can be read",
    "gdal/block_width_above_32bit.tif": "Too large block size",
    "gdal/cint_sar.tif": "integers or real numbers, got complex_int16",
    "gdal/corrupted_deflate_singlestrip.tif": "window 0,0,.* cannot be read",
    "gdal/excessive-memory-TIFFFillStrip2.tif": "108 x 108 px of its 65535 bands are 764 MB",
    "gdal/huge_raster_with_ovr_huge_block.tif": r"one of its blocks, 1 x 2147000000 px, is 140\.70 TB",
    "gdal/idontexist.vrt": "idontexist.tif: No such file",
    "gdal/image_width_above_32bit.tif": "Too large image size",
    "gdal/mandrilmini_12bitjpeg.tif": "Unsupported JPEG data precision 12",
    "gdal/missing_tilebytecounts_and_offsets.tif": "TileOffsets",
    "gdal/ossfuzz_470691578.tif": "cannot be read",
    "gdal/python_ones.vrt": "its pixel function is code; .*--trust-sources",
    "gdal/tiff_dos_strip_chop.tif": "one of its blocks, 262144 x 2048 px, is 537 MB|memory must be at least",
    "gdal/unknown_compression.tif": "missing codec of code 65535",
    "gdal/unsupported_codec_jp2000.tif": "missing codec|JP2000",
    "gdal/ycbcr_14_lzw.tif": "can not handle image",
    "gdal/zackthecat_corrupted.tif": "cannot be read",
    "image-tiff/fuzz_divide_by_zero_000033.tif": "RowsPerStrip",
    "image-tiff/fuzz_inf_loop_000029.tif": "cannot be read",
    "image-tiff/fuzz_oom_crash_000043.tif": "cannot be read",
    "pillow/seek_too_large.tif": "Failed to read directory",
}


@cache
def corpus(shared_dir: Path) -> dict[str, dict[str, Any]]:
    with (shared_dir / "corpus/MANIFEST.tsv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}
    return {name: row for name, row in rows.items() if row["odd"] != "(sidecar)"}


def copied_equals_rasterio(source: Path, copy: Path) -> None:
    """Pixels, validity of unreadable blocks, and place."""
    raster = open_raster(copy)
    reader = raster.open_reader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(source) as dataset:
            assert raster.shape == (dataset.count, dataset.height, dataset.width)
            points, of_points = dataset.gcps
            assert raster.place.crs == (of_points if points and dataset.transform.is_identity else dataset.crs)
            assert raster.place.affine == dataset.transform
            block = dataset.block_shapes[0]
    cell = (max(1, 2048 // block[0]) * block[0], max(1, 2048 // block[1]) * block[1])
    for at in (grid := Grid(shape=raster.shape_yx, cell=cell)):
        window = grid.window(*at)
        ours = reader.read(window)
        try:
            with rasterio.open(source) as dataset:
                theirs = dataset.read(
                    window=((window.y, window.y + window.height), (window.x, window.x + window.width))
                )
        except RasterioError:
            missing = reader.read_missing(window, ours)
            assert missing is not None
            assert missing.any()
            ours[:, ~missing] = 0
        else:
            assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")


QUIET = ClusterOptions(dashboard_address=None)
"""Another test may have the dashboard's port."""


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.usefixtures("_warm_workers")
def test_every_file_is_equal_or_refused_by_name(shared_dir: Path, tmp_path: Path) -> None:
    files = corpus(shared_dir)
    assert len(files) > 50
    assert set(REFUSED) | PARTLY <= set(files)
    wrong: list[str] = []
    for name in files:
        source, copy = shared_dir / "corpus" / name, tmp_path / f"{name.replace('/', '-')}.zarr"
        began = time.perf_counter()
        try:
            summary = copy_raster(open_raster(source), copy, workers=None, cluster=QUIET)
        except TilerError as refusal:
            text = str(refusal)
            if name not in REFUSED:
                wrong.append(f"{name} was refused: {text}")
            elif not re.search(REFUSED[name], text) or "\n" in text or Path(name).name not in text:
                wrong.append(f"{name} was refused with other words: {text}")
            if list(tmp_path.glob(f"{copy.name}*")):
                wrong.append(f"{name} left something behind")
        else:
            if name in REFUSED:
                wrong.append(f"{name} was not refused")
            if bool(summary.unreadable) is not (name in PARTLY):
                wrong.append(f"{name}: unreadable {summary.unreadable}")
            copied_equals_rasterio(source, copy)
        if time.perf_counter() - began > SECONDS:
            wrong.append(f"{name} took more than {SECONDS} s")
    assert not wrong, "\n".join(wrong)


def test_what_is_readable_of_a_damaged_file_is_kept(shared_dir: Path, tmp_path: Path) -> None:
    # One of four JPEG tiles is cut short.
    source = shared_dir / "corpus/rasterio/corrupt.tif"
    summary = copy_raster(open_raster(source), tmp_path / "c.zarr")
    assert [entry[:4] for entry in summary.unreadable] == [(512, 512, 512, 512)]
    copy = open_raster(tmp_path / "c.zarr")
    reader, window = copy.open_reader(), Window.whole(copy.shape_yx)
    image = reader.read(window)
    missing = reader.read_missing(window, image)
    assert missing is not None
    assert missing[512:, 512:].all()
    with rasterio.open(source) as dataset:
        for y, x in ((0, 0), (0, 512), (512, 0)):
            place = ((y, y + 512), (x, x + 512))
            assert np.array_equal(image[:, y : y + 512, x : x + 512], dataset.read(window=place))
            valid = dataset.read_masks(1, window=place) != 0
            assert np.array_equal(~missing[y : y + 512, x : x + 512], valid)
