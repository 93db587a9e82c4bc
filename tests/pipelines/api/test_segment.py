"""What a Python user calls: one call from a raster to a result, against the module on the whole image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import outsize
import pytest
import rasterio
import torch
import xarray as xr
from outsize.tiler.base.errors import TilerError
from outsize.tiler.runs.events import Event, TileFinished
from PIL import Image
from torch import Tensor, nn

from ...support.rasters import write_geotiff

pytestmark = pytest.mark.system

HERE = outsize.ClusterOptions(processes=False, dashboard_address=None)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def network(channels: int = 3) -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Upsample(scale_factor=2))
    return nn.Sequential(*layers, nn.Conv2d(8, channels, 5, padding=2)).eval()


def image(height: int = 180, width: int = 198) -> np.ndarray:
    pixels = np.random.default_rng(2).integers(1, 256, (3, height, width), dtype=np.uint8)
    pixels[:, 20:50, 60:90] = 0
    return pixels


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_geotiff(tmp_path_factory.mktemp("api") / "scene.tif", image(), nodata=0)


def expected(net: nn.Module, fill: float) -> np.ndarray:
    """The definition: nodata filled, scaled, run, classes; nodata where there was none."""
    pixels = image()
    missing = (pixels == 0).all(0)
    raw = torch.from_numpy(np.where(missing, np.uint8(fill), pixels))[None]
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        logits = net((raw / 255 - mean) / std)
    return np.where(missing, 255, logits[0].argmax(0).numpy()).astype(np.uint8)


def made(source: Path, out: Path, fill: float = 7) -> outsize.Result:
    model = outsize.Model(
        network(), bands=3, scale=1 / 255, mean=MEAN, std=STD, fill=fill, classes=["water", "land", "ice"]
    )
    return outsize.segment(source, model, out, engine="torch", core=64, memory="2GB", cluster=HERE)


def test_a_result_is_the_module_on_the_whole_image(source: Path, tmp_path: Path) -> None:
    results = {fill: made(source, tmp_path / f"{fill}.zarr", fill) for fill in (7, 250)}
    for fill, result in results.items():
        assert (result.read()[0] == expected(network(), fill)).mean() > 0.9999
        assert result.halo.top >= 3
    # The model carries its fill: pixels beside nodata follow from it.
    assert not np.array_equal(results[7].read(), results[250].read())


def test_a_result_says_what_it_is(source: Path, tmp_path: Path) -> None:
    result = made(source, tmp_path / "map.zarr")
    again = outsize.open_result(tmp_path / "map.zarr")
    assert result.summary is not None
    assert again.summary is None
    for each in (result, again):
        assert (each.kind, each.shape, each.dtype, each.nodata) == ("class", (1, 180, 198), np.uint8, 255)
        assert [entry.name for entry in each.classes] == ["water", "land", "ice"]
        assert (each.failed_tiles, each.is_finished, each.model) == ((), True, "Sequential")
        with rasterio.open(source) as theirs:
            assert (each.crs, each.transform, each.bounds) == (theirs.crs, theirs.transform, tuple(theirs.bounds))
        assert each.verify().state == "sound"
        assert "class, 1 x 180 x 198 uint8" in repr(each)
        assert "<td" in each._repr_html_()
    masked = again.read(outsize.Window(y=10, x=50, height=30, width=40), masked=True)
    assert isinstance(masked, np.ma.MaskedArray)
    assert masked.mask.any()
    assert not masked.mask.all()


def test_a_result_goes_where_others_read_it(source: Path, tmp_path: Path) -> None:
    result = made(source, tmp_path / "map.zarr")
    pixels = result.read()
    lazy = result.to_xarray()
    assert np.array_equal(lazy.values, pixels[0])
    assert lazy.rio.crs == result.crs if hasattr(lazy, "rio") else "spatial_ref" in lazy.coords
    with rasterio.open(result.to_geotiff(tmp_path / "map.tif")) as dataset:
        assert np.array_equal(dataset.read(), pixels)
        assert dataset.crs == result.crs
    with Image.open(result.to_png(tmp_path / "map.png")) as picture:
        assert picture.size > (198, 180)
    assert "water" in result.to_report(tmp_path / "map.html").read_text()
    areas = result.count_areas()
    counted = {entry.name: entry.pixels for entry in areas.classes}
    values, counts = np.unique(pixels[pixels != 255], return_counts=True)
    assert counted == {result.classes[int(value)].name: int(count) for value, count in zip(values, counts, strict=True)}
    with pytest.raises(outsize.OutputError, match=r"map.tif exists"):
        result.to_geotiff(tmp_path / "map.tif")
    with pytest.raises(outsize.UsageError, match=r"must end in .tif or .tiff, got map.jpg"):
        result.to_geotiff(tmp_path / "map.jpg")


def test_a_plot_lies_in_the_rasters_coordinates(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    result = made(source, tmp_path / "map.zarr")
    axes = result.plot()
    west, south, east, north = result.bounds
    assert axes.get_xlim() == (west, east)
    assert axes.get_ylim() == (south, north)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text().split()[0] for text in legend.get_texts()] == ["water", "land", "ice"]


def test_whatever_holds_pixels_is_taken(source: Path, tmp_path: Path) -> None:
    ours = made(source, tmp_path / "file.zarr").read()
    model = outsize.Model(network(), bands=3, scale=1 / 255, mean=MEAN, std=STD, fill=7)
    data = xr.DataArray(image(), dims=("band", "y", "x"), attrs={"_FillValue": 0})
    with rasterio.open(source) as dataset:
        paths = [
            write_geotiff(tmp_path / f"{band}.tif", dataset.read(band)[None], nodata=0) for band in dataset.indexes
        ]
    for name, what in (("array", data), ("raster", outsize.open_raster(source)), ("stack", paths)):
        result = outsize.segment(what, model, tmp_path / f"{name}.zarr", engine="torch", core=64, cluster=HERE)
        assert np.array_equal(result.read(), ours), name


def test_a_bare_module_is_a_model_of_numbered_classes(source: Path, tmp_path: Path) -> None:
    result = outsize.segment(source, network(5), tmp_path / "o.zarr", engine="torch", core=64, cluster=HERE)
    assert [entry.name for entry in result.classes] == [f"class {value}" for value in range(5)]
    with torch.no_grad():
        logits = network(5)(torch.from_numpy(image().astype(np.float32))[None])
    valid = result.read()[0] != 255
    assert (result.read()[0] == logits[0].argmax(0).numpy())[valid].mean() > 0.9999


def test_an_unfinished_result_is_read_and_not_counted(source: Path, tmp_path: Path) -> None:
    model = outsize.Model(network(), bands=3, scale=1 / 255, mean=MEAN, std=STD, fill=7)

    def stop(event: Event) -> None:
        if isinstance(event, TileFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outsize.segment(source, model, tmp_path / "o.zarr", engine="torch", core=64, cluster=HERE, listener=stop)
    result = outsize.open_result(tmp_path / "o.zarr")
    assert not result.is_finished
    assert "unfinished" in repr(result)
    assert result.read().shape == (1, 180, 198)
    for call in (result.count_areas, lambda: result.to_geotiff(tmp_path / "o.tif")):
        with pytest.raises(outsize.OutputError, match="unfinished; the same segment resumes it"):
            call()
    finished = outsize.segment(source, model, tmp_path / "o.zarr", engine="torch", core=64, cluster=HERE)
    assert finished.count_areas().nodata_pixels == 30 * 30


def test_wrong_calls_are_refused_in_one_line(source: Path, tmp_path: Path) -> None:
    model = outsize.Model(network(), bands=3)
    for call, words in (
        (lambda: outsize.segment(source, 3, tmp_path / "o.zarr"), "a model is an outsize.Model"),
        (lambda: outsize.segment(outsize.open_raster(source), model, "o.zarr", reading=outsize.ReadOptions()), "open"),
        (lambda: outsize.segment(image(), model, "o.zarr", reading=outsize.ReadOptions()), "options of reading"),
        (lambda: outsize.Model(network(), bands=0), "at least one band"),
        (lambda: outsize.Model(network(), bands="rgb"), "a number or a list of names"),
        (lambda: outsize.Model(network(), bands=3, mean=(1, 2)), "as many means, got 2"),
        (lambda: outsize.Model(network(), bands=3, scale=0), "other than 0"),
        (lambda: outsize.Model(network(), bands=3, scale=2, scaling=model.scaling), "leave one out"),
        (lambda: outsize.Model(network(), bands=3, classes="ab"), "a list of names"),
        (lambda: outsize.Model(network(), bands=4), "fails on images of 4 bands"),
        (lambda: outsize.open_result(source), "not an output"),
    ):
        with pytest.raises(TilerError, match=words) as refusal:
            call()  # pyright: ignore[reportCallIssue]
        assert "\n" not in str(refusal.value)
    with pytest.raises(TypeError, match="tile_size"):
        outsize.segment(source, model, tmp_path / "o.zarr", tile_size=5)  # pyright: ignore[reportCallIssue]
    assert not list(tmp_path.iterdir())


def test_a_model_computes_what_its_arguments_say() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = outsize.Model(Same(), bands=["red", "nir"], scale=0.5, mean=np.array([1.0, 2.0]), std=4, task="regression")
    pixels = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)
    found = outsize.as_tile_network(model, "values")(pixels)
    assert torch.allclose(found, (pixels * 0.5 - torch.tensor([1.0, 2.0])[None, :, None, None]) / 4)
    assert model.bands == ("red", "nir")
    assert [entry.name for entry in model.classes] == ["channel 0", "channel 1"]
    assert "2 bands (red, nir)" in repr(model)
    assert outsize.Model(Same(), bands=np.int64(2), task="regression").bands == ("band 1", "band 2")
    assert outsize.Model(Same(), bands=(name for name in "ab"), task="regression").bands == ("a", "b")  # pyright: ignore[reportArgumentType]


def test_every_error_is_exported() -> None:
    import outsize.models as models
    from outsize.tiler.base import errors

    known = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TilerError)}
    known |= {models.ModelFileError, models.HeadError, models.HeadMemoryError, models.GalleryError}
    for kind in known:
        assert getattr(outsize, kind.__name__) is kind
        assert kind.__name__ in outsize.__all__
