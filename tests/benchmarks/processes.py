"""Worker processes times compute threads, and the side of the cores: outsize's own runs, in turn.

    python -m outsize.tests.benchmarks.processes --size 8192 --rounds 3 --cores 1024 2048

Prints a row for each way of dividing this machine's cores among processes, and each side of a core, relative to what
the planner chooses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...pipelines.base.console import format_table
from ...sample_data.scene import Scene
from ...sample_data.write import write_scene
from ...tiler.system.machine import cpu_count
from .segment import run


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", default="small", choices=["small", "medium", "large"])
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--cores", type=int, nargs="*", default=[], help="sides of cores to try; default: the plan's")
    options = parser.parse_args()
    cpus = cpu_count()
    ways: dict[str, list[str]] = {"as planned": []}
    for workers in (count for count in range(1, cpus + 1) if cpus % count == 0):
        ways[f"{workers} x {cpus // workers}"] = ["--workers", str(workers), "--threads", str(cpus // workers)]
    ways.update({f"core {core}": ["--core", str(core)] for core in options.cores})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as temporary:
        write_scene(Path(temporary), Scene(height=options.size, width=options.size, seed=1))
        for _ in range(options.rounds):
            for name, words in ways.items():
                made = run("outsize", Path(temporary, "scene.zarr"), Path(temporary, "out.zarr"), options, *words)
                print(json.dumps({"way": name, **made}), file=sys.stderr, flush=True)
                found[name].append(made)
    rows: list[list[str]] = []
    for name, runs in found.items():
        if errors := [made["error"] for made in runs if "error" in made]:
            rows.append([name, errors[0], "", ""])
            continue
        ratios = [mine["mpx_per_s"] / usual["mpx_per_s"] for mine, usual in zip(runs, found["as planned"], strict=True)]
        speed = statistics.median(made["mpx_per_s"] for made in runs)
        peak = max(made["peak_bytes"] for made in runs) / 1e9
        rows.append([name, f"{speed:.2f}", f"{statistics.median(ratios):.3f}", f"{peak:.2f}"])
    print(format_table(["processes x threads", "Mpx/s", "ratio to the plan", "peak GB"], rows))


if __name__ == "__main__":
    main()
