"""Predicted against measured peak memory: networks of the field, each at several budgets, as whole runs.

python -m outsize.tests.benchmarks.memory [--side 6144] [--budgets 900MB 1.4GB 3GB] [--networks NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import zarr

from ...models import as_tile_network, load_model
from ...tiler.analysis.network import Network, analyze_network
from ...tiler.base.text import format_bytes, parse_bytes
from ...tiler.runs.run import predict
from ..support.architectures import ARCHITECTURES
from ..support.zoo import alive

NETWORKS = (
    *("default", "unet transposed", "unet bilinear corners", "resnet fcn", "deeplab", "fpn", "hrnet"),
    *("mobilenet", "convnext", "densenet", "efficientnet", "attention unet"),
)
BUDGETS = ("900MB", "1.4GB", "3GB")
BANDS = 4


def network_named(name: str) -> Network:
    """The default network, or one of the tests' with random weights."""
    torch.manual_seed(0)
    if name == "default":
        return analyze_network(as_tile_network(load_model()), bands=BANDS, dtype="uint8")
    return analyze_network(alive(ARCHITECTURES[name]()).float(), bands=3)


def write_raster(folder: Path, name: str, side: int) -> Path:
    """Random pixels: memory does not look at values."""
    bands, dtype = (BANDS, "uint8") if name == "default" else (3, "float32")
    path = folder / f"{dtype}.zarr"
    if not path.exists():
        array = zarr.create_array(
            path,
            shape=(bands, side, side),
            chunks=(bands, 512, 512),
            dtype=dtype,
            dimension_names=("band", "y", "x"),
        )
        random = np.random.default_rng(0)
        for y in range(0, side, 512):
            part = random.integers(0, 255, (bands, min(512, side - y), side), dtype=np.uint8)
            array[:, y : y + part.shape[1]] = part.astype(dtype)
    return path


def run_one(name: str, raster: Path, budget: str) -> None:
    """In a process of its own: print the run's summary."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        plans: list[str] = []
        summary = predict(
            raster,
            network_named(name),
            Path(folder, "out.zarr"),
            memory=budget,
            listener=lambda event: plans.append(str(event.plan.core[0])) if hasattr(event, "plan") else None,
        )
    values = {"core": plans[0], "peak": summary.peak_bytes, "predicted": summary.predicted_peak_bytes}
    print(json.dumps({**values, "speed": summary.mpx_per_s}))


def main() -> None:
    """Print one row for each network and budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=6144)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one[0], Path(options.one[1]), options.one[2])
        return
    print("| network | budget | core | predicted | measured | predicted / measured |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            raster = write_raster(Path(folder), name, options.side)
            for budget in options.budgets:
                command = [sys.executable, "-m", __spec__.name, "--one", name, str(raster), budget]
                completed = subprocess.run(command, capture_output=True, text=True, check=False)
                if completed.returncode:
                    reason = (completed.stderr.strip().splitlines() or [""])[-1]
                    print(f"| {name} | {budget} | refused: {reason[:110]} | | | |", flush=True)
                    continue
                values = json.loads(completed.stdout.splitlines()[-1])
                over = " OVER" if values["peak"] > parse_bytes(budget) else ""
                print(
                    f"| {name} | {budget} | {values['core']} | {format_bytes(values['predicted'])} | "
                    f"{format_bytes(values['peak'])}{over} | {values['predicted'] / values['peak']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
