"""Pixels of every type at its extremes, NaN, infinity, nodata: every engine against torch on the whole image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from outsize.tiler.network import Network, analyze_network
from outsize.tiler.raster import Raster, open_raster
from torch import Tensor, nn

from ..support.rasters import write_geotiff
from ..support.runs import run, stored

SHAPE = (75, 91)
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")
BLOCK = (slice(30, 40), slice(20, 33))


class Scaled(nn.Module):
    """Casts its pixels to float32 first, as models with scaling do."""

    def __init__(self, bands: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(bands, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(torch.float32) / 1000)


@cache
def scaled(dtype: str, bands: int = 2) -> Network:
    return analyze_network(Scaled(bands).eval(), bands, dtype)


def extreme_image(dtype: str, bands: int = 2) -> np.ndarray:
    """Ordinary numbers, and a block of the least and the greatest that the type has."""
    kind = np.dtype(dtype)
    image = np.random.default_rng(0).integers(1, 120, (bands, *SHAPE)).astype(kind)
    if kind.kind == "f":
        limits = np.finfo(kind)
        image[0][BLOCK], image[1][BLOCK] = min(float(limits.max), 9e19), max(float(limits.min), -9e19)
        image[:, 50, 50] = limits.tiny
    else:
        image[0][BLOCK], image[1][BLOCK] = np.iinfo(kind).max, np.iinfo(kind).min
        image[:, 50, 50] = np.iinfo(kind).max - 1
    return image


def write(folder: Path, image: np.ndarray, **options: Any) -> Raster:
    """As GeoTIFF, or as Zarr where GDAL of any version has no such type."""
    if image.dtype.name in ("float16", "int8", "int64", "uint64"):
        array = zarr.create_array(
            folder / "s.zarr",
            shape=image.shape,
            chunks=(1, 64, 64),
            dtype=image.dtype,
            dimension_names=("band", "y", "x"),
        )
        array[:] = image
        return open_raster(folder / "s.zarr", nodata=options.get("nodata"))
    return open_raster(write_geotiff(folder / "s.tif", image, **options))


def by_torch(network: Network, image: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
    """The module on the whole image, in torch, its missing pixels 0 before and NaN after."""
    if missing is not None:
        image = np.where(missing, np.zeros((), image.dtype), image)
    with torch.no_grad():
        found = network.module(torch.from_numpy(image)[None])[0].numpy().copy()
    if missing is not None:
        found[:, missing] = np.nan
    return found


def agrees(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal up to rounding, relative to the largest number around: extremes swallow their neighbours' digits."""
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    scale = np.nanmax(np.abs(wanted.astype(np.float64)))
    near = np.abs(np.nan_to_num(found.astype(np.float64) - wanted)) <= 1e-5 * np.maximum(
        np.nan_to_num(np.abs(wanted.astype(np.float64))), 10
    )
    ordinary = np.ones(SHAPE, bool)
    ordinary[26:44, 16:37] = False
    ordinary[46:55, 46:55] = False
    difference = np.nanmax(np.abs(found.astype(np.float64) - wanted))
    return bool(difference <= 1e-6 * scale and near[:, ordinary].all())


METHODS = [("openvino", "window"), ("openvino", "program"), ("torch", "window"), ("torch", "program")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("engine", "method"), METHODS)
@pytest.mark.parametrize("case", ["extremes", "nodata", "not finite"])
def test_every_pixel_type_gives_what_torch_gives(
    tmp_path: Path, client: Client, dtype: str, engine: str, method: str, case: str
) -> None:
    image, network, options = extreme_image(dtype), scaled(dtype), {}
    missing = np.zeros(SHAPE, bool)
    if case == "nodata":
        options["nodata"] = float(image[0][BLOCK][0, 0]) if dtype not in ("int64", "uint64") else 0
        image[:, 5:9, 60:70] = options["nodata"]
        missing[5:9, 60:70] = True
    elif case == "not finite":
        if np.dtype(dtype).kind != "f":
            pytest.skip("integers are finite")
        image[:, 5:9, 60:64], image[0, 5:9, 64:70], image[1, 5:9, 64:70] = np.nan, np.inf, -np.inf
        missing[5:9, 60:70] = True
    raster, out = write(tmp_path, image, **options), tmp_path / "o.zarr"
    assert raster.dtype == np.dtype(dtype)
    summary = run(raster, network, out, client, engine=engine, method=method, core=64)
    assert agrees(stored(out), by_torch(network, image, missing))
    assert summary.undeclared_pixels == (40 if case == "not finite" else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_counts_pixels_of_every_type(tmp_path: Path, client: Client, dtype: str) -> None:
    """In few bits nothing equals torch; the pixels that enter do."""
    pytest.importorskip("nncf")
    image = np.random.default_rng(0).integers(1, 120, (2, *SHAPE)).astype(dtype)
    summary = run(
        write(tmp_path, image), scaled(dtype), tmp_path / "o.zarr", client, engine="openvino", precision="int8"
    )
    assert summary.failed_tiles == ()
    wanted = by_torch(scaled(dtype), image)
    assert np.abs(stored(tmp_path / "o.zarr") - wanted).max() < 0.1 * np.abs(wanted).max()
