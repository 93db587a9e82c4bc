"""The tile map in a Dask dashboard: JSON, page, installation, and what a run does without them."""

from __future__ import annotations

import json
import os
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
from distributed import Client, LocalCluster
from outsize.tiler import dashboard
from outsize.tiler.dashboard import NAME, TileMapPlugin
from outsize.tiler.events import Event, TileFinished, TileRecord
from outsize.tiler.raster import open_raster
from outsize.tiler.tile_map import TOPIC, begin_message, tile_message
from outsize.tiler.transfer import copy_raster
from outsize.tiler.worker import TileRunner

from .rasters import write_geotiff
from .test_run import class_network, run, scene, stored, whole
from .test_transfer import damage

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
    run(source, class_network(), tmp_path / "o.zarr", client, redo=[(0, 0)])
    runs = fetch_runs(client)
    assert [entry["tiles"]["kept"] for entry in runs] == [15, 0]
    assert runs[0]["tiles"]["done"] == 1
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


@pytest.mark.parametrize("prefix", ["", "some/where"])
def test_a_scheduler_brings_the_map_by_preload(tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "scheduler.json"
    words = [
        "-m",
        "distributed.cli.dask_scheduler",
        "--scheduler-file",
        str(file),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    words += ["--dashboard-address", "127.0.0.1:0", "--preload", "outsize.tiler.dashboard"]
    words += ["--dashboard-prefix", prefix] if prefix else []
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-W", "ignore", *words], stderr=log, stdout=log)
    try:
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with Client(scheduler_file=str(file)) as client:
            port = client.scheduler_info()["services"]["dashboard"]
            base = f"http://127.0.0.1:{port}/" + (f"{prefix}/" if prefix else "")
            with urllib.request.urlopen(base + "tilemap.json", timeout=10) as answer:
                assert json.loads(answer.read())["runs"] == []
            with urllib.request.urlopen(base + "tilemap", timeout=10) as answer:
                assert 'href="tilemap"' in answer.read().decode()
            # A run that connects finds it there.
            client.register_plugin(TileMapPlugin())
            assert client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins)).count(NAME) == 1
    finally:
        process.kill()
        process.wait()


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


def test_states_change_on_the_page(
    tmp_path: Path, client: Client, chromium: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).random((3, 500, 900), np.float32)
    source = write_geotiff(tmp_path / "s.tif", image, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    damage(source, (3, 4))
    gate, truth = threading.Semaphore(3), TileRunner.run

    def wait(runner: TileRunner, row: int, column: int) -> TileRecord:
        gate.acquire(timeout=60)
        return truth(runner, row, column)

    monkeypatch.setattr(TileRunner, "run", wait)
    page = chromium.new_page(viewport={"width": 1400, "height": 950})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    out = tmp_path / "o.zarr"
    working = threading.Thread(target=run, args=(source, class_network(), out, client))
    working.start()
    try:
        while NAME not in client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins)):
            time.sleep(0.1)
        page.goto(page_of(client, "tilemap"))
        page.wait_for_function(_counts("running") + " > 0")
        early = page.evaluate(_counts("done"))
        _shoot(page, "early")
        for _ in range(60):
            gate.release()
        page.wait_for_function(_counts("done") + f" > {early} + 40")
        _shoot(page, "middle")
        for _ in range(200):
            gate.release()
        working.join(60)
        page.wait_for_function("document.querySelector('body') && " + _text() + ".includes('finished after')")
        assert page.evaluate(_counts("waiting")) == 0
        assert page.evaluate(_counts("failed")) >= 1
        assert "cannot be read" in page.evaluate(_text())
        _shoot(page, "end")
        # The pixel under the mouse says which tile it is.
        box = page.locator(".bk-Figure").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_function(_text() + ".includes('row ')")
        _shoot(page, "hover")
    finally:
        for _ in range(500):
            gate.release()
        working.join(60)
    assert wrong == []


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
