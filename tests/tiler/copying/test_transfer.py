"""Copies of rasters: equal to rasterio, kill-safe, complete or honest about what is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import rioxarray
import xarray
import zarr
from affine import Affine
from distributed import Client, LocalCluster
from outsize.tests.support.commands import Command, outsize, result_of
from outsize.tiler.base.errors import BudgetError, OutputError, RasterError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.cluster.client import ClusterOptions
from outsize.tiler.cluster.dashboard import Watch
from outsize.tiler.copying.copier import Copier, TransferJob, probe_raster
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.copying.transfer_plan import plan_transfer
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import open_mosaic, open_stack
from outsize.tiler.rasters.raster import Raster

from ...support.rasters import TRANSFORM, damage, unique_pixels, write_geotiff

pytestmark = pytest.mark.system

LOCAL = ClusterOptions(dashboard_address=None)


def read(raster: Raster) -> tuple[np.ndarray, np.ndarray]:
    window = Window.whole(raster.shape_yx)
    reader = raster.open_reader()
    image = reader.read(window)
    missing = reader.read_missing(window, image)
    return image, np.zeros(window.shape, bool) if missing is None else missing


DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_every_dtype_is_copied_with_its_place_names_and_nodata(tmp_path: Path, dtype: str, zarr_format: Any) -> None:
    image = unique_pixels(3, 61, 83, dtype)
    nodata = np.nan if dtype == "float32" else 7
    if dtype == "float32":
        image[:, 3, 5] = np.nan
    source = write_geotiff(tmp_path / "a.tif", image, nodata=nodata)
    with rasterio.open(source, "r+") as dataset:
        dataset.descriptions = ("red", "green", "swir 1")
    summary = copy_raster(open_raster(source), tmp_path / "a.zarr", zarr_format=zarr_format)
    copy = open_raster(tmp_path / "a.zarr")
    with rasterio.open(source) as dataset:
        assert np.array_equal(read(copy)[0], dataset.read(), equal_nan=True)
        assert (copy.place.crs, copy.place.affine) == (dataset.crs, dataset.transform)
        assert copy.band_names == dataset.descriptions
        assert np.array_equal([copy.nodata], [dataset.nodata], equal_nan=True)
        assert copy.dtype == dataset.dtypes[0]
    assert np.array_equal(read(copy)[1], read(open_raster(source))[1])
    assert summary.pixels == 61 * 83
    assert summary.peak_bytes > 0
    assert not summary.masked
    assert not summary.unreadable
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "a.zarr"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_copy_opens_georeferenced_elsewhere(tmp_path: Path, zarr_format: Any) -> None:
    image = unique_pixels(2, 30, 40, np.uint16)
    source = write_geotiff(tmp_path / "a.tif", image, nodata=9)
    copy_raster(open_raster(source), tmp_path / "a.zarr", zarr_format=zarr_format)
    opened = xarray.open_zarr(
        tmp_path / "a.zarr", consolidated=zarr_format == 2, mask_and_scale=False, decode_coords="all"
    )
    with rasterio.open(source) as dataset:
        assert opened["image"].rio.crs == dataset.crs
        assert opened["image"].rio.transform().almost_equals(dataset.transform)
        assert np.array_equal(opened["image"], image)
        assert opened["image"].dtype == np.uint16
        if zarr_format == 2:
            # Older GDAL reads v2 only.
            with rasterio.open(f'ZARR:"{tmp_path / "a.zarr"}":/image') as theirs:
                assert (theirs.crs, theirs.transform, theirs.nodata) == (dataset.crs, dataset.transform, 9)
                assert np.array_equal(theirs.read(), image)
    assert rioxarray.__version__


def test_a_rotated_grid_keeps_its_transform(tmp_path: Path) -> None:
    turned = TRANSFORM * Affine.rotation(20)
    source = write_geotiff(tmp_path / "a.tif", unique_pixels(1, 9, 7), transform=turned)
    copy_raster(open_raster(source), tmp_path / "a.zarr")
    assert open_raster(tmp_path / "a.zarr").place.affine.almost_equals(turned)
    assert "x" not in zarr.open_group(str(tmp_path / "a.zarr"), mode="r")


@pytest.mark.parametrize("axes", ["yxb", "xyb", "ybx"])
def test_other_axis_orders_come_out_as_bands_rows_columns(tmp_path: Path, axes: str) -> None:
    image = unique_pixels(4, 70, 50, np.uint8)
    stored = image.transpose(["byx".index(letter) for letter in axes])
    zarr.create_array(tmp_path / "s.zarr", shape=stored.shape, chunks=(32, 16, 3), dtype="u1")[:] = stored
    copy_raster(open_raster(tmp_path / "s.zarr", axes=axes), tmp_path / "c.zarr")
    assert np.array_equal(read(open_raster(tmp_path / "c.zarr"))[0], image)


def test_masks_are_copied_whatever_their_kind(tmp_path: Path) -> None:
    image = unique_pixels(3, 40, 50, np.int16)
    image[2] = np.arange(2000).reshape(40, 50) % 5
    source = write_geotiff(tmp_path / "a.tif", image, nodata=3)
    raster = open_raster(source, mask_band=3, mask_values=(2, 4), nodata=(3, 9), any_band=True)
    assert copy_raster(raster, tmp_path / "a.zarr").masked
    copy = open_raster(tmp_path / "a.zarr")
    assert copy.bands == 2
    assert np.array_equal(read(copy)[0], image[:2])
    wanted = np.isin(image[2], (2, 4)) | np.isin(image[:2], (3, 9)).any(axis=0)
    assert np.array_equal(read(copy)[1], wanted)
    # A copy of the copy has the same mask.
    copy_raster(copy, tmp_path / "b.zarr")
    assert np.array_equal(read(open_raster(tmp_path / "b.zarr"))[1], wanted)


def test_workers_and_this_process_copy_the_same(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 4, (3, 1500, 1300), dtype=np.uint8)
    pieces = [
        write_geotiff(tmp_path / f"{x}.tif", image[:, :, x : x + 600], transform=TRANSFORM * Affine.translation(x, 0))
        for x in (0, 700)
    ]
    mosaic = open_mosaic(pieces)
    here = copy_raster(mosaic, tmp_path / "here.zarr")
    there = copy_raster(mosaic, tmp_path / "there.zarr", workers=2, cluster=LOCAL)
    assert (here.masked, there.masked) == (True, True)
    ours, theirs = (read(open_raster(tmp_path / f"{name}.zarr")) for name in ("here", "there"))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(ours[0][:, :, :600], image[:, :, :600])
    assert np.array_equal(np.flatnonzero(ours[1].any(axis=0)), np.arange(600, 700))
    files = [
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "c" in p.parts}
        for folder in (tmp_path / "here.zarr", tmp_path / "there.zarr")
    ]
    assert files[0] == files[1]


def test_threads_of_one_worker_copy_the_same(tmp_path: Path) -> None:
    """A dataset of GDAL's serves one thread at a time."""
    image = np.random.default_rng(4).integers(0, 256, (3, 1500, 1400), dtype=np.uint8)
    source = write_geotiff(tmp_path / "s.tif", image, tiled=True, blockxsize=32, blockysize=48, compress="deflate")
    with (
        LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        copy_raster(open_raster(source), tmp_path / "s.zarr", client=client, memory="450MB", workers=2)
    assert np.array_equal(zarr.open_array(tmp_path / "s.zarr", path="image")[:], image)


@pytest.mark.parametrize("nodata", [None, 77])
def test_damaged_tiles_become_nodata_and_are_told(tmp_path: Path, nodata: float | None) -> None:
    image = np.random.default_rng(1).integers(80, 255, (2, 700, 800), dtype=np.uint8)
    source = write_geotiff(
        tmp_path / "a.tif", image, nodata=nodata, tiled=True, blockxsize=128, blockysize=128, compress="DEFLATE"
    )
    damage(source, (2, 3))
    damage(source, (5, 6))
    with rasterio.open(source) as dataset, pytest.raises(rasterio.errors.RasterioIOError):
        dataset.read(window=((256, 384), (384, 512)))
    summary = copy_raster(open_raster(source), tmp_path / "a.zarr")
    assert sorted(entry[:4] for entry in summary.unreadable) == [(256, 384, 128, 128), (640, 768, 60, 32)]
    for *_, reason in summary.unreadable:
        assert str(source) in reason
        assert "window" in reason
    bad = np.zeros((700, 800), bool)
    bad[256:384, 384:512] = bad[640:, 768:] = True
    copy, missing = read(open_raster(tmp_path / "a.zarr"))
    assert np.array_equal(copy[:, ~bad], image[:, ~bad])
    assert np.array_equal(missing, bad)
    assert summary.masked is (nodata is None)
    told: Any = dict(zarr.open_group(str(tmp_path / "a.zarr"), mode="r").attrs)["outsize_copy"]
    assert len(told["unreadable"]) == 2


def test_nothing_readable_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    image = unique_pixels(1, 300, 300, np.uint8)
    source = write_geotiff(tmp_path / "a.tif", image, tiled=True, blockxsize=256, blockysize=256, compress="DEFLATE")
    for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
        damage(source, at)
    with pytest.raises(RasterError, match=r"none of 16 windows .* window 0,0,64,64 cannot be read") as refusal:
        copy_raster(open_raster(source), tmp_path / "a.zarr")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_a_reader_is_not_believed_after_it_failed(shared_dir: Path) -> None:
    # The second read of the same window through the same open dataset gives zeros without a word.
    raster = open_raster(shared_dir / "corpus/gdal/python_ones.vrt", trust=True)
    reader = raster.open_reader()
    for _ in range(3):
        with pytest.raises(RasterError, match="cannot be read"):
            reader.read(Window(y=0, x=0, height=10, width=10))
    with pytest.raises(RasterError):
        probe_raster(raster)


BIG = (4, 3000, 2900)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    image = np.random.default_rng(2).integers(1, 255, BIG, dtype=np.uint8)
    return write_geotiff(folder / "big.tif", image, tiled=True, blockxsize=256, blockysize=256)


def interrupt_after(cells: int) -> Any:
    seen = 0

    def listener(progress: Any) -> None:
        nonlocal seen
        seen += bool(progress.advanced)
        if seen > cells:
            raise KeyboardInterrupt

    return listener


def chunk_bytes(store: Path) -> dict[Path, bytes]:
    return {p.relative_to(store): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file() and "c" in p.parts}


def test_an_interrupted_copy_goes_on_and_equals_an_undisturbed_one(tmp_path: Path, big: Path) -> None:
    raster = open_raster(big)
    whole = copy_raster(raster, tmp_path / "whole.zarr")
    assert whole.cells == 6
    with pytest.raises(KeyboardInterrupt):
        copy_raster(raster, tmp_path / "cut.zarr", listener=interrupt_after(3))
    assert not (tmp_path / "cut.zarr").exists()
    summary = copy_raster(raster, tmp_path / "cut.zarr")
    assert (summary.resumed_cells, summary.cells) == (4, 2)
    assert chunk_bytes(tmp_path / "cut.zarr") == chunk_bytes(tmp_path / "whole.zarr")
    with rasterio.open(big) as dataset:
        assert np.array_equal(read(open_raster(tmp_path / "cut.zarr"))[0], dataset.read())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.zarr", "whole.zarr"]


def test_an_interrupted_copy_of_a_source_that_changed_begins_anew(tmp_path: Path, big: Path) -> None:
    source = tmp_path / "big.tif"
    shutil.copy(big, source)
    with pytest.raises(KeyboardInterrupt):
        copy_raster(open_raster(source), tmp_path / "c.zarr", listener=interrupt_after(3))
    with rasterio.open(source, "r+") as dataset:
        image = dataset.read()
        dataset.write(image[::-1])
    summary = copy_raster(open_raster(source), tmp_path / "c.zarr")
    assert summary.resumed_cells == 0
    assert np.array_equal(read(open_raster(tmp_path / "c.zarr"))[0], image[::-1])


def test_a_lost_chunk_is_copied_again(tmp_path: Path, big: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        copy_raster(open_raster(big), tmp_path / "c.zarr", listener=interrupt_after(3))
    (tmp_path / "c.zarr.creating/image/c/0/1/2").unlink()
    assert copy_raster(open_raster(big), tmp_path / "c.zarr").resumed_cells == 3
    with rasterio.open(big) as dataset:
        assert np.array_equal(read(open_raster(tmp_path / "c.zarr"))[0], dataset.read())


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    image = np.random.default_rng(3).integers(1, 255, (4, 4200, 4200), dtype=np.uint8)  # too much for one process
    source = write_geotiff(tmp_path / "s.tif", image)
    words = ("--json", "ingest", source, tmp_path / "c.zarr", "--no-dashboard", "--memory", "900MB")
    command = Command(*words, start_new_session=True)
    records = tmp_path / "c.zarr.run/records-1.jsonl"
    deadline = time.monotonic() + 60
    while not (records.exists() and records.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    assert not (tmp_path / "c.zarr").exists()
    assert result_of(outsize(*words))["resumed_cells"] > 0
    assert np.array_equal(read(open_raster(tmp_path / "c.zarr"))[0], image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr", "s.tif"]


def test_an_existing_store_is_replaced_only_on_request_and_when_the_copy_is_whole(tmp_path: Path, big: Path) -> None:
    old = write_geotiff(tmp_path / "old.tif", unique_pixels(1, 8, 8, np.uint8))
    copy_raster(open_raster(old), tmp_path / "c.zarr")
    with pytest.raises(OutputError, match="exists"):
        copy_raster(open_raster(big), tmp_path / "c.zarr")
    with pytest.raises(KeyboardInterrupt):
        copy_raster(open_raster(big), tmp_path / "c.zarr", overwrite=True, listener=interrupt_after(2))
    assert open_raster(tmp_path / "c.zarr").shape == (1, 8, 8)
    copy_raster(open_raster(big), tmp_path / "c.zarr", overwrite=True)
    assert open_raster(tmp_path / "c.zarr").shape == BIG
    with pytest.raises(OutputError, match="lie in one another"):
        copy_raster(open_raster(tmp_path / "c.zarr"), tmp_path / "c.zarr", overwrite=True)


def test_a_plan_keeps_the_budget_and_covers_the_raster(big: Path) -> None:
    raster = open_raster(big)
    for memory in ("700MB", "1GB", "2GB", "8GB"):
        for workers in (1, 2, 8):
            plan = plan_transfer(raster, memory, workers)
            assert plan.predicted_peak_bytes <= float(memory[:-2]) * (1e9 if memory.endswith("GB") else 1e6)
            assert plan.grid.shape == BIG[1:]
            assert plan.grid.cell[0] % 512 == plan.grid.cell[1] % 512 == 0
    with pytest.raises(BudgetError, match="memory must be at least"):
        plan_transfer(raster, "100MB", 1)


def test_declared_sizes_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    vrt = (
        '<VRTDataset rasterXSize="{width}" rasterYSize="{height}">'
        '<VRTRasterBand dataType="{dtype}" band="1" blockXSize="{width}" blockYSize="1"/></VRTDataset>'
    )
    wide, tall = tmp_path / "wide.vrt", tmp_path / "tall.vrt"
    wide.write_text(vrt.format(width=2_000_000_000, height=10, dtype="Float64"))
    tall.write_text(vrt.format(width=512, height=2_000_000_000, dtype="Float64"))
    for path, error, words in (
        (wide, BudgetError, r"10 rows and 2000000000 columns are 32\.00 GB"),
        (tall, BudgetError, r"2000000000 rows and 512 columns are 32\.00 GB"),
    ):
        with pytest.raises(error, match=words):
            copy_raster(open_raster(path), tmp_path / "c.zarr")
    flat = tmp_path / "flat.vrt"
    flat.write_text(vrt.format(width=20_000_000, height=20_000_000, dtype="Byte"))
    with pytest.raises(OutputError, match=r"may need 400\.00 TB, the disk of"):
        copy_raster(open_raster(flat), tmp_path / "c.zarr", memory="8GB")
    assert not list(tmp_path.glob("c.zarr*"))


def test_cells_cover_every_pixel_once(big: Path, tmp_path: Path) -> None:
    raster = open_raster(big)
    plan = plan_transfer(raster, "2GB", 1)
    covered = np.zeros(raster.shape_yx, np.uint8)
    for cell in plan.grid:
        covered[plan.grid.window(*cell).slices()] += 1
    assert (covered == 1).all()
    job = TransferJob(
        run_id="x",
        raster=raster,
        grid=plan.grid,
        out=str(tmp_path / "missing.zarr"),
        chunk=plan.chunk,
        zarr_format=3,
        owned=str(tmp_path / "missing.zarr"),
        generation=1,
    )
    with pytest.raises(OutputError, match="or its run folder is gone"):
        Copier(job).run(0, 0)


def test_only_copies_are_replaced(tmp_path: Path) -> None:
    source = write_geotiff(tmp_path / "a.tif", unique_pixels(1, 8, 8, np.uint8))
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today.txt").write_text("dear diary")
    (tmp_path / "file.zarr").write_text("not a store")
    copy_raster(open_raster(source), tmp_path / "real.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "real.zarr")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("diary", "file.zarr", "link.zarr"):
        with pytest.raises(
            OutputError, match="is a link; name the store itself" if "link" in name else "not made by ingest"
        ):
            copy_raster(open_raster(source), tmp_path / name, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("way", ["itself", "link", "vrt"])
def test_a_target_that_holds_the_source_is_refused_by_any_name(tmp_path: Path, way: str) -> None:
    target = tmp_path / "t.zarr"
    copy_raster(open_raster(write_geotiff(tmp_path / "a.tif", unique_pixels(1, 8, 8, np.uint8))), target)
    inside = write_geotiff(target / "src.tif", unique_pixels(1, 8, 8, np.uint8))
    source = inside
    if way == "link":
        source = tmp_path / "link.tif"
        source.symlink_to(inside)
    elif way == "vrt":
        source = tmp_path / "v.vrt"
        rasterio.shutil.copy(inside, source, driver="VRT")
    with pytest.raises(OutputError, match="lie in one another"):
        copy_raster(open_raster(source), target, overwrite=True)
    assert inside.exists()


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outsize.tiler.copying import transfer

    first = write_geotiff(tmp_path / "a.tif", unique_pixels(1, 8, 8, np.uint8))
    second = write_geotiff(tmp_path / "b.tif", unique_pixels(2, 8, 8, np.uint8))
    space = transfer.require_space

    def slow(*arguments: Any, **options: Any) -> None:
        space(*arguments, **options)
        monkeypatch.setattr(transfer, "require_space", space)
        copy_raster(open_raster(first), tmp_path / "t.zarr")

    monkeypatch.setattr(transfer, "require_space", slow)
    with pytest.raises(OutputError, match="exists"):
        copy_raster(open_raster(second), tmp_path / "t.zarr")
    assert open_raster(tmp_path / "t.zarr").bands == 1


def test_files_of_one_size_and_time_are_told_apart(tmp_path: Path, big: Path) -> None:
    paths = []
    for name, shift in (("a", 0), ("b", 1)):
        with rasterio.open(big) as dataset:
            image = dataset.read() + np.uint8(shift)
        paths.append(write_geotiff(tmp_path / f"{name}.tif", image))
        os.utime(paths[-1], ns=(10**18, 10**18))
    assert paths[0].stat().st_size == paths[1].stat().st_size
    with pytest.raises(KeyboardInterrupt):
        copy_raster(open_raster(paths[0]), tmp_path / "c.zarr", listener=interrupt_after(3))
    assert copy_raster(open_raster(paths[1]), tmp_path / "c.zarr").resumed_cells == 0
    assert np.array_equal(read(open_raster(tmp_path / "c.zarr"))[0], image)


def test_a_zarr_source_that_was_written_in_place_is_another(tmp_path: Path, big: Path) -> None:
    copy_raster(open_raster(big), tmp_path / "s.zarr")
    with pytest.raises(KeyboardInterrupt):
        copy_raster(open_raster(tmp_path / "s.zarr"), tmp_path / "c.zarr", listener=interrupt_after(2))
    array = zarr.open_array(str(tmp_path / "s.zarr"), path="image", mode="r+")
    array[:, :64, :64] = 9
    assert copy_raster(open_raster(tmp_path / "s.zarr"), tmp_path / "c.zarr").resumed_cells == 0
    assert np.array_equal(read(open_raster(tmp_path / "c.zarr"))[0], array[:])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("nodata", [None, 200])
def test_a_cell_whose_worker_died_is_nodata(
    tmp_path: Path, big: Path, monkeypatch: pytest.MonkeyPatch, masked: bool, nodata: float | None
) -> None:
    from outsize.tiler.cluster.schedule import Lost
    from outsize.tiler.copying import transfer

    options: dict[str, Any] = {"mask_band": 4, "mask_values": (1,)} if masked else {}
    raster = open_raster(big, nodata=() if nodata is None else nodata, **options)

    copiers: list[Copier] = []

    def tell(_client: Any, job: TransferJob, _begin: Any) -> Any:
        copiers.append(Copier(job))
        return contextlib.nullcontext(Watch(None))

    def run(_client: Any, _run_id: str, cells: Any, _label: str) -> Any:
        for cell in cells:
            yield cell, Lost("its worker process died") if cell == (1, 0) else copiers[0].run(*cell)

    plan = plan_transfer(raster, "2GB")
    monkeypatch.setattr(transfer, "job_on", tell)
    monkeypatch.setattr(transfer, "run_cells", run)
    summary = copy_raster(raster, tmp_path / "c.zarr", client=object())  # pyright: ignore[reportArgumentType]
    window = plan.grid.window(1, 0)
    assert summary.unreadable_pixels == window.pixels
    image, missing = read(open_raster(tmp_path / "c.zarr"))
    assert missing[window.slices()].all()
    expected, expected_missing = read(raster)
    elsewhere = np.ones(missing.shape, bool)
    elsewhere[window.slices()] = False
    assert np.array_equal(missing[elsewhere], expected_missing[elsewhere])
    assert np.array_equal(image[:, elsewhere], expected[:, elsewhere])


def test_pieces_with_nodata_of_their_own_keep_their_pixels(tmp_path: Path) -> None:
    a = np.full((1, 20, 20), 7, np.uint8)
    a[0, :5] = 0
    b = np.full((1, 20, 20), 255, np.uint8)
    b[0, 5:15] = 0  # valid zeros
    paths = [
        write_geotiff(tmp_path / "a.tif", a, nodata=0),
        write_geotiff(tmp_path / "b.tif", b, nodata=255, transform=TRANSFORM * Affine.translation(20, 0)),
    ]
    mosaic = open_mosaic(paths)
    copy_raster(mosaic, tmp_path / "c.zarr")
    expected = np.concatenate([a[0] == 0, b[0] == 255], axis=1)
    for raster in (mosaic, open_raster(tmp_path / "c.zarr")):
        assert np.array_equal(read(raster)[1], expected)
    stack = open_stack([write_geotiff(tmp_path / "c.tif", b, nodata=255), paths[0]])
    copy_raster(stack, tmp_path / "s.zarr")
    assert np.array_equal(read(open_raster(tmp_path / "s.zarr"))[1], read(stack)[1])


def test_nodata_that_no_pixel_can_hold(tmp_path: Path) -> None:
    image = unique_pixels(1, 8, 8, np.uint8)
    source = write_geotiff(tmp_path / "a.tif", image)
    for value in (7.5, -9999, float("nan"), 300):
        with pytest.raises(UsageError, match=r"nodata must be a value of .* uint8 pixels"):
            open_raster(source, nodata=value)
    array = zarr.create_array(
        tmp_path / "z.zarr", shape=(8, 8), dtype="int64", attributes={"_FillValue": 9223372036854775807}
    )
    array[:] = 5
    copy_raster(open_raster(tmp_path / "z.zarr"), tmp_path / "c.zarr")
    assert (read(open_raster(tmp_path / "c.zarr"))[0] == 5).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinite_nodata_survives(tmp_path: Path, value: float) -> None:
    image = np.ones((1, 8, 8), np.float32)
    image[0, 3] = value
    copy_raster(open_raster(write_geotiff(tmp_path / "a.tif", image, nodata=value)), tmp_path / "c.zarr")
    assert read(open_raster(tmp_path / "c.zarr"))[1].sum() == 8


def test_a_copy_interrupted_behind_its_mask_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outsize.tiler.copying import transfer

    image = np.random.default_rng(1).integers(80, 255, (2, 300, 300), dtype=np.uint8)
    options = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "DEFLATE"}
    source = write_geotiff(tmp_path / "a.tif", image, **options)
    damage(source, (1, 1))

    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "finish_metadata", stop)
        with pytest.raises(KeyboardInterrupt):
            copy_raster(open_raster(source), tmp_path / "c.zarr")
    assert copy_raster(open_raster(source), tmp_path / "c.zarr").unreadable_pixels == 128 * 128
    assert read(open_raster(tmp_path / "c.zarr"))[1].sum() == 128 * 128


def test_a_mosaic_of_large_strips_counts_the_blocks_of_open_files(tmp_path: Path) -> None:
    image = unique_pixels(1, 400, 500, np.uint16)
    tiled = {"tiled": True, "blockxsize": 512, "blockysize": 400}
    paths = [
        write_geotiff(tmp_path / f"{i}.tif", image, **tiled, transform=TRANSFORM * Affine.translation(500 * i, 0))
        for i in range(5)
    ]
    block = open_raster(paths[0]).block_bytes
    assert block == 400 * 512 * 2
    assert open_mosaic(paths).block_bytes == 5 * block


def test_a_source_that_is_changed_makes_no_mixed_copy(tmp_path: Path) -> None:
    source = write_geotiff(tmp_path / "s.tif", unique_pixels(2, 1400, 1100))
    with pytest.raises(RasterError, match="was changed while it was read; the same command begins anew"):
        copy_raster(open_raster(source), tmp_path / "o.zarr", listener=lambda _: os.utime(source))
    assert [path.name for path in tmp_path.iterdir()] == ["s.tif"]
    assert copy_raster(open_raster(source), tmp_path / "o.zarr").resumed_cells == 0
