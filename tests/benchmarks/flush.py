"""What flushing chunks to the disk before their record costs: alternating runs with and without.

python -m outsize.tests.benchmarks.flush FOLDER [--pairs 5] [--size 4096]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import outsize
from distributed import Client, LocalCluster
from outsize.sample_data.scene import Scene
from outsize.sample_data.write import write_scene


def main() -> None:
    """Compare; workers are threads of this process, so that its `fsync` is theirs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    folder, truth = options.folder, os.fsync
    folder.mkdir(parents=True, exist_ok=True)
    write_scene(folder, Scene(height=options.size, width=options.size, seed=0), overwrite=True)
    raster, model = outsize.open_raster(folder / "scene.zarr"), outsize.load_model()
    network = outsize.analyze_network(outsize.as_tile_network(model, output="class"), bands=4, dtype=raster.dtype)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):

        def segment() -> object:
            return outsize.predict(
                raster, network, folder / "map.zarr", fill=model.fill, core=512, overwrite=True, client=client
            )

        def copy() -> object:
            return outsize.copy_raster(raster, folder / "copy.zarr", client=client, overwrite=True)

        for name, work in (("segment", segment), ("ingest", copy)):
            print(f"{name}: {_compare(work, options.pairs, truth)}", flush=True)


def _compare(work: Callable[[], object], pairs: int, truth: Callable[[int], None]) -> str:
    ratios: list[float] = []
    for pair in range(pairs + 1):
        seconds: dict[bool, float] = {}
        for flushed in (pair % 2 == 0, pair % 2 == 1):
            os.fsync = truth if flushed else lambda _: None
            began = time.perf_counter()
            work()
            seconds[flushed] = time.perf_counter() - began
        os.fsync = truth
        ratios += [seconds[True] / seconds[False]] if pair else []  # the first pair warms up
        print(f"flushed {seconds[True]:.2f} s, not {seconds[False]:.2f} s", flush=True)
    return f"ratio {statistics.median(ratios):.3f} (median of {pairs} pairs, {min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
