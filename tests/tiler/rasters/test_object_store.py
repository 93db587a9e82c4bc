"""Rasters in an S3 bucket, by a real server on loopback: equal to local ones, also through faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from distributed import Client
from outsize.tiler.base.errors import RasterError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.rasters import gdal_files as raster_gdal
from outsize.tiler.rasters.gdal_files import warn_of_overlooking
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import open_reference, open_stack, reference_to
from outsize.tiler.runs.events import Event, TileFinished
from outsize.tiler.system.places import gdal_name, place_of, scheme_of, url_of
from rasterio.env import get_gdal_config

from ...support import far_threads
from ...support.object_server import BUCKET, Faults, ObjectServer, upload
from ...support.rasters import missing_of, write_geotiff
from ...support.runs import class_network, run, scene, stored, whole

pytestmark = pytest.mark.system


def test_names_of_places() -> None:
    assert [scheme_of(name) for name in ("s3://b/k", "a/b", "/vsis3/b/k", "GTIFF_DIR:1:a.tif", "C://x")] == [
        "s3",
        "",
        "",
        "",
        "c",
    ]
    assert gdal_name("s3://b/k.tif") == "/vsis3/b/k.tif"
    assert gdal_name("https://h/k.tif") == "/vsicurl/https://h/k.tif"
    assert gdal_name("here.tif") == "here.tif"
    assert url_of("/vsis3/b/k.tif") == "s3://b/k.tif"
    assert url_of("/vsizip/a.zip/b.tif") == ""
    assert place_of("a/b") == Path("a/b")
    with pytest.raises(UsageError, match="nonsense:// needs what"):
        place_of("nonsense://b/k")


VALID = np.array([[255, 0, 255], [0, 255, 255]], np.uint8)
NODATA = (VALID == 0).tolist()
MOSAIC = """<VRTDataset rasterXSize="3" rasterYSize="2"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename>{0}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand><MaskBand><VRTRasterBand
dataType="Byte"><SimpleSource><SourceFilename>{0}</SourceFilename><SourceBand>mask,1</SourceBand></SimpleSource>
</VRTRasterBand></MaskBand></VRTDataset>"""


@pytest.fixture
def masked(tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One raster with its mask in a file beside it: its URL, that of a mosaic of it, and both on the disk."""
    server.use(monkeypatch)
    path = write_geotiff(tmp_path / "masked.tif", np.ones((1, 2, 3), np.uint8))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(VALID)
    upload(server, path.with_name("masked.tif.msk"), "masks/masked.tif.msk")
    url, mosaic = upload(server, path, "masks/masked.tif"), tmp_path / "mosaic.vrt"
    mosaic.write_text(MOSAIC.format(gdal_name(url)))
    return [url, upload(server, mosaic, "masks/mosaic.vrt"), str(path), str(mosaic)]


@pytest.mark.parametrize("kind", ["file", "mosaic"])
def test_a_mask_beside_a_file_counts_in_a_full_folder_of_a_bucket_and_then_on_the_disk(
    masked: list[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # Of a folder with more names than that, GDAL takes a part for the whole. A mosaic opens its files as it is read.
    monkeypatch.setenv("GDAL_READDIR_LIMIT_ON_OPEN", "1")
    for name in masked[kind == "mosaic" :: 2]:
        if name.endswith(".vrt") and not name.startswith("s3:"):
            with pytest.raises(RasterError, match=r"names /vsis3/\S+, which is no file of this machine; "):
                open_raster(name)
        assert missing_of(open_raster(name, trust=True)) == NODATA, name
        if name.startswith("s3:"):
            assert missing_of(open_raster(name)) == NODATA, name


@pytest.mark.parametrize("by", ["variable", "rasterio"])
def test_who_has_gdal_overlook_files_is_obeyed_and_warned_once(
    masked: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    warn_of_overlooking.cache_clear()
    option = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
    if by == "variable":
        monkeypatch.setenv(*option.popitem())
    with rasterio.Env(**option):
        for name in (masked[0], masked[2], masked[0]):
            assert not np.any(missing_of(open_raster(name))), name
    (said,) = (record.getMessage() for record in caplog.records if "GDAL_DISABLE" in record.getMessage())
    assert said.startswith("GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR is set")
    if by == "variable":
        monkeypatch.undo()
    assert missing_of(open_raster(masked[2])) == NODATA


def test_what_far_files_need_is_set_for_no_local_one(masked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    open_ = raster_gdal.open_by

    def look(path: str, drivers: list[str]) -> object:
        seen[path] = get_gdal_config("GDAL_DISABLE_READDIR_ON_OPEN")
        return open_(path, drivers)

    monkeypatch.setattr(raster_gdal, "open_by", look)
    for name in (masked[0], masked[2]):
        open_raster(name)
    assert seen == {gdal_name(masked[0]): "TRUE", masked[2]: None}
    assert get_gdal_config("GDAL_DISABLE_READDIR_ON_OPEN") is None


def test_a_geotiff_and_a_zarr_in_a_bucket_give_the_local_result(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch)
    source = scene(tmp_path, 150, 141, nodata=True)
    copy_raster(open_raster(source), tmp_path / "s.zarr", client=client)
    expected = whole(class_network(), source)
    for path, name in ((source, "a/scene.tif"), (tmp_path / "s.zarr", "a/scene.zarr")):
        url = upload(server, path, name)
        remote, local = open_raster(url), open_raster(path)
        assert (remote.shape, remote.dtype, remote.nodata, remote.place) == (
            local.shape,
            local.dtype,
            local.nodata,
            local.place,
        )
        out = tmp_path / f"{Path(name).suffix}.out.zarr"
        run(url, class_network(), out, client)  # pyright: ignore[reportArgumentType]
        assert np.array_equal(stored(out), expected)
        assert open_raster(place_of(url)).identity == remote.identity  # the object that a URL is, too
        again = open_reference(reference_to(remote))
        assert again.identity == remote.identity
        assert np.array_equal(
            again.open_reader().read(Window(y=3, x=5, height=20, width=30)),
            local.open_reader().read(Window(y=3, x=5, height=20, width=30)),
        )
        # Another content is another raster.
        before = remote.identity
        server.client().put_object(Bucket=BUCKET, Key=f"{name}/x" if path.is_dir() else f"{name}.other", Body=b"x")
        if path.is_dir():
            assert open_raster(url).identity != before


def test_band_files_in_a_bucket_stack(tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.use(monkeypatch)
    source = scene(tmp_path, 60, 70)
    urls = [upload(server, source, f"stack/{number}.tif") for number in range(2)]
    raster = open_stack(urls)
    assert raster.bands == 6
    window = Window(y=1, x=2, height=30, width=40)
    one = open_raster(source).open_reader().read(window)
    assert np.array_equal(raster.open_reader().read(window), np.concatenate([one, one]))


@pytest.mark.parametrize("name", ["none.tif", "none.zarr"])
def test_what_is_not_there_is_said(server: ObjectServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    server.use(monkeypatch)
    for bucket in (BUCKET, "no-such-bucket"):
        with pytest.raises(RasterError, match=r"none"):
            open_raster(f"s3://{bucket}/{name}")


@pytest.mark.parametrize("kind", ["tif", pytest.param("zarr", marks=pytest.mark.long)])
def test_faults_of_the_store_change_nothing(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = scene(tmp_path, 150, 141)
    path = source
    if kind == "zarr":
        path = tmp_path / "s.zarr"
        copy_raster(open_raster(source), path, client=client)
    url = upload(server, path, f"faults/all.{kind}")
    server.use(monkeypatch, Faults(errors=7, cuts=5, slow=6))
    out = tmp_path / "o.zarr"
    summary = run(url, class_network(), out, client)  # pyright: ignore[reportArgumentType]
    assert min(server.count_faults().values()) >= 1
    assert summary.failed_tiles == ()
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_a_bucket_that_is_gone_stops_the_run_and_fails_no_tile(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scene(tmp_path, 300, 300)
    url, out = upload(server, source, "gone/scene.tif"), tmp_path / "o.zarr"
    server.use(monkeypatch)

    def vanish(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 2:
            from outsize.tiler.cluster.jobs import _RUNNERS

            server.client().delete_object(Bucket=BUCKET, Key="gone/scene.tif")
            for runner in _RUNNERS.values():
                runner.close()

    monkeypatch.setenv("VSI_CACHE", "FALSE")
    monkeypatch.setenv("CPL_VSIL_CURL_NON_CACHED", f"/vsis3/{BUCKET}/gone")
    with pytest.raises(RasterError, match="is gone; when it is back, the same command goes on"):
        run(url, class_network(), out, client, listener=vanish)  # pyright: ignore[reportArgumentType]


@pytest.mark.long
def test_threads_that_are_told_of_failures_do_not_wait_for_each_other_for_ever(
    tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(server, scene(tmp_path, 100, 120), "threads/scene.tif")
    server.use(monkeypatch, Faults(errors=3, cuts=7))
    # Two threads that GDAL tells of failures at the same moment are enough; in a process of their own, which can be
    # ended.
    words = [sys.executable, "-P", far_threads.__file__, url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=True)
    assert int(done.stdout) > 0
    assert server.count_faults()["errors"] > 5
