"""The streamed layer beside a dense torch layer with SGD and momentum: time of a step, bytes a class, what fits.

python -m outsize.tests.benchmarks.face [--classes 100000 1000000 2000000] [--batch 64]

Each row runs in a process of its own. The dense layer is what arcface_torch's PartialFC_V2 amounts to without sampling:
float32 rows, gradient and momentum, logits of batch x classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings

import torch
from torch.nn import functional as F

from ...models.faceid.layer.head import ShardedMarginHead
from ...models.faceid.layer.margins import Margin
from ...models.faceid.layer.reference import compute_dense_loss
from ...models.faceid.layer.row_rules import SGD, Momentum, RowRMS
from ...tiler.base.text import format_bytes
from ...tiler.system.machine import cpu_count
from ...tiler.system.meter import MemoryMeter, process_bytes

DIM = 512
LAYERS = ("dense", "sgd", "rms", "momentum")


def run_one(layer: str, classes: int, batch: int, steps: int) -> None:
    """Print seconds of a step and bytes above an empty process, as JSON."""
    torch.set_num_threads(cpu_count())
    generator = torch.Generator().manual_seed(0)
    before = process_bytes()
    seconds: list[float] = []
    with MemoryMeter() as meter:
        if layer == "dense":
            weight = torch.nn.Parameter(F.normalize(torch.randn((classes, DIM), generator=generator)))
            optimiser = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        else:
            rule = {"sgd": SGD(lr=0.1), "rms": RowRMS(lr=0.001), "momentum": Momentum(lr=0.1)}[layer]
            head = ShardedMarginHead(classes, DIM, rule=rule)
        for _ in range(steps + 1):
            features = torch.randn((batch, DIM), generator=generator).requires_grad_()
            labels = torch.randint(0, classes, (batch,), generator=generator)
            began = time.perf_counter()
            if layer == "dense":
                optimiser.zero_grad()
                compute_dense_loss(features, labels, weight, Margin(m2=0.5), 64.0).backward()
                optimiser.step()
            else:
                head(features, labels).backward()
            seconds.append(time.perf_counter() - began)
    held = max(meter.peak_bytes, meter.current_bytes) - before
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "bytes": held, "process": before}))


def main() -> None:
    """Print one row for each number of classes and layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 1_000_000, 2_000_000])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        run_one(options.one[0], int(options.one[1]), options.batch, options.steps)
        return
    print("| classes | layer | step | held | bytes a class | classes in 16 GB |\n|---|---|---|---|---|---|")
    for classes in options.classes:
        for layer in LAYERS:
            command = [sys.executable, "-m", __spec__.name, "--one", layer, str(classes)]
            command += ["--batch", str(options.batch), "--steps", str(options.steps)]
            completed = subprocess.run(command, capture_output=True, text=True, check=False)
            if completed.returncode:
                print(f"| {classes:,} | {layer} | out of memory | | | |", flush=True)
                continue
            values = json.loads(completed.stdout.splitlines()[-1])
            each = values["bytes"] / classes
            fits = (16e9 - values["process"]) / each
            held = format_bytes(values["bytes"])
            row = f"| {classes:,} | {layer} | {values['seconds']:.2f} s | {held} | {each:,.0f} | {fits / 1e6:.1f} M |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
