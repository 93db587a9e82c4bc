"""Rasters as others write them, segmented without ingest: the same result whatever the container."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
import xarray
import zarr
from distributed import Client
from outsize.models import as_tile_network, load_model
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.cluster.client import ClusterOptions, open_client
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.output.store import open_array
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.run import predict
from torch import nn

from ...support.rasters import CRS, TRANSFORM, write_geotiff
from ...support.zoo import ZOO, alive

SHAPE = (3, 173, 211)
WKT = rasterio.crs.CRS.from_string(CRS).to_wkt()


def pixels() -> np.ndarray:
    image = np.random.default_rng(0).integers(1, 200, SHAPE).astype(np.int16)
    image[:, 20:60, 30:70] = -9
    return image


class Classify(nn.Module):
    """Class numbers from int16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = alive(ZOO["unet depth 2"]()).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.float() / 50).argmax(1, keepdim=True).to(torch.uint8)


@cache
def network() -> Network:
    return analyze_network(Classify().eval(), bands=3, dtype="int16")


def geotiff(folder: Path) -> Path:
    return write_geotiff(folder / "a.tif", pixels(), nodata=-9)


def planar(folder: Path) -> Path:
    options = {"interleave": "band", "tiled": True, "blockxsize": 64, "blockysize": 32, "compress": "LZW"}
    return write_geotiff(folder / "a.tif", pixels(), nodata=-9, predictor=2, **options)


def cog(folder: Path) -> Path:
    rasterio.shutil.copy(geotiff(folder), folder / "cog.tif", driver="COG", compress="ZSTD", blocksize=128)
    return folder / "cog.tif"


def vrt(folder: Path) -> Path:
    rasterio.shutil.copy(geotiff(folder), folder / "a.vrt", driver="VRT")
    return folder / "a.vrt"


def ingested(folder: Path) -> Path:
    copy_raster(open_raster(geotiff(folder)), folder / "i.zarr")
    return folder / "i.zarr"


def dataset(axes: str = "byx") -> xarray.Dataset:
    names = {"b": "band", "y": "y", "x": "x"}
    image = pixels().transpose(["byx".index(axis) for axis in axes])
    centres = {
        "y": TRANSFORM.f + TRANSFORM.e * (np.arange(SHAPE[1]) + 0.5),
        "x": TRANSFORM.c + TRANSFORM.a * (np.arange(SHAPE[2]) + 0.5),
    }
    attributes = {"grid_mapping": "spatial_ref", "nodata": -9}
    array = xarray.DataArray(image, dims=[names[axis] for axis in axes], coords=centres, attrs=attributes)
    return xarray.Dataset({"reflectance": array, "spatial_ref": xarray.DataArray(0, attrs={"crs_wkt": WKT})})


def cf(version: Any, *, consolidated: bool, axes: str = "byx", inner: str = "") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        encoding = {"reflectance": {"chunks": tuple({"b": 3, "y": 50, "x": 60}[axis] for axis in axes)}}
        dataset(axes).to_zarr(folder / "x.zarr", zarr_format=version, consolidated=consolidated, encoding=encoding)
        return folder / "x.zarr" / inner

    return write


def geozarr(folder: Path) -> Path:
    """Sharded, and georeferenced by GeoZarr's attributes on the array alone."""
    array = zarr.create_array(
        folder / "g.zarr",
        shape=SHAPE,
        shards=(3, 128, 128),
        chunks=(1, 64, 32),
        dtype="int16",
        dimension_names=("band", "y", "x"),
        attributes={"proj:code": CRS, "spatial:transform": list(TRANSFORM)[:6], "nodata": -9},
    )
    array[:] = pixels()
    return folder / "g.zarr"


def bare(version: Any) -> Callable[[Path], Path]:
    """An array that says nothing about itself: rows, columns, bands."""

    def write(folder: Path) -> Path:
        array = zarr.create_array(
            folder / "b.zarr", shape=(*SHAPE[1:], 3), chunks=(64, 64, 1), dtype="int16", zarr_format=version
        )
        array[:] = np.moveaxis(pixels(), 0, 2)
        return folder / "b.zarr"

    return write


WRITERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "geotiff": (geotiff, {}),
    "planar geotiff": (planar, {}),
    "cog": (cog, {}),
    "vrt": (vrt, {}),
    "ingested": (ingested, {}),
    "cf v2 consolidated": (cf(2, consolidated=True), {}),
    "cf v2": (cf(2, consolidated=False), {}),
    "cf v3": (cf(3, consolidated=False), {}),
    "cf v3 array in the group": (cf(3, consolidated=False, inner="reflectance"), {}),
    "cf yxb": (cf(3, consolidated=False, axes="yxb"), {}),
    "geozarr sharded array": (geozarr, {}),
    "bare v2": (bare(2), {"axes": "yxb", "nodata": -9}),
    "bare v3": (bare(3), {"axes": "yxb", "nodata": -9}),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # xarray on v3 and consolidation
def test_segmented_directly_the_result_is_the_same(tmp_path: Path, client: Client, name: str) -> None:
    write, options = WRITERS[name]
    raster = open_raster(write(tmp_path), **options)
    predict(raster, network(), tmp_path / "o.zarr", client=client, engine="torch", core=64, fill=(100, 100, 100))
    image = pixels()
    missing = (image == -9).all(0)
    image[:, missing] = 100
    with torch.no_grad():
        whole = network().module(torch.from_numpy(image)[None])[0, 0].numpy()
    expected = np.where(missing, 255, whole)
    found = np.asarray(open_array(tmp_path / "o.zarr", "class")[:])
    assert np.array_equal(found == 255, missing)
    # Two classes may be equal to rounding in a pixel or two.
    assert (found != expected).mean() < 1e-4
    if not name.startswith("bare"):
        place = open_raster(tmp_path / "o.zarr").place
        assert place.crs == rasterio.crs.CRS.from_string(CRS)
        assert place.affine.almost_equals(TRANSFORM)


@pytest.mark.usefixtures("_warm_workers")
def test_rasters_named_from_this_folder_are_found_by_workers_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_geotiff(tmp_path / "a.tif", np.random.default_rng(0).integers(1, 200, (4, 90, 70)).astype(np.uint8))
    network = analyze_network(as_tile_network(load_model()), bands=4, dtype="uint8")
    with open_client(
        ClusterOptions(dashboard_address=None), workers=1, threads=1, gdal_cache_bytes=64_000_000
    ) as client:
        monkeypatch.chdir(tmp_path)
        copy_raster(open_raster("a.tif"), "i.zarr", client=client)
        for name in ("a.tif", "i.zarr"):
            assert not predict(name, network, f"{name}.o.zarr", client=client, engine="torch").failed_tiles
    maps = [np.asarray(open_array(tmp_path / f"{name}.o.zarr", "class")[:]) for name in ("a.tif", "i.zarr")]
    assert np.array_equal(*maps)
    assert len(np.unique(maps[0])) > 1
