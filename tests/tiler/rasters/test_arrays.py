"""Arrays of this process, and bare modules, where rasters and networks are wanted."""

from __future__ import annotations

import gc
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rioxarray  # noqa: F401 - the accessor of DataArrays
import torch
import xarray
from distributed import Client
from outsize.tiler.base.errors import RasterError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.output.store import open_array
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.inference import lazy_predict, predict_window
from outsize.tiler.runs.run import predict
from torch import nn

from ...support.rasters import CRS, TRANSFORM, write_geotiff


def image_of(bands: int = 3, height: int = 70, width: int = 90, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, (bands, height, width)).astype(dtype)


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def whole(module: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(image)[None])[0].numpy()


def read(raster: Any) -> np.ndarray:
    reader = raster.open_reader()
    return reader.read(Window.whole(raster.shape_yx))


def test_a_bare_module_runs_over_an_array(tmp_path: Path, client: Client) -> None:
    module, image = small_module(), image_of()
    expected = whole(module, image)
    predict(image, module, tmp_path / "o.zarr", client=client, memory="4GB", core=64)
    assert np.allclose(open_array(tmp_path / "o.zarr", "logits")[...], expected, atol=1e-3)
    window = Window(y=5, x=9, height=30, width=40)
    assert np.allclose(predict_window(image, module, window), expected[(slice(None), *window.slices())], atol=1e-3)
    assert np.allclose(lazy_predict(image, module, chunk=50).compute(), expected, atol=1e-3)
    assert plan_tiles(image, module).raster_shape == (3, 70, 90)
    assert plan_tiles((3, 70, 90), module).raster_shape == (3, 70, 90)


@pytest.mark.parametrize("axes", ["byx", "yxb", "xyb"])
def test_the_order_of_an_arrays_dimensions_is_told_or_plain(axes: str) -> None:
    image = image_of()
    turned = image.transpose(["byx".index(name) for name in axes])
    assert np.array_equal(read(open_raster(turned, axes)), image)
    assert np.array_equal(read(open_raster(torch.from_numpy(image))), image)
    assert np.array_equal(read(open_raster(image[0]))[0], image[0])


def test_what_is_no_raster_is_refused_in_one_line() -> None:
    image = image_of()
    for values, said in (
        (image.transpose(1, 2, 0), 'shape (70, 90, 3) does not say what its dimensions are; give axes="yxb"'),
        (np.ma.masked_less(image, 9), "an array must not be masked"),
        (image.astype(complex), "complex"),
        (np.zeros((0, 5, 5)), "must have pixels"),
        (3, "must be a path, a Raster, or an array of numpy, torch or xarray, got int"),
        (None, "got NoneType"),
    ):
        with pytest.raises(Exception, match=re.escape(said)) as found:
            open_raster(values)
        assert "\n" not in str(found.value)
    with pytest.raises(UsageError, match="a network must be an analysed Network or a torch module, got str"):
        predict_window(image, "net", Window(y=0, x=0, height=1, width=1))  # type: ignore[arg-type]


def test_a_data_array_keeps_its_place_its_bands_and_its_nodata(tmp_path: Path) -> None:
    image = image_of(dtype=np.int16)
    image[:, 3:9, 4:7] = -99
    path = write_geotiff(tmp_path / "s.tif", image, nodata=-99)
    from_disk = open_raster(path)
    with xarray.open_dataarray(path, engine="rasterio", mask_and_scale=False) as values:
        raster = open_raster(values.load())
        part = open_raster(values[:, 10:50, 20:80])
    assert raster.place.crs_wkt == from_disk.place.crs_wkt
    assert np.allclose(raster.place.transform, TRANSFORM[:6])
    assert np.allclose(part.place.transform, (TRANSFORM @ TRANSFORM.translation(20, 10))[:6])
    assert raster.nodata == -99
    assert np.array_equal(read(raster), image)
    with xarray.open_dataarray(path, engine="rasterio", mask_and_scale=True) as values:
        masked = open_raster(values.load())
    reader = masked.open_reader()
    window = Window.whole(masked.shape_yx)
    missing = reader.read_missing(window, reader.read(window))
    assert np.array_equal(missing, image[0] == -99)
    assert CRS


def test_the_folder_goes_with_the_last_raster() -> None:
    raster = open_raster(image_of())
    folder = Path(raster.path).parent
    copy, sent = raster.made_absolute(), pickle.loads(pickle.dumps(raster))
    assert folder.stat().st_mode & 0o777 == 0o700
    del raster
    gc.collect()
    assert folder.exists()
    del copy
    gc.collect()
    assert not folder.exists()
    assert sent.kept is None


def test_axes_say_what_a_data_arrays_own_names_do_not() -> None:
    image = image_of(3, 20, 30)
    labelled = xarray.DataArray(image.transpose(1, 2, 0), dims=("y", "x", "wavelength"))
    with pytest.raises(RasterError, match="--axes yxb"):
        open_raster(labelled)
    raster = open_raster(labelled, axes="yxb")
    assert np.array_equal(raster.open_reader().read(Window.whole(raster.shape_yx)), image)


def test_attributes_that_cannot_be_stored_are_named() -> None:
    labelled = xarray.DataArray(image_of(1, 8, 8), dims=("band", "y", "x"), attrs={"thing": object()})
    with pytest.raises(UsageError, match="drop_attrs"):
        open_raster(labelled)
