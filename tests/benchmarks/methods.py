"""Window runs against programs: work and time of an inner tile, in one alternating run.

python -m outsize.tests.benchmarks.methods [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch
from outsize.tiler.engines.loading import load_windows

from ...models import as_tile_network, load_model
from ...tiler.analysis.cost import compute_flops, count_flops, program_shapes
from ...tiler.analysis.network import analyze_network
from ...tiler.analysis.program import make_program
from ...tiler.base.geometry import Window
from ...tiler.base.tile import Tile
from ...tiler.engines.loading import compile_program
from ...tiler.engines.programs import open_programs
from ...tiler.system.machine import cpu_count

RASTER = (30_000, 30_000)


def main() -> None:
    """Print one row for each core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    network = analyze_network(as_tile_network(load_model()), bands=4, dtype="uint8")
    random = np.random.default_rng(0)
    print("| core | window: work, time | program: work, time | program / window, time |\n|---|---|---|---|")
    for side in (512, 1024, 2048):
        core = Window(y=8192, x=8192, height=side, width=side)
        window = network.input_window(core, RASTER)
        program = make_program(network, RASTER, core)
        bare = compute_flops(network.graph, core.shape)
        work = {
            "window": compute_flops(network.graph, window.shape) / bare,
            "program": count_flops(network.graph, program_shapes(network, program.rows, program.columns)) / bare,
        }
        engines: dict[str, Any] = {
            "bare": load_windows(compile_program(network, "openvino", cpu_count())),
            "window": load_windows(compile_program(network, "openvino", cpu_count())),
            "program": open_programs(network, "openvino", cpu_count(), RASTER),
        }
        images = {
            name: random.integers(0, 255, (4, *shape), dtype=np.uint8)
            for name, shape in (("bare", core.shape), ("window", window.shape), ("program", program.window.shape))
        }
        tile = Tile(row=0, column=0, core=core, target=core, window=program.window, crop=core)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(rounds + 1):
            for name, engine in engines.items():
                began = time.perf_counter()
                if name == "program":
                    engine.run_tile(images[name], tile)
                else:
                    engine.run(images[name])
                seconds[name].append(time.perf_counter() - began)
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first one compiles
        window_time, program_time = (median[name] / median["bare"] for name in ("window", "program"))
        print(
            f"| {side} | {work['window']:.3f} x, {window_time:.3f} x | {work['program']:.3f} x, {program_time:.3f} x | "
            f"{program_time / window_time:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
