"""What the tile map costs: alternating runs with and without it, beside Dask's own dashboard; and a million tiles.

python -m outsize.tests.benchmarks.tile_map FOLDER [--pairs 5] [--size 4096]
python -m outsize.tests.benchmarks.tile_map FOLDER --million
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import outsize
from distributed import Client, LocalCluster
from outsize.sample_data.scene import Scene
from outsize.sample_data.write import write_scene
from outsize.tiler.cluster import ClusterOptions
from outsize.tiler.dashboard import NAME, TileMapPlugin
from outsize.tiler.tile_map import DONE, FAILED, KEPT, RUNNING, TileMap, begin_message


def compare(folder: Path, pairs: int, size: int) -> None:
    """Ratio of the seconds with and without, of each pair."""
    write_scene(folder, Scene(height=size, width=size, seed=0), overwrite=True)
    raster, model = outsize.open_raster(folder / "scene.zarr"), outsize.load_model()
    network = outsize.analyze_network(outsize.as_tile_network(model, output="class"), bands=4, dtype=raster.dtype)
    ratios: list[float] = []
    for pair in range(pairs + 1):
        seconds: dict[bool, float] = {}
        for tile_map in (pair % 2 == 0, pair % 2 == 1):
            summary = outsize.predict(
                raster,
                network,
                folder / "map.zarr",
                fill=model.fill,
                core=256,
                overwrite=True,
                tile_map=tile_map,
                cluster=ClusterOptions(dashboard_address="127.0.0.1:0"),
            )
            seconds[tile_map] = summary.seconds
        ratio = seconds[True] / seconds[False]
        ratios += [ratio] if pair else []  # the first pair warms up
        print(f"with {seconds[True]:.2f} s, without {seconds[False]:.2f} s, ratio {ratio:.3f}", flush=True)
    print(f"{pairs} pairs of {summary.tiles} tiles: ratio {statistics.median(ratios):.3f} (median), {sorted(ratios)}")


def show_million(folder: Path) -> None:
    """A page with a million tiles, most of them done, and how long it takes to draw."""
    from playwright.sync_api import sync_playwright

    side = 1000
    tiles = TileMap(
        begin_message(run="million", title="a million tiles", shape=(side, side), core=(1, 1), counts=(side, side))
    )
    rng = np.random.default_rng(0)
    tiles.states[: side * 6 // 10] = DONE
    tiles.states[: side // 10] = KEPT
    tiles.states[side * 6 // 10, :8] = RUNNING
    for row, column in rng.integers(0, side * 6 // 10, (40, 2)):
        tiles.states[row, column] = FAILED
        tiles.failures[int(row), int(column)] = "cannot be read"
    tiles.seconds[: side * 6 // 10] = rng.random((side * 6 // 10, side))
    y, x = np.indices(tiles.sketch.shape) / 40
    tiles.sketch[:] = np.sin(y) * np.cos(x * 1.3) + 0.3 * np.sin(x * y / 9)
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        sync_playwright() as playwright,
    ):
        client.register_plugin(TileMapPlugin())
        plugin = cluster.scheduler.plugins[NAME]
        plugin.maps["million"] = tiles
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 950})
        began = time.monotonic()
        page.goto(f"http://127.0.0.1:{client.scheduler_info()['services']['dashboard']}/tilemap")
        page.wait_for_selector(".bk-Figure")
        print(f"a million tiles are shown after {time.monotonic() - began:.1f} s")
        page.wait_for_timeout(2000)
        page.screenshot(path=str(folder / "tilemap-million.png"))
        browser.close()


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--million", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.million:
        show_million(options.folder)
    else:
        compare(options.folder, options.pairs, options.size)


if __name__ == "__main__":
    main()
