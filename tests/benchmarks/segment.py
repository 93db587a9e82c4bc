"""Disk to disk against the bare engine: the same network, weights, pixels and threads, in alternating runs.

    python -m outsize.tests.benchmarks.segment --size 8192 --rounds 3

"bare" is the engine on 1024 x 1024 windows that lie in memory, without overlap, scheduling or disk; "outsize" is
`outsize segment` from Zarr to Zarr, first read to last chunk, start check included. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outsize.models import as_tile_network, load_model
from outsize.pipelines.console import format_table
from outsize.sample_data.scene import Scene
from outsize.sample_data.write import write_scene
from outsize.tiler.engine import choose_engine, compile_program
from outsize.tiler.geometry import Grid
from outsize.tiler.machine import cpu_count
from outsize.tiler.network import analyze_network
from outsize.tiler.raster import open_raster

WINDOW = 1024


class BareEngine:
    """The engine on windows in memory."""

    def __init__(self, scene: Path, engine: str | None) -> None:
        raster = open_raster(scene)
        network = analyze_network(as_tile_network(load_model()), raster.bands, torch.uint8)
        self._engine = compile_program(network, choose_engine(engine), cpu_count()).load()
        grid = Grid(shape=raster.shape_yx, cell=(WINDOW, WINDOW))
        reader = raster.open_reader()
        # Few windows, used again and again: the same work for the engine, and no more memory than it needs.
        whole = [w for at in grid if (w := grid.window(*at)).shape == (WINDOW, WINDOW)]
        self._windows = [np.ascontiguousarray(reader.read(window)) for window in whole[:16]]
        self._repeats = -(-raster.shape_yx[0] * raster.shape_yx[1] // WINDOW**2)
        self._engine.run(self._windows[0])

    def measure(self) -> float:
        """Mpx/s."""
        began = time.perf_counter()
        for index in range(self._repeats):
            self._engine.run(self._windows[index % len(self._windows)])
        return self._repeats * WINDOW**2 / (time.perf_counter() - began) / 1e6


def measure_outsize(scene: Path, out: Path, engine: str | None) -> dict[str, Any]:
    """The JSON summary of one `outsize segment`."""
    command = [sys.executable, "-m", "outsize", "--json", "segment", str(scene), str(out), "--overwrite"]
    command += ["--no-dashboard", "--engine", engine or "auto"]
    completed = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(completed.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=["openvino", "torch"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder), Scene(height=options.size, width=options.size, seed=1))
        scene = Path(folder, "scene.zarr")
        bare = BareEngine(scene, options.engine)
        rounds: list[dict[str, Any]] = []
        for number in range(options.rounds):
            speed = bare.measure()
            summary = measure_outsize(scene, Path(folder, "map.zarr"), options.engine)
            rounds.append({"bare_mpx_per_s": speed, **summary, "ratio": summary["mpx_per_s"] / speed})
            print(f"round {number + 1} of {options.rounds}: ratio {rounds[-1]['ratio']:.3f}", file=sys.stderr)
    rows = [
        [
            str(number),
            f"{r['bare_mpx_per_s']:.2f}",
            f"{r['mpx_per_s']:.2f}",
            f"{r['ratio']:.3f}",
            f"{r['peak_bytes'] / 1e9:.2f}",
            f"{r['start_check_max_abs']:.1e}",
        ]
        for number, r in enumerate(rounds, start=1)
    ]
    header = ["round", "bare Mpx/s", "outsize Mpx/s", "ratio", "peak GB", "start check"]
    print(format_table(header, rows))
    values = {
        "size": options.size,
        "cpus": cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "median_ratio": statistics.median(r["ratio"] for r in rounds),
        "rounds": rounds,
    }
    print(json.dumps(values))


if __name__ == "__main__":
    main()
