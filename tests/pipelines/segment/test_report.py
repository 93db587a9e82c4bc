"""Reports: what they say is what is there; one file, which asks for nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
import zarr
from affine import Affine
from outsize.pipelines.base.console import Console
from outsize.pipelines.segment.areas import count_areas
from outsize.pipelines.segment.quicklook import make_quicklook
from outsize.pipelines.segment.report import StoppedRun, measure_throughput, render_report
from outsize.tests.support.commands import outsize
from outsize.tiler.base.text import format_bytes
from outsize.tiler.output.records import run_folder
from outsize.tiler.output.store import open_array, read_header, writable
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.rasters.georeference import Georeference, pixel_areas
from outsize.tiler.runs.check import StartCheck

from ...support.rasters import damage, write_geotiff

pytestmark = pytest.mark.system

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """All that a page shows or would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a scene with one damaged block, and its report."""
    place = tmp_path_factory.mktemp("report")
    assert outsize("sample", place / "demo", "--size", "700").returncode == 0
    image = zarr.open_array(place / "demo" / "scene.zarr", path="image")[:]
    source = write_geotiff(
        place / "s & <b>.tif",
        np.asarray(image),
        crs="EPSG:32633",
        transform=Affine(2, 0, 500_000, 0, -2, 5_000_000),
        nodata=0,
        tiled=True,
        blockxsize=64,
        blockysize=64,
        compress="deflate",
    )
    damage(source, (3, 5))
    words = ("--core", "128", "--no-dashboard")
    done = outsize("segment", source, place / "m.zarr", *words, "--report", place / "pages" / "m.html", "--json")
    assert done.returncode == 3, done.stderr
    # What is told of a run is what is kept of it.
    told = json.loads(done.stdout.splitlines()[-1])
    assert read_header(place / "m.zarr")["run"]["startup_s"] == told["startup_s"]
    assert f"report    {place / 'pages' / 'm.html'}" in done.stderr
    return place


def test_a_report_says_what_is_there(folder: Path) -> None:
    text = (folder / "pages" / "m.html").read_text()
    page, header = Page(text), read_header(folder / "m.zarr")
    classes = np.asarray(open_array(folder / "m.zarr", "class")[:])
    values, counts = np.unique(classes, return_counts=True)
    failed = header["run"]["failed_tiles"]
    assert f"Finished, but {failed} of 36 tiles failed and hold nodata" in page.text
    assert "Start check passed" in page.text
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value == 255:
            assert f"nodata {count:,}" in page.text
            continue
        name = next(entry["name"] for entry in header["classes"] if entry["value"] == value)
        share = 100 * count / (classes != 255).sum()
        assert f"{name} {share:.2f} {count * 4 / 1e4:,.1f} {count:,}" in page.text
    reasons = {re.sub(r"window \S+ ", "", tile["error"]) for tile in header["run"]["failures"]}
    assert page.text.count("ZIPDecode") == len(reasons) < failed
    for tile in header["run"]["failures"]:
        assert f"{tile['row']},{tile['column']}" in page.text
    assert f"{36 - failed} done, {failed} failed (red)" in page.text
    for word in ("halo", "derived from the traced graph", "Mpx/s", "sample-unet", header["model_sha256"], "segment "):
        assert word in page.text
    assert page.tags.count("img") == 3
    assert "polyline" in page.tags


def test_a_report_loads_nothing_and_takes_names_for_names(folder: Path) -> None:
    page = Page((folder / "pages" / "m.html").read_text())
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"script", "link", "iframe", "b>"} & set(page.tags)
    assert "s & <b>.tif" in page.text


def test_a_report_is_made_later_too(folder: Path) -> None:
    done = outsize("report", folder / "m.zarr")
    assert done.returncode == 0, done.stderr
    later = Page((folder / "m.html").read_text())
    assert "failed and hold nodata" in later.text
    again = outsize("report", folder / "m.zarr")
    assert again.returncode == 1
    assert "m.html exists; choose another path, or --overwrite" in again.stderr
    wrong = outsize("report", folder / "m.zarr", folder / "m.pdf")
    assert wrong.returncode == 2
    assert "its name ends in .html" in wrong.stderr


def test_a_report_without_the_run_folder_and_the_source(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "m.zarr", tmp_path / "m.zarr")
    header = read_header(tmp_path / "m.zarr")
    group = zarr.open_group(str(tmp_path / "m.zarr"), mode="r+")
    group.attrs["outsize"] = {**header, "source": {**header["source"], "paths": ["/nowhere.tif"]}}
    page = Page(render_report(Console(), tmp_path / "m.zarr"))
    assert f"Finished, but {header['run']['failed_tiles']} of 36 tiles failed" in page.text
    assert page.tags.count("img") == 2
    assert "polyline" not in page.tags


def test_a_run_that_failed_has_a_report(folder: Path, tmp_path: Path) -> None:
    gone = outsize("segment", tmp_path / "none.tif", tmp_path / "n.zarr", "--report", tmp_path / "n.html")
    assert gone.returncode == 1
    page = Page((tmp_path / "n.html").read_text())
    assert "The run stopped: no such raster" in page.text
    assert "Nothing was written." in page.text
    command = f"outsize segment {tmp_path / 'none.tif'} {tmp_path / 'n.zarr'} --report {tmp_path / 'n.html'}"
    assert f"source {tmp_path / 'none.tif'} model the shipped one versions python 3." in page.text
    assert f"command {command}" in page.text
    # One that stops with an output that it may not continue.
    source, out = folder / "s & <b>.tif", folder / "m.zarr"
    other = outsize("segment", source, out, "--core", "64", "--report", tmp_path / "o.html")
    assert other.returncode == 1
    page = Page((tmp_path / "o.html").read_text())
    assert "The run stopped: " in page.text
    assert "was begun with cores of 128, got 64" in page.text
    assert "27 of 36" in page.text or "of 36 tiles are done" in page.text
    assert page.tags.count("img") == 3


def test_a_damaged_block_leaves_a_hole_of_its_size_in_the_picture(folder: Path) -> None:
    found = make_quicklook(Console(), folder / "m.zarr", read_header(folder / "m.zarr"))
    assert found.source is not None
    assert found.source.size == (700, 700)  # not shrunk
    grey = (np.asarray(found.source) == 225).all(-1)
    assert grey[192:256, 320:384].all()
    for beside in (grey[184:192, 320:384], grey[256:264, 320:384], grey[192:256, 312:320], grey[192:256, 384:392]):
        assert not beside.any()


def test_a_start_check_that_fails_is_told_with_the_plan(folder: Path, tmp_path: Path) -> None:
    plan = TilePlan.from_json(read_header(folder / "m.zarr")["plan"])
    check = StartCheck(tiles=3, pixels=24_576, compared="logits", max_abs=0.75, largest=9.0, flipped=41, tolerance=1e-3)
    stop = StoppedRun(source="a.tif", error="the tiles differ", plan=plan, check=check, peak_bytes=1_234_000_000)
    page = Page(render_report(Console(), tmp_path / "nothing.zarr", stop))
    assert "The run stopped: the tiles differ" in page.text
    assert "Nothing was written. Source: a.tif" in page.text
    assert (
        f"Memory 1.23 GB at most as tiles ended, all processes; {format_bytes(plan.memory.total_bytes)} pred"
        in page.text
    )
    assert "Start check FAILED: 3 tiles, 24576 px" in page.text
    assert "largest difference of logits 0.75 (tolerance 0.001), 41 flipped pixels" in page.text
    for line in plan.explain().splitlines():
        assert " ".join(line.split()) in page.text


def test_an_unfinished_run_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "m.zarr", tmp_path / "m.zarr")
    shutil.copytree(run_folder(folder / "m.zarr"), run_folder(tmp_path / "m.zarr"))
    group = zarr.open_group(str(tmp_path / "m.zarr"), mode="r+")
    header: Any = dict(group.attrs)["outsize"]
    group.attrs["outsize"] = {name: value for name, value in header.items() if name != "run"}
    records = next(run_folder(tmp_path / "m.zarr").glob("records-*.jsonl"))
    kept = [line for line in records.read_text().splitlines() if '"state": "done"' in line][:10]
    records.write_text("\n".join(kept) + "\n")
    page = Page(render_report(Console(), tmp_path / "m.zarr"))
    assert "Not finished: 26 of 36 tiles are still to do" in page.text
    assert "10 done, 26 still to do (dark)" in page.text
    # Who interrupts a run waits for no pictures.
    brief = Page(render_report(Console(), tmp_path / "m.zarr", StoppedRun(source="a", is_brief=True)))
    assert "10 done, 26 still to do; no picture of an interrupted run" in brief.text
    assert "img" not in brief.tags


@pytest.mark.parametrize("west", [-3.0, 177.0])
@pytest.mark.parametrize("top", [89.9, 48.0, 0.5, -60.0])
def test_areas_in_degrees_are_those_of_the_ellipsoid(top: float, west: float) -> None:
    step = 0.01
    place = Georeference(crs_wkt=rasterio.CRS.from_epsg(4326).to_wkt(), transform=(step, 0, west, 0, -step, top))
    found = pixel_areas(place, 100)
    assert found is not None
    geod = pyproj.Geod(ellps="WGS84")
    for row in (0, 37, 99):
        y = top - row * step
        # Parallels are no geodesics: many points along them.
        xs = np.linspace(west, west + step, 2001)
        lons = np.concatenate([xs, xs[::-1]])
        lats = np.concatenate([np.full(2001, y), np.full(2001, y - step)])
        area, _ = geod.polygon_area_perimeter(lons, lats)
        assert found[row] == pytest.approx(abs(area), rel=1e-5)


def test_the_whole_earth_is_as_large_as_it_is() -> None:
    place = Georeference(crs_wkt=rasterio.CRS.from_epsg(4326).to_wkt(), transform=(1, 0, -180, 0, -1, 90))
    found = pixel_areas(place, 180)
    assert found is not None
    assert found.sum() * 360 == pytest.approx(510_065_621_724_089, rel=1e-9)  # 4 pi (authalic radius)^2, EPSG 7030


def test_areas_in_feet_and_without_a_place() -> None:
    feet = Georeference(crs_wkt=rasterio.CRS.from_epsg(2263).to_wkt(), transform=(10, 0, 0, 0, -10, 0))
    found = pixel_areas(feet, 3)
    assert found is not None
    assert found == pytest.approx(100 * (1200 / 3937) ** 2)
    assert pixel_areas(Georeference(), 3) is None
    turned = Georeference(crs_wkt=rasterio.CRS.from_epsg(4326).to_wkt(), transform=(0.1, 0.05, 0, 0.05, -0.1, 0))
    assert pixel_areas(turned, 3) is None


def test_classes_are_weighed_by_their_rows(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "m.zarr", tmp_path / "m.zarr")
    array = writable(zarr.open_array(tmp_path / "m.zarr", path="class", mode="r+"))
    classes = np.zeros(array.shape, np.uint8)
    classes[350:] = 1
    array[:] = classes
    wkt = rasterio.CRS.from_epsg(4326).to_wkt()
    group = zarr.open_group(str(tmp_path / "m.zarr"), mode="r+")
    group["spatial_ref"].attrs.update(crs_wkt=wkt, spatial_ref=wkt, GeoTransform="10 0.01 0 70 0 -0.01")
    for name, start, step in (("y", 70, -0.01), ("x", 10, 0.01)):
        coordinate: Any = group[name]
        coordinate[:] = start + step * (np.arange(700) + 0.5)
    for item in (group, group["class"]):
        for name in [name for name in item.attrs if name.startswith(("proj:", "spatial:"))]:
            del item.attrs[name]
    found = count_areas(Console(), tmp_path / "m.zarr", read_header(tmp_path / "m.zarr"))
    rows = pixel_areas(Georeference(crs_wkt=wkt, transform=(0.01, 0, 10, 0, -0.01, 70)), 700)
    assert rows is not None
    assert found.on_ellipsoid
    assert [entry.pixels for entry in found.classes] == [350 * 700] * 2
    assert [entry.hectares for entry in found.classes] == pytest.approx(
        [rows[:350].sum() * 700 / 1e4, rows[350:].sum() * 700 / 1e4]
    )


def test_throughput_cuts_pauses_out_and_loses_no_pixel() -> None:
    times = [1.0 + t for t in range(100)] + [5000.0 + t for t in range(100)]
    found = measure_throughput([{"at": t, "pixels": 1_000_000, "state": "done"} for t in times])
    assert found is not None
    assert found.seconds == 198
    assert found.breaks == [99]
    assert sum(found.mpx_per_s) * found.seconds / len(found.mpx_per_s) == pytest.approx(200)
    assert measure_throughput([{"at": 1.0, "pixels": 1, "state": "done"}]) is None
    assert measure_throughput([{"pixels": 1, "state": "done"}] * 9) is None


def test_a_browser_opens_the_page_offline(folder: Path) -> None:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is not installed; .ci/run installs it")
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1150, "height": 900})
        page.context.set_offline(True)
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((folder / "pages" / "m.html").as_uri())
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        for width in (1150, 420):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            # Nothing but what scrolls by itself is wider than its section.
            assert page.evaluate(
                "[...document.querySelectorAll('section > *')].every(e => e.scrollWidth <= e.clientWidth + 1 ||"
                " e.classList.contains('wide') || !e.clientWidth)"
            )
        browser.close()
    assert wrong == []
    assert re.search(r"report of 20\d\d-", (folder / "pages" / "m.html").read_text())
