"""The tile map in a Dask dashboard: JSON, page, installation, and what a run does without them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.cluster import dashboard, dashboard_page
from outsize.tiler.cluster.dashboard import NAME, TileMapPlugin, watch_run
from outsize.tiler.cluster.tile_map import DONE, TOPIC, TileMap, begin_message, tile_message
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.output.tile_record import TileRecord
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.events import ClusterReady, Event, TileFinished
from outsize.tiler.runs.worker import TileRunner

from ...support.rasters import damage, write_geotiff
from ...support.runs import class_network, run, run_again, scene, stored, whole

pytestmark = pytest.mark.system

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def page_of(client: Client, name: str) -> str:
    return f"http://127.0.0.1:{client.scheduler_info()['services']['dashboard']}/{name}"


def fetch(client: Client, name: str) -> Any:
    with urllib.request.urlopen(page_of(client, name), timeout=10) as answer:
        return answer.read().decode()


def fetch_runs(client: Client) -> list[dict[str, Any]]:
    return json.loads(fetch(client, "tilemap.json"))["runs"]


def test_a_run_is_on_the_map(tmp_path: Path, client: Client) -> None:
    image = np.random.default_rng(0).random((3, 200, 200), np.float32)
    source = write_geotiff(tmp_path / "s.tif", image, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    damage(source, (2, 2))
    seen: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        if isinstance(event, TileFinished):
            seen.append(fetch_runs(client)[0])

    summary = run(source, class_network(), tmp_path / "o.zarr", client, listener=listen)
    assert summary.failed_tiles
    first, last = seen[0], fetch_runs(client)[0]
    assert (first["grid"], first["core"], first["shape"], first["state"]) == ([4, 4], [64, 64], [200, 200], "running")
    assert first["tiles"]["waiting"] > 0
    assert last["state"] == "finished"
    assert last["tiles"] == {
        "waiting": 0,
        "running": 0,
        "done": 16 - len(summary.failed_tiles),
        "failed": len(summary.failed_tiles),
        "kept": 0,
    }
    assert [(tile["row"], tile["column"]) for tile in last["failed"]] == [entry[:2] for entry in summary.failed_tiles]
    assert "cannot be read" in last["failed"][0]["error"]
    (worker,) = last["workers"]
    assert (worker["done"], worker["running"]) == (16 - len(summary.failed_tiles), 0)
    # Continued: what is there is shown as such, and both runs can be chosen.
    run_again(source, class_network(), tmp_path / "o.zarr", client, [(0, 0)])
    runs = fetch_runs(client)
    assert [entry["tiles"]["kept"] for entry in runs] == [15, 0]
    assert runs[0]["tiles"]["done"] == 1
    # One tile only, and all of the picture but the damaged block.
    assert np.isfinite(plugin_of(client).maps[runs[0]["run"]].sketch).mean() > 0.85
    # Both pages know each other.
    assert 'href="tilemap"' in fetch(client, "status")
    assert 'href="workers"' in fetch(client, "tilemap")


def test_a_copy_is_on_the_map(tmp_path: Path, client: Client) -> None:
    source = scene(tmp_path, 700, 1100)
    copy_raster(open_raster(source), tmp_path / "s.zarr", client=client)
    (shown,) = fetch_runs(client)
    assert (shown["title"], shown["state"], shown["tiles"]["waiting"]) == ("ingest s.zarr", "finished", 0)


def test_an_interrupted_run_is_told(tmp_path: Path, client: Client) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, TileFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scene(tmp_path, 300, 300), class_network(), tmp_path / "o.zarr", client, listener=stop)
    (shown,) = fetch_runs(client)
    assert (shown["state"], shown["tiles"]["running"]) == ("KeyboardInterrupt", 0)
    assert shown["tiles"]["waiting"] > 0


@pytest.mark.parametrize("broken", ["page", "route", "plugin"])
def test_no_run_fails_for_its_map(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise ImportError("bokeh has changed")

    monkeypatch.setattr(dashboard.log, "propagate", True)
    match broken:
        case "page":
            monkeypatch.setattr(dashboard, "_add_page", fail)
        case "route":
            monkeypatch.setattr(dashboard, "_add_route", fail)
        case _:
            monkeypatch.setattr(TileMapPlugin, "start", fail)
    source = scene(tmp_path, 150, 150)
    assert run(source, class_network(), tmp_path / "o.zarr", client).failed_tiles == ()
    assert np.array_equal(stored(tmp_path / "o.zarr"), whole(class_network(), source))
    assert "bokeh has changed" in caplog.text
    if broken == "page":
        assert fetch_runs(client)[0]["state"] == "finished"


def test_wrong_messages_do_no_harm(tmp_path: Path, client: Client) -> None:
    run(scene(tmp_path, 70, 70), class_network(), tmp_path / "o.zarr", client)
    name = fetch_runs(client)[0]["run"]
    for message in (
        None,
        {},
        {"type": "begin"},
        begin_message(run="x", title="<script>alert(1)</script>", shape=(10, 10), core=(0, 0), counts=(1, 1)),
        tile_message("nobody", (0, 0), "done"),
        tile_message(name, (99, 0), "done"),
        tile_message(name, (0, 0), "levitating"),
        tile_message(name, (0, 0), "done", sketch=b"123"),
    ):
        client.log_event(TOPIC, message)
    assert fetch_runs(client)[0]["tiles"]["done"] == 4


@contextlib.contextmanager
def dask(place: Path, *words: str) -> Iterator[None]:
    """One of Dask's commands in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", *words]
    with (place / f"{words[0]}.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def own_scheduler(place: Path, *words: str) -> Iterator[Client]:
    file = place / "scheduler.json"
    command = ["distributed.cli.dask_scheduler", "--scheduler-file", str(file), "--host", "127.0.0.1", "--port", "0"]
    with dask(place, *command, "--dashboard-address", "127.0.0.1:0", *words):
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with Client(scheduler_file=str(file)) as client:
            yield client


@pytest.mark.parametrize("prefix", ["", "some/where"])
def test_a_scheduler_brings_the_map_by_preload(tmp_path: Path, prefix: str) -> None:
    words = ["--preload", "outsize.tiler.cluster.dashboard", *(["--dashboard-prefix", prefix] if prefix else [])]
    with own_scheduler(tmp_path, *words) as client:
        inside = f"{prefix}/" if prefix else ""
        assert json.loads(fetch(client, f"{inside}tilemap.json"))["runs"] == []
        assert 'href="tilemap"' in fetch(client, f"{inside}tilemap")
        # A run that connects finds it there.
        client.register_plugin(TileMapPlugin())
        assert client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins)).count(NAME) == 1


def test_a_scheduler_in_another_process_gets_the_map_from_the_run(tmp_path: Path) -> None:
    source, told = scene(tmp_path, 150, 150), list[str | None]()
    with own_scheduler(tmp_path) as client:
        address = client.scheduler_info()["address"]
        with dask(tmp_path, "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "2", "--no-dashboard"):
            # Of torch's parts only: tests have no name that another process could import.
            module = torch.nn.Conv2d(3, 4, 3, padding=1).eval()
            summary = run(
                source,
                analyze_network(module, bands=3),
                tmp_path / "o.zarr",
                client,
                listener=lambda event: told.append(event.dashboard) if isinstance(event, ClusterReady) else None,
            )
            (shown,) = fetch_runs(client)
            assert told == [page_of(client, "tilemap")]
            assert 'href="tilemap"' in fetch(client, "tilemap")
    assert summary.failed_tiles == ()
    assert (shown["state"], shown["tiles"]["done"]) == ("finished", 9)
    (worker,) = shown["workers"]
    assert worker["worker"].startswith("tcp://")
    assert (worker["done"], worker["state"], worker["threads"]) == (9, "idle", 2)
    assert worker["memory_bytes"] > 30e6


@pytest.fixture
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is not installed; .ci/run installs it")
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page, on which nothing may go wrong."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    assert wrong == []


def plugin_of(client: Client) -> TileMapPlugin:
    cluster: Any = client.cluster
    return cluster.scheduler.plugins[NAME]


@pytest.mark.long
def test_states_change_on_the_page(tmp_path: Path, client: Client, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random((3, 500, 900), np.float32)
    source = write_geotiff(tmp_path / "s.tif", image, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    damage(source, (3, 4))
    gate, truth = threading.Semaphore(3), TileRunner.run

    def wait(runner: TileRunner, row: int, column: int) -> TileRecord:
        gate.acquire(timeout=60)
        return truth(runner, row, column)

    monkeypatch.setattr(TileRunner, "run", wait)
    out = tmp_path / "o.zarr"
    working = threading.Thread(target=run, args=(source, class_network(), out, client))
    working.start()
    try:
        while NAME not in client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins)):
            time.sleep(0.1)
        page.goto(page_of(client, "tilemap"))
        page.wait_for_function(_counts("running") + " === 2")
        early = page.evaluate(_counts("done"))
        assert re.search(r"2 running\s+\d+\s+[\d.]+ [MG]B", page.evaluate(_text()))  # the worker's state, tiles, memory
        _shoot(page, "early")
        for _ in range(60):
            gate.release()
        page.wait_for_function(_counts("done") + f" > {early} + 40")
        (said,) = fetch_runs(client)
        assert said["eta_s"] > 0
        assert said["mpx_per_s"] > 0
        page.wait_for_function(_text() + ".match(/Mpx\\/s now, .* so far, about .* to go/)")
        assert page.evaluate("Math.max(..." + _curve() + ")") > 0
        _shoot(page, "middle")
        for _ in range(200):
            gate.release()
        working.join(60)
        page.wait_for_function(_text() + ".includes('finished after')")
        tiles = next(iter(plugin_of(client).maps.values()))
        counts, text = tiles.count(), page.evaluate(_text())
        assert [page.evaluate(_counts(state)) for state in ("waiting", "done")] == [0, counts["done"]]
        assert page.evaluate(_counts("failed")) == counts["failed"] == 9
        assert "to go" not in text
        assert re.search(rf"idle\s+{counts['done']}\s+[\d.]+ [MG]B", text)
        assert "2,3; 2,4; 2,5; 3,3; 3,4; 3,5; 4,3; 4,4; 4,5" in text
        # The curve holds what was done, and lasts as long as the run.
        times, rates = page.evaluate(_curve("t")), page.evaluate(_curve())
        assert tiles.ended is not None
        assert times[-1] == pytest.approx(tiles.ended - tiles.began, abs=1)
        done = sum(rate * (end - start) for rate, start, end in zip(rates[1:], times, times[1:], strict=False))
        assert done * 1e6 == pytest.approx(tiles.pixels_done, rel=0.2)
        # The pixel under the mouse says which tile it is.
        (worker,) = fetch_runs(client)[0]["workers"]
        expected = f"row 6, column 12\ndone, {tiles.seconds[6, 12]:.2f} s on {worker['worker']}"
        assert hover(page, (6.5 * 64, 12.5 * 64)) == expected
        failed = hover(page, (3.5 * 64, 4.5 * 64))
        assert failed.startswith("row 3, column 4\nfailed, ")
        assert failed.endswith(tiles.failures[3, 4])
        assert page.locator("div.tile").bounding_box()["width"] < 400
        _shoot(page, "failed")
    finally:
        for _ in range(500):
            gate.release()
        working.join(60)


def simulated(name: str, shape: tuple[int, int], core: int, failed: tuple[int, int] | None = None) -> TileMap:
    """A run whose upper half is done."""
    counts = (-(-shape[0] // core), -(-shape[1] // core))
    tiles = TileMap(begin_message(run=name, title=name, shape=shape, core=(core, core), counts=counts))
    tiles.states[: counts[0] // 2] = DONE
    if failed is not None:
        tiles.apply(tile_message(name, failed, "failed", error=f"/{'long' * 99}/s.tif: <b>no</b>"))
    return tiles


def test_each_run_is_shown_whole_and_in_its_aspect(client: Client, page: Any) -> None:
    client.register_plugin(TileMapPlugin())
    maps = plugin_of(client).maps
    maps["small"] = simulated("small", (500, 500), 64)
    page.goto(page_of(client, "tilemap"))
    page.wait_for_function(_text() + ".includes('8 rows x 8 columns')")
    assert frame(page) == {"width": 640, "height": 640, "x": [0, 500], "y": [500, 0]}
    # A larger run begins while the page is open; the newest is followed.
    maps["long"] = simulated("long", (1000, 8000), 100, failed=(2, 30))
    page.wait_for_function(_text() + ".includes('1,000 rows x 8,000 columns')")
    page.wait_for_function(f"({_FRAME})().width === 640")
    assert frame(page) == {"width": 640, "height": 80, "x": [0, 8000], "y": [1000, 0]}
    maps["high"] = simulated("high", (8000, 1000), 10, failed=(500, 70))
    page.wait_for_function(_text() + ".includes('8,000 rows x 1,000 columns')")
    assert frame(page) == {"width": 80, "height": 640, "x": [0, 1000], "y": [8000, 0]}
    # 2 x 2 tiles are one block there, which is smaller than its mark.
    told = hover(page, (5005 + 20, 705))
    assert told.startswith("row 502 to 503, column 70 to 71\nwaiting\nfailed at 500, 70: /long")
    assert told.endswith("<b>no</b>")
    # Chosen in the list, the first is shown again, and kept when another begins.
    page.locator("select").select_option(label=page.evaluate(_options())[-1])
    page.wait_for_function(_text() + ".includes('8 rows x 8 columns')")
    assert frame(page) == {"width": 640, "height": 640, "x": [0, 500], "y": [500, 0]}
    maps["last"] = simulated("last", (640, 64), 64)
    page.wait_for_function("document.querySelector('body') && " + _options() + ".length === 4")
    assert re.fullmatch(r"last \(20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\)", page.evaluate(_options())[0])
    assert "8 rows x 8 columns" in page.evaluate(_text())
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_an_open_page_shows_the_end_before_the_cluster_may_close(
    tmp_path: Path, client: Client, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_page, "UPDATE_MS", 3_600_000)
    client.register_plugin(TileMapPlugin())
    page.goto(page_of(client, "tilemap"))
    page.wait_for_function(_text() + ".includes('No run of outsize has been here yet.')")
    run(scene(tmp_path, 150, 150), class_network(), tmp_path / "o.zarr", client)
    page.wait_for_function(_counts("done") + " === 9", timeout=1000)
    assert "finished after" in page.evaluate(_text())
    # Without pages nobody is waited for.
    plugin_of(client).pages.clear()
    began = time.monotonic()
    dashboard._let_pages_see(client)
    assert time.monotonic() - began < 0.1


def test_a_page_without_its_scheduler_says_so(tmp_path: Path, chromium: Any) -> None:
    page = chromium.new_page()
    with own_scheduler(tmp_path, "--preload", "outsize.tiler.cluster.dashboard") as client:
        begin = begin_message(run="r", title="r", shape=(64, 128), core=(64, 64), counts=(1, 2))
        with watch_run(client, begin) as watch:
            watch.tell(tile_message("r", (0, 1), "done"))
            page.goto(page_of(client, "tilemap"))
            page.wait_for_function(_counts("done") + " === 1")
        assert not page.get_by_text("connection lost").is_visible()
    page.get_by_text("connection lost").wait_for(timeout=60_000)
    assert page.evaluate(_counts("done")) == 1


def _text() -> str:
    """All text of a page, that in Bokeh's shadow trees too."""
    return (
        "(function all(node) { let text = node.nodeType === 3 ? node.data + ' ' : '';"
        " if (node.shadowRoot) text += all(node.shadowRoot);"
        " for (const child of node.childNodes) if (!['STYLE', 'SCRIPT'].includes(child.nodeName)) text += all(child);"
        " return text; })(document.body)"
    )


def _counts(state: str) -> str:
    """The number behind a state in the legend."""
    return rf"Number((({_text()}).match(/{state}\s+([\d,]+)/) || [0, '-1'])[1].replace(',', ''))"


def _shoot(page: Any, name: str) -> None:
    """A picture for people to look at, where SCREENSHOTS names a folder."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"tilemap-{name}.png"))


_FRAME = """() => {
    const find = view => view.model.name === "tilemap" ? view : (view.child_views ?? []).map(find).find(v => v);
    const view = Object.values(Bokeh.index).map(find).find(v => v);
    const { width, height, left, top } = view.frame.bbox, { x_range, y_range } = view.model;
    const x = [x_range.start, x_range.end], y = [y_range.start, y_range.end];
    return { width, height, left, top, x, y };
}"""


def frame(page: Any) -> dict[str, Any]:
    """The map's frame on the screen, and the pixels of the raster that it shows."""
    found = page.evaluate(_FRAME)
    return {name: found[name] for name in ("width", "height", "x", "y")}


def hover(page: Any, at: tuple[float, float]) -> str:
    """All that tooltips tell of a pixel (y, x) of the raster."""
    found, box = page.evaluate(_FRAME), page.locator(".bk-Figure").first.bounding_box()
    x = box["x"] + found["left"] + found["width"] * at[1] / found["x"][1]
    y = box["y"] + found["top"] + found["height"] * at[0] / found["y"][0]
    page.mouse.move(x - 1, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(300)
    seen = [text for text in page.locator("div.tile").all_inner_texts() if text.strip()]
    assert len(seen) == 1
    return "\n".join(line for line in seen[0].splitlines() if line)


def _curve(name: str = "mpx") -> str:
    """A column of the throughput's curve."""
    return f"Array.from(Bokeh.documents[0].get_model_by_name('throughput').renderers[0].data_source.data['{name}'])"


def _options() -> str:
    """Names of the runs to choose from."""
    return (
        "(function all(node) { const roots = [...node.querySelectorAll('*')].filter(e => e.shadowRoot);"
        " return [...node.querySelectorAll('option')].map(o => o.text)"
        ".concat(...roots.map(e => all(e.shadowRoot))); })(document)"
    )
