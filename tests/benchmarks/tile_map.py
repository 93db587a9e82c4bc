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
from outsize.tiler.cluster.client import ClusterOptions
from outsize.tiler.cluster.dashboard import NAME, TileMapPlugin
from outsize.tiler.cluster.tile_map import TileMap, begin_message, tile_message


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


def simulate_million() -> TileMap:
    """An hour of a run over 64 x 64 tiles of a raster of 64,000 x 64,000 pixels, told by its messages."""
    side, core, hour, now = 1000, 64, 3600.0, time.time()
    kept = np.zeros((side, side), np.bool_)
    kept[: side // 10] = True
    extent = side * core
    begin = begin_message(
        run="million",
        title="segment million.zarr",
        shape=(extent, extent),
        core=(core, core),
        counts=(side, side),
        kept=kept,
        at=now - hour,
    )
    tiles, rng = TileMap(begin), np.random.default_rng(0)
    first, last = side * side // 10, side * side * 6 // 10
    failed = set(rng.integers(first, last, 40).tolist())
    seconds = rng.gamma(8, 0.05, last).round(3).tolist()
    for number in range(first, last):
        cell, worker = divmod(number, side), f"tcp://10.0.0.{number % 64 + 1}:40000"
        # Faster in the middle of the hour.
        share = (number - first) / (last - first)
        at = now - hour + 20 + (hour - 20) * (share + 0.1 * np.sin(2 * np.pi * share))
        error = "RasterError: /data/scene.tif: cannot be read: ZIPDecode" if number in failed else ""
        state = "failed" if error else "done"
        tiles.apply(tile_message("million", cell, state, seconds=seconds[number], worker=worker, error=error), at=at)
    for column in range(128):
        worker = f"tcp://10.0.0.{column % 64 + 1}:40000"
        tiles.apply(tile_message("million", (side * 6 // 10, column), "running", worker=worker), at=now)
    # As if all that had taken no time.
    late = time.time() - now
    tiles.began, tiles.history.began = tiles.began + late, tiles.history.began + late
    tiles.worked = None if tiles.worked is None else tiles.worked + late
    tiles.recent = [(at + late, pixels) for at, pixels in tiles.recent]
    y, x = np.indices(tiles.sketch.shape) / 40
    tiles.sketch[:] = np.sin(y) * np.cos(x * 1.3) + 0.3 * np.sin(x * y / 9)
    return tiles


def show_million(folder: Path) -> None:
    """A page with a million tiles, most of them done, and how long it takes to draw."""
    from playwright.sync_api import sync_playwright

    tiles = simulate_million()
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
