"""One exact training step: peak memory and time of ordinary autograd, of torch.utils.checkpoint, and of tiles.

    python -m outsize.tests.benchmarks.backward --sides 1024 2048 4096 --rounds 3
    python -m outsize.tests.benchmarks.backward --largest 8GB
    python -m outsize.tests.benchmarks.backward --step scene.zarr --labels labels.zarr --memory 2GB

A step is forward, backward and SGD of the shipped network (0.5 M parameters, 4 bands, 6 classes) with cross-entropy.
Each way runs in a process of its own, in turn; after a step to warm up, the fastest counts. Memory is the largest
resident set of the process, everything included; one that goes beyond --limit is stopped and is "out of memory".

--largest: the largest square image that each can train on in so much memory, from the bytes a pixel of two smaller
ones, and then tried: a step at that side and at one an eighth longer. --step: one step on a scene of any size on disk
that nothing is held of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional as F

from ...models import CrossEntropy, as_tile_network, load_model
from ...models.segmentation.networks.model import TileNetwork
from ...models.segmentation.networks.unet import UNet
from ...pipelines.base.console import format_table
from ...sample_data.scene import Scene, render_window
from ...tiler.analysis.network import analyze_network
from ...tiler.base.geometry import Window
from ...tiler.base.text import format_bytes, format_seconds, parse_bytes
from ...tiler.rasters.opening import open_raster
from ...tiler.system.machine import cpu_count
from ...tiler.training.planner import plan_training
from ...tiler.training.tiled_autograd import tile_loss
from ...tiler.training.window_source import Pixels

WAYS = ("autograd", "checkpoint", "tiles")
WARM_UP, STEPS = 1, 2
WATCH_S = 0.05
SMALL = (8, 16)
"""Widths of the small network of --step --small."""


def make_module(*, checkpointing: bool = False, small: bool = False) -> TileNetwork:
    """Raw pixels in, logits out."""
    if small:
        torch.manual_seed(0)
        model = load_model()
        return TileNetwork(UNet(4, 6, SMALL), model.scaling, "logits").eval()
    module = as_tile_network(load_model(), output="logits")
    assert isinstance(module.network, UNet)
    module.network.checkpointing = checkpointing
    return module


def make_step(way: str, side: int, memory: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """(a step that gives its loss, what is known of it) on the sample scene, which lies in memory for all ways."""
    image, labels = map(
        torch.from_numpy, render_window(Scene(height=side, width=side, seed=0), Window.whole((side, side)))
    )
    module = make_module(checkpointing=way == "checkpoint")
    if way == "tiles":
        return make_tiled_step(module, image, labels, memory)
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-4)

    def step() -> float:
        optimiser.zero_grad()
        value = F.cross_entropy(module(image[None]), labels[None].long(), ignore_index=255)
        value.backward()
        optimiser.step()
        return float(value)

    return step, {}


def make_tiled_step(
    module: TileNetwork, image: Pixels, labels: Pixels, memory: str
) -> tuple[Callable[[], float], dict[str, Any]]:
    """By tiles, planned for the budget."""
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-4)
    dtype = str(image.dtype).removeprefix("torch.")
    network = analyze_network(module, bands=4, dtype=dtype)
    plan = plan_training(image, network, memory=memory, optimiser_state=0)
    assert plan.memory is not None
    print(plan.explain(), file=sys.stderr, flush=True)

    def step() -> float:
        optimiser.zero_grad()
        value = tile_loss(network, plan, CrossEntropy(ignore_index=255), image, labels)
        value.backward()
        optimiser.step()
        return float(value)

    return step, {"core": plan.core[0], "overlap": plan.overlap, "predicted": plan.memory.total_bytes}


def read_peak() -> int:
    """Largest resident set of this process so far, as the kernel counts it, without slowing what is measured."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Have the kernel count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def run_one(way: str, side: int, memory: str, steps: int) -> None:
    """In a process of its own: print what was measured, as JSON."""
    torch.set_num_threads(cpu_count())
    step, known = make_step(way, side, memory)
    forget_peak()  # of drawing the scene
    seconds: list[float] = []
    busy: list[float] = []
    loss = 0.0
    for _ in range(steps):
        began, worked = time.perf_counter(), time.process_time()
        loss = step()
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - worked)
    best, least = min(seconds[WARM_UP:] or seconds), min(busy[WARM_UP:] or busy)
    timed = {"seconds": best, "ns_per_px": best / side**2 * 1e9, "core_ns_per_px": least / side**2 * 1e9}
    print(json.dumps({**known, **timed, "loss": loss, "peak": read_peak()}))


def run_step(options: argparse.Namespace) -> None:
    """One step on a scene on disk."""
    image, labels = open_raster(options.step), open_raster(options.labels)
    height, width = image.shape_yx
    module = make_module(small=options.small)
    torch.set_num_threads(cpu_count())
    step, known = make_tiled_step(module, image, labels, options.memory)
    began = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - began
    parameters = sum(p.numel() for p in module.parameters())
    print(
        f"{height} x {width} x {image.bands}, {parameters / 1e6:.2f} M parameters: loss {loss:.6f}, "
        f"{format_seconds(seconds)} ({seconds / (height * width) * 1e9:.0f} ns a pixel), peak "
        f"{format_bytes(read_peak())}, predicted {format_bytes(known['predicted'])}, budget {options.memory}"
    )


def read_resident(process: psutil.Process) -> int:
    """0 where it is gone."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def start_one(way: str, side: int, options: argparse.Namespace, steps: int = WARM_UP + STEPS) -> dict[str, Any]:
    """`run_one` apart, stopped when it takes more than the limit."""
    limit = parse_bytes(options.limit)
    words = ("--one", way, str(side), str(steps), "--memory", options.memory)
    command = [sys.executable, "-m", "outsize.tests.benchmarks.backward", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        watched, largest = psutil.Process(child.pid), 0
        while child.poll() is None:
            largest = max(largest, read_resident(watched))
            if largest > limit:
                child.kill()
            time.sleep(WATCH_S)
        out, err = child.communicate()
    if largest > limit:
        return {"way": way, "side": side, "error": "out of memory"}
    if child.returncode:
        return {"way": way, "side": side, "error": (err.strip().splitlines() or ["killed"])[-1]}
    return {"way": way, "side": side, **json.loads(out.splitlines()[-1])}


def compare(options: argparse.Namespace) -> None:
    """A row a way and side."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for side in options.sides:
        for _ in range(options.rounds):
            for way in options.only:
                earlier = found.setdefault((side, way), [])
                if earlier and "error" in earlier[-1]:
                    continue
                earlier.append(start_one(way, side, options))
                print(json.dumps(earlier[-1]), file=sys.stderr, flush=True)
    rows: list[list[str]] = []
    for (side, way), runs in found.items():
        if "error" in runs[-1]:
            rows.append([str(side), way, runs[-1]["error"], "", "", "", "", ""])
            continue
        usual = [run for run in found.get((side, "autograd"), []) if "error" not in run]
        ratios = [mine["ns_per_px"] / other["ns_per_px"] for mine, other in zip(runs, usual, strict=False)]
        peak = max(run["peak"] for run in runs)
        rows.append(
            [
                str(side),
                way,
                f"{statistics.median(run['ns_per_px'] for run in runs):.0f}",
                f"{statistics.median(ratios):.2f}" if ratios else "-",
                f"{statistics.median(run['core_ns_per_px'] for run in runs):.0f}",
                format_bytes(peak),
                format_bytes(runs[-1]["predicted"]) if "predicted" in runs[-1] else "-",
                str(runs[-1].get("core", "-")),
            ]
        )
    print(format_table(["side", "way", "ns a pixel", "x autograd", "core ns", "peak", "predicted", "core"], rows))


def find_largest(options: argparse.Namespace) -> None:
    """A row a way: the side that fits, and proof that one an eighth longer does not."""
    budget = parse_bytes(options.largest)
    options.limit = options.largest
    rows: list[list[str]] = []
    small, large = options.sides[:2]
    for way in options.only:
        if way == "tiles":
            rows.append([way, "any on disk: memory follows from the budget, not from the image", ""])
            continue
        runs = [start_one(way, side, options, 1) for side in (small, large)]
        slope, base = np.polyfit([side**2 for side in (small, large)], [run["peak"] for run in runs], 1)
        side = int(((budget - base) / slope) ** 0.5) // 16 * 16
        fitted = ""
        while "peak" not in (tried := start_one(way, side, options, 1)):
            side -= 64
        fitted = f"{side} x {side}: {format_bytes(tried['peak'])}, {slope:.0f} bytes a pixel"
        beyond = start_one(way, side * 9 // 8, options, 1)
        rows.append([way, fitted, f"{side * 9 // 8}: {beyond.get('error') or format_bytes(beyond['peak'])}"])
    print(format_table(["way", f"largest in {options.largest}", "an eighth longer"], rows))


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--memory", default="2GB", help="budget of the tiles' plan")
    parser.add_argument("--limit", default="18GB", help="a process that takes more is stopped")
    parser.add_argument("--largest", metavar="SIZE", help="find the largest image that fits, such as 8GB")
    parser.add_argument("--step", type=Path, metavar="SCENE", help="one step on a scene of 4 bands on disk")
    parser.add_argument("--labels", type=Path, help="of it, a raster of 0..5, 255 unlabelled")
    parser.add_argument("--small", action="store_true", help="--step with a network of two levels, 8 and 16 channels")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIDE", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # Of all ways, as `outsize train` does: huge pages for tensors from 2 MB on, before torch makes the first.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if options.one:
        way, side, steps = options.one
        run_one(way, int(side), options.memory, int(steps))
    elif options.step:
        run_step(options)
    elif options.largest:
        find_largest(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
