"""Real imagery as users bring it: stacks, mosaics with holes, hidden masks, saturated int16, eight bands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from dask import config
from distributed import Client
from outsize.models import Scaling, SegmentationClass, SegmentationModel, UNet, save_model
from outsize.tests.support.commands import outsize_here, result_of
from outsize.tiler.base.geometry import Window
from outsize.tiler.output.store import open_array
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.raster import Raster
from rasterio.merge import merge
from torch.nn import functional as F

pytestmark = pytest.mark.system


@pytest.fixture(autouse=True)
def _workers_are_there(client: Client) -> Iterator[None]:
    """Commands are given in this process, and find the Dask worker that all tests here share: none starts its own."""
    with config.set({"scheduler-address": client.scheduler.address}):  # pyright: ignore[reportOptionalMemberAccess]
        yield


def outsize(*words: str | Path) -> dict[str, Any]:
    """The command in this process; its JSON."""
    return result_of(outsize_here("--json", *words))


def read(raster: Raster) -> tuple[np.ndarray, np.ndarray]:
    window = Window.whole(raster.shape_yx)
    reader = raster.open_reader()
    image = reader.read(window)
    missing = reader.read_missing(window, image)
    return image, np.zeros(window.shape, bool) if missing is None else missing


def vegetation(image: np.ndarray, red: int, nir: int) -> np.ndarray:
    """Whether NDVI, smoothed over 3 x 3 pixels, is above its median: a class that a small network can learn."""
    bands = torch.from_numpy(image[[red, nir]].astype(np.float32))
    smooth = F.avg_pool2d(bands, 3, 1, 1, count_include_pad=False)
    index = (smooth[1] - smooth[0]) / (smooth[1] + smooth[0] + 1)
    return (index > index.median()).numpy()


def train(raster: Raster, red: int, nir: int, path: Path) -> Path:
    """A small model that tells vegetation, trained for seconds on the raster itself."""
    torch.manual_seed(0)
    image, missing = read(raster)
    target = torch.from_numpy(vegetation(image, red, nir).astype(np.int64))
    target[torch.from_numpy(missing)] = -1
    valid = image[:, ~missing].astype(np.float64)
    mean, deviation = valid.mean(1), valid.std(1) + 1e-6
    scaled = torch.from_numpy(((image - mean[:, None, None]) / deviation[:, None, None]).astype(np.float32))
    network = UNet(raster.bands, 2, (8, 12)).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    side = 128
    for step in range(60):
        y, x = (37 * step % (extent - side) for extent in raster.shape_yx)
        crop = (slice(y, y + side), slice(x, x + side))
        loss = F.cross_entropy(network(scaled[None, :, *crop]), target[None, *crop], ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model = SegmentationModel(
        name=path.stem,
        network=network.eval(),
        bands=tuple(raster.band_names),
        scaling=Scaling.z_score(mean=mean.tolist(), stddev=deviation.tolist()),
        fill=tuple(mean.tolist()),
        classes=(
            SegmentationClass(name="bare", colour=(200, 160, 90)),
            SegmentationClass(name="vegetation", colour=(20, 120, 40)),
        ),
    )
    save_model(model, path)
    return path


def segment(source: Path | str, out: Path, model: Path, *options: str) -> np.ndarray:
    summary = outsize("segment", source, out, "--model", model, "--no-dashboard", *options)
    assert summary["start_check_flipped"] == 0
    assert summary["failed_tiles"] == 0
    return np.asarray(open_array(out, "class")[:])


def require_same_place(out: Path, source: Raster, folder: Path) -> None:
    """The exported COG lies where the raster does."""
    outsize("export", out, folder / "map.tif")
    with rasterio.open(folder / "map.tif") as cog:
        assert cog.crs == source.place.crs
        assert cog.transform.almost_equals(source.place.affine)
        assert cog.shape == source.shape_yx


@pytest.mark.long
def test_a_sentinel_2_stack_of_four_files(shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "data/sentinel2_rachel_carson"
    files = [next(folder.glob(f"*{band}.tif")) for band in ("B04", "B03", "B02", "B08")]
    outsize("ingest", *files, tmp_path / "stack.zarr", "--stack")
    raster = open_raster(tmp_path / "stack.zarr")
    image, _ = read(raster)
    for band, path in enumerate(files):
        with rasterio.open(path) as dataset:
            assert np.array_equal(image[band], dataset.read(1))
            assert (raster.place.crs, raster.place.affine) == (dataset.crs, dataset.transform)
    model = train(raster, 0, 3, tmp_path / "sentinel.json")
    classes = segment(tmp_path / "stack.zarr", tmp_path / "map.zarr", model)
    assert (classes == vegetation(image, 0, 3)).mean() > 0.85
    require_same_place(tmp_path / "map.zarr", raster, tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("13476", "13477", "13846", "13847"), id="block"),
        pytest.param(None, id="all with holes", marks=pytest.mark.long),
    ],
)
def test_a_naip_mosaic(shared_dir: Path, tmp_path: Path, names: tuple[str, ...] | None) -> None:
    folder = shared_dir / "data/naip"
    files = [folder / f"tile_{name}.tif" for name in names] if names else sorted(folder.glob("*.tif"))
    values = outsize("ingest", *files, tmp_path / "mosaic.zarr", "--mosaic")
    raster = open_raster(tmp_path / "mosaic.zarr")
    image, missing = read(raster)
    merged, transform = merge(files)
    assert np.array_equal(image, merged)
    assert raster.place.affine.almost_equals(transform)
    assert values["mask"]
    assert missing.sum() == missing.size - len(files) * 256 * 256
    model = train(raster, 0, 3, tmp_path / "naip.json")
    classes = segment(tmp_path / "mosaic.zarr", tmp_path / "map.zarr", model, "--mark-nodata-context")
    # Nodata in, nodata out: holes stay holes, and nothing else becomes one.
    assert np.array_equal(classes == 255, missing)
    context = np.asarray(open_array(tmp_path / "map.zarr", "nodata_context")[:])
    assert np.array_equal(context == 255, missing)
    assert bool((context == 1).any()) is bool(missing.any())
    clear = context == 0
    assert (classes[clear] == vegetation(image, 0, 3)[clear]).mean() > 0.85
    require_same_place(tmp_path / "map.zarr", raster, tmp_path)


LANDSAT = ("LE70220491999322EDC01_stack.gtif", "LE70220492002106EDC00_stack.gtif")
CLOUDED, SATURATED = (2.0, 4.0), 16000


def test_both_landsat_dates_with_their_masks_and_saturation(shared_dir: Path, tmp_path: Path) -> None:
    # Red, green, blue, near infrared are bands 3, 2, 1, 4; band 8 is Fmask (2 shadow, 4 cloud); 16000 is saturated,
    # and only one of the dates says what nodata is.
    options = ["--bands", "3,2,1,4", "--mask-band", "8=2,4", "--nodata", "-9999", "--nodata", str(SATURATED)]
    options.append("--nodata-any")
    model: Path | None = None
    for name in LANDSAT:
        source = shared_dir / "data/landsat7" / name
        with rasterio.open(source) as dataset:
            stored, crs, transform = dataset.read(), dataset.crs, dataset.transform
        bands = stored[[2, 1, 0, 3]]
        expected = np.isin(stored[7], CLOUDED) | np.isin(bands, (-9999, SATURATED)).any(0)
        out = tmp_path / f"{source.stem}.zarr"
        outsize("ingest", source, out, *options)
        raster = open_raster(out)
        image, missing = read(raster)
        assert raster.dtype == np.int16
        assert (raster.place.crs, raster.place.affine) == (crs, transform)
        assert np.array_equal(image, bands)
        assert np.array_equal(missing, expected)
        model = model or train(raster, 0, 3, tmp_path / "landsat.json")
        classes = segment(out, tmp_path / f"{source.stem}-map.zarr", model)
        direct = segment(source, tmp_path / f"{source.stem}-direct.zarr", model, *options)
        assert np.array_equal(classes, direct)
        assert np.array_equal(classes == 255, expected)
        require_same_place(tmp_path / f"{source.stem}-map.zarr", raster, tmp_path)
        (tmp_path / "map.tif").unlink()
    assert expected.any()


def test_the_eight_band_field_scene(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data/sentinel2_fields/inference-img.tif"
    outsize("ingest", source, tmp_path / "fields.zarr")
    raster = open_raster(tmp_path / "fields.zarr")
    image, _ = read(raster)
    with rasterio.open(source) as dataset:
        assert np.array_equal(image, dataset.read())
    model = train(raster, 0, 3, tmp_path / "fields.json")
    classes = segment(tmp_path / "fields.zarr", tmp_path / "map.zarr", model)
    assert (classes == vegetation(image, 0, 3)).mean() > 0.85
    # A part by its bounds is the same part of the whole.
    west, south, east, north = rasterio.transform.array_bounds(*raster.shape_yx, raster.place.affine)
    bounds = (west + 1000, south + 500, east - 2000, north - 700)
    part = segment(source, tmp_path / "part.zarr", model, "--bounds", ",".join(map(repr, bounds)))
    assert np.array_equal(part, classes[70:-50, 100:-200])
    require_same_place(tmp_path / "map.zarr", raster, tmp_path)
