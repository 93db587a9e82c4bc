"""Output stores as others see them: xarray, rioxarray, GDAL's conventions, damaged chunks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - registers .rio
import torch
import xarray
from affine import Affine
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.errors import OutputError
from outsize.tiler.base.geometry import Window
from outsize.tiler.output.store import (
    OutputDescription,
    chunk_name,
    create_output,
    open_array,
    read_header,
    update_header,
    write_core,
)
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.georeference import Georeference, from_rasterio
from outsize.tiler.rasters.opening import open_raster
from rasterio.crs import CRS

from ...support.rasters import CRS as WHERE
from ...support.rasters import TRANSFORM, has_all_chunks
from ...support.zoo import ZOO, alive

PLACE = from_rasterio(CRS.from_string(WHERE), TRANSFORM)


def class_plan(shape: tuple[int, int] = (130, 200)) -> TilePlan:
    class Argmax(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(1, keepdim=True).to(torch.uint8)

    return plan_tiles((3, *shape), analyze_network(Argmax(), bands=3), core=64)


FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])


NOWHERE = {"kind": "file", "paths": ["nowhere"], "options": {}}


def make_output(path: Path, place: Georeference = PLACE, zarr_format: Any = 3) -> TilePlan:
    plan = class_plan()
    description = OutputDescription(kind="class", classes=("a", "b c"), colours=((1, 2, 3), (4, 5, 6)))
    header = {"source": NOWHERE}
    create_output(path, plan=plan, description=description, place=place, header=header, zarr_format=zarr_format)
    return plan


@FORMATS
def test_xarray_and_rioxarray_open_it_georeferenced_with_its_dtype(tmp_path: Path, zarr_format: int) -> None:
    plan = make_output(tmp_path / "o.zarr", zarr_format=zarr_format)
    core = plan.grid.window(1, 1)
    write_core(open_array(tmp_path / "o.zarr", "class", "r+"), core, np.full((1, *core.shape), 1, np.uint8))
    old = zarr_format == 2
    # Of v2 xarray takes the fill value for nodata, and would turn it into NaN.
    options: dict[str, Any] = {"consolidated": old, "mask_and_scale": not old, "decode_coords": "all"}
    dataset = xarray.open_dataset(tmp_path / "o.zarr", engine="zarr", **options)
    classes = dataset["class"]
    assert classes.dtype == np.uint8
    assert classes.rio.crs == CRS.from_string(WHERE)
    assert classes.rio.transform().almost_equals(TRANSFORM)
    assert classes.rio.nodata == 255
    assert (classes.to_numpy()[core.slices()] == 1).all()
    assert classes.attrs["flag_meanings"] == "a b_c"
    assert float(dataset["x"][0]) == TRANSFORM.c + TRANSFORM.a / 2


@FORMATS
def test_it_is_read_back_as_a_raster_with_the_same_place(tmp_path: Path, zarr_format: int) -> None:
    make_output(tmp_path / "o.zarr", zarr_format=zarr_format)
    for path in (tmp_path / "o.zarr" / "class", tmp_path / "o.zarr"):
        raster = open_raster(path)
        assert raster.array_path == "class"
        assert raster.place == PLACE
        assert raster.nodata == 255


GDAL = tuple(int(part) for part in rasterio.__gdal_version__.split(".")[:2])


@pytest.mark.parametrize("kind", ["class", "probability", "logits"])
@pytest.mark.parametrize(
    "zarr_format", [2, pytest.param(3, marks=pytest.mark.skipif(GDAL < (3, 12), reason="GDAL reads v3 from 3.12 on"))]
)
def test_gdal_opens_it_georeferenced_with_nodata_and_dtype(tmp_path: Path, kind: Any, zarr_format: Any) -> None:
    class Head(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(1, keepdim=True).to(torch.uint8) if kind == "class" else x.to(dtype)

    dtype = torch.uint8 if kind == "probability" else torch.float32
    plan = plan_tiles((3, 130, 200), analyze_network(Head(), bands=3), core=64)
    create_output(
        tmp_path / "o.zarr",
        plan=plan,
        description=OutputDescription(kind=kind),
        place=PLACE,
        header={},
        zarr_format=zarr_format,
    )
    core = plan.grid.window(1, 1)
    channels = plan.output_shape[0]
    values = np.random.default_rng(0).integers(0, 9, (channels, *core.shape)).astype(plan.output_dtype)
    write_core(open_array(tmp_path / "o.zarr", kind, "r+"), core, values)
    with rasterio.open(f'ZARR:"{tmp_path / "o.zarr"}":/{kind}') as dataset:
        assert dataset.crs == PLACE.crs
        assert dataset.transform.almost_equals(TRANSFORM)
        assert dataset.dtypes == (plan.output_dtype,) * channels
        assert np.array_equal([dataset.nodata], [np.nan if kind == "logits" else 255], equal_nan=True)
        assert np.array_equal(dataset.read(window=((64, 128), (64, 128))), values)


def test_a_rotated_grid_keeps_its_transform(tmp_path: Path) -> None:
    rotated = from_rasterio(CRS.from_string(WHERE), Affine.translation(10, 20) * Affine.rotation(30))
    make_output(tmp_path / "o.zarr", rotated)
    assert open_raster(tmp_path / "o.zarr" / "class").place == rotated


def test_a_raster_without_georeference_stays_without(tmp_path: Path) -> None:
    make_output(tmp_path / "o.zarr", Georeference())
    assert open_raster(tmp_path / "o.zarr" / "class").place == Georeference()


def test_scaled_grids_keep_the_corner() -> None:
    scaled = PLACE.at_scale((Fraction(1, 4), Fraction(2)))
    assert scaled.affine * (0, 0) == PLACE.affine * (0, 0)
    assert scaled.affine * (2, 1) == PLACE.affine * (1, 4)


@FORMATS
def test_chunks_of_fill_value_are_written_too(tmp_path: Path, zarr_format: Any) -> None:
    plan = make_output(tmp_path / "o.zarr", zarr_format=zarr_format)
    tile = plan.tile(2, 3)
    assert not has_all_chunks(tmp_path / "o.zarr", "class", plan, tile, zarr_format)
    write_core(open_array(tmp_path / "o.zarr", "class", "r+"), tile.core, np.full((1, *tile.core.shape), 255, np.uint8))
    assert has_all_chunks(tmp_path / "o.zarr", "class", plan, tile, zarr_format)
    assert not has_all_chunks(tmp_path / "o.zarr", "class", plan, plan.tile(2, 2), zarr_format)


@FORMATS
def test_a_flipped_byte_in_a_chunk_is_an_error(tmp_path: Path, zarr_format: Any) -> None:
    plan = make_output(tmp_path / "o.zarr", zarr_format=zarr_format)
    core = plan.grid.window(0, 0)
    values = np.random.default_rng(0).integers(0, 2, (1, *core.shape)).astype(np.uint8)
    write_core(open_array(tmp_path / "o.zarr", "class", "r+"), core, values)
    chunk = tmp_path / "o.zarr" / chunk_name("class", (0, 0), zarr_format)
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(Exception, match=r"(?i)checksum|corrupt|zstd|decompress"):
        open_array(tmp_path / "o.zarr", "class")[core.slices()]


def test_headers_are_extended_and_foreign_stores_refused(tmp_path: Path) -> None:
    make_output(tmp_path / "o.zarr")
    update_header(tmp_path / "o.zarr", {"more": 1})
    header = read_header(tmp_path / "o.zarr")
    assert (header["more"], header["source"], header["kind"]) == (1, NOWHERE, "class")
    with pytest.raises(OutputError, match="not an output of outsize"):
        read_header(tmp_path)
    update_header(tmp_path / "o.zarr", {"format": 99})
    with pytest.raises(OutputError, match="has output format 99, this version reads 1"):
        read_header(tmp_path / "o.zarr")


@FORMATS
def test_layers_of_a_core_land_in_their_place(tmp_path: Path, zarr_format: Any) -> None:
    network = analyze_network(alive(ZOO["convolution"]()).float(), bands=3)
    plan = plan_tiles((3, 70, 90), network, core=64)
    description = OutputDescription(kind="logits", classes=("a", "b"), colours=((0, 0, 0), (9, 9, 9)))
    create_output(
        tmp_path / "l.zarr", plan=plan, description=description, place=PLACE, header={}, zarr_format=zarr_format
    )
    core = plan.grid.window(1, 1)
    values = np.random.default_rng(0).random((2, *core.shape)).astype(np.float32)
    array = open_array(tmp_path / "l.zarr", "logits", "r+")
    write_core(array, core, values)
    rows, columns = core.slices()
    assert np.array_equal(array[:, rows, columns], values)
    assert np.isnan(array[:, :64, :]).all()
    assert has_all_chunks(tmp_path / "l.zarr", "logits", plan, plan.tile(1, 1), zarr_format)
    assert np.array_equal(open_array(tmp_path / "l.zarr", "class")[:], [0, 1])
    assert dict(open_array(tmp_path / "l.zarr", "class").attrs)["flag_meanings"] == "a b"
    (tmp_path / "l.zarr" / chunk_name("logits", (1, 1, 1), zarr_format)).unlink()
    assert not has_all_chunks(tmp_path / "l.zarr", "logits", plan, plan.tile(1, 1), zarr_format)
    assert core == Window(y=64, x=64, height=6, width=26)
