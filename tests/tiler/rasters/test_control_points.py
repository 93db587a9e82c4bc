"""Ground control points: kept from file to copy, output and export; rational polynomials are said to be lost."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - gives xarray its accessor
import xarray
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.labels.labels import LabelOptions, open_labels
from outsize.tiler.rasters.georeference import Georeference, from_attributes, spatial_ref_attributes, to_rasterio
from outsize.tiler.rasters.notes import list_notes
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import open_stack
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC

from ...support.commands import outsize_here
from ...support.rasters import unique_pixels
from ...support.small_model import save_small_model

PIXELS = unique_pixels(4, 45, 52, np.uint8)
POINTS = [
    GroundControlPoint(row=0, col=0, x=13.25, y=52.5, z=31.5, id="nw", info="corner"),
    GroundControlPoint(row=0, col=52, x=13.5, y=52.55, z=0, id="ne", info=""),
    GroundControlPoint(row=44.5, col=51.25, x=13.45, y=52.375, z=0, id="se", info=""),
    GroundControlPoint(row=20, col=7, x=13.3, y=52.44, z=12, id="in", info=""),
]


def write_with_points(path: Path, crs: str = "EPSG:4326") -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", count=4, height=45, width=52, dtype="uint8", gcps=POINTS, crs=CRS.from_string(crs)
    ) as dataset:
        dataset.write(PIXELS)
    return path


def as_numbers(points: list[GroundControlPoint]) -> list[tuple[float, ...]]:
    return [(p.row, p.col, p.x, p.y, p.z or 0) for p in points]


def test_points_are_read_moved_scaled_and_written_again(tmp_path: Path) -> None:
    raster = open_raster(write_with_points(tmp_path / "a.tif"))
    place = raster.place
    assert (place.transform, place.crs) == (None, CRS.from_epsg(4326))
    written = to_rasterio(place)
    assert as_numbers(written["gcps"]) == as_numbers(POINTS)
    moved = to_rasterio(place.at_scale((Fraction(2), Fraction(1, 4))).moved(10, 3))["gcps"]
    expected = [(p.row * 2 - 10, p.col / 4 - 3, p.x, p.y, p.z or 0) for p in POINTS]
    assert as_numbers(moved) == expected
    assert from_attributes({}, spatial_ref_attributes(place)) == place
    assert from_attributes({}, {"gcps": "nonsense"}) == Georeference()
    assert list_notes(raster) == [("place", "4 ground control points and no transform; outputs keep the points")]


@pytest.mark.parametrize("version", [2, 3])
def test_a_copy_has_the_points_as_rioxarray_reads_them(tmp_path: Path, version: int) -> None:
    raster = open_raster(write_with_points(tmp_path / "a.tif"))
    copy_raster(raster, tmp_path / "a.zarr", zarr_format=3 if version == 3 else 2)
    assert open_raster(tmp_path / "a.zarr").place == raster.place
    with xarray.open_zarr(tmp_path / "a.zarr", consolidated=version == 2, decode_coords="all") as dataset:
        found = dataset["image"].rio.get_gcps()
        assert as_numbers(found) == as_numbers(POINTS)
        assert dataset["image"].rio.crs == CRS.from_epsg(4326)
    # Files of one set of points are one grid.
    assert open_stack([tmp_path / "a.tif", tmp_path / "a.zarr"]).bands == 8


@pytest.mark.system
def test_a_map_and_its_export_have_the_points(tmp_path: Path) -> None:
    scene = write_with_points(tmp_path / "a.tif")
    model = save_small_model(tmp_path / "model.json")
    done = outsize_here("segment", scene, tmp_path / "map.zarr", "--model", model, "--no-dashboard")
    assert done.returncode == 0, done.stderr
    assert "4 ground control points and no transform; outputs keep the points" in done.stderr
    assert outsize_here("export", tmp_path / "map.zarr", tmp_path / "map.tif").returncode == 0
    with rasterio.open(tmp_path / "map.tif") as dataset:
        found, crs = dataset.gcps
    assert as_numbers(found) == as_numbers(POINTS)
    assert crs == CRS.from_epsg(4326)
    refused = outsize_here("segment", scene, tmp_path / "b.zarr", "--model", model, "--bounds", "13,52,14,53")
    assert "--bounds needs a raster with a transform" in refused.stderr


def test_labels_with_the_same_points_lie_on_the_grid(tmp_path: Path) -> None:
    raster = open_raster(write_with_points(tmp_path / "a.tif"))
    copy_raster(open_raster(tmp_path / "a.tif", bands=(2,)), tmp_path / "labels.zarr")
    labels = open_labels(
        str(tmp_path / "labels.zarr"), raster.place, (45, 52), of="scene", names=[*map(str, range(255))],
        options=LabelOptions(),
    )  # fmt: skip
    assert labels.note == ""


def test_rational_polynomials_are_said_to_be_left_behind(tmp_path: Path) -> None:
    rpc = RPC(
        height_off=1, height_scale=2, lat_off=3, lat_scale=4, line_den_coeff=[1.0] * 20, line_num_coeff=[2.0] * 20,
        line_off=5, line_scale=6, long_off=7, long_scale=8, samp_den_coeff=[1.0] * 20, samp_num_coeff=[3.0] * 20,
        samp_off=9, samp_scale=10,
    )  # fmt: skip
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=4, height=45, width=52, dtype="uint8", rpcs=rpc
    ) as dataset:
        dataset.write(PIXELS)
    raster = open_raster(tmp_path / "a.tif")
    assert list_notes(raster) == [("file", "rational polynomial coefficients (RPC), which outputs do not keep")]
    done = outsize_here("ingest", tmp_path / "a.tif", tmp_path / "a.zarr")
    assert "RPC" in done.stderr
