"""A whole layer saved, moved, and killed in the middle of its next save: the generation before loads, with its bits.

python -m outsize.tests.benchmarks.face_kill FOLDER [--classes 10000000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from ...models.faceid.layer.checkpoint import list_generations, load_checkpoint, save_checkpoint
from ...models.faceid.layer.head import ShardedMarginHead
from ...models.faceid.layer.row_rules import SGD
from ...models.faceid.layer.tablets import ROWS
from ...tiler.system.machine import cpu_count

DIM, BATCH = 512, 64


def make_head(classes: int, seed: int) -> ShardedMarginHead:
    return ShardedMarginHead(classes, DIM, rule=SGD(lr=0.1), seed=seed)


def step(head: ShardedMarginHead, *, move: bool) -> float:
    """Loss of one fixed batch, without or with an update."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn((BATCH, DIM), generator=generator).requires_grad_()
    labels = torch.randint(0, head.classes, (BATCH,), generator=generator)
    with torch.set_grad_enabled(move):
        loss = head(features, labels)
        if move:
            loss.backward()
    return float(loss.detach())


def save_twice(folder: Path, classes: int) -> None:
    """What is killed: generation 0, a step, and half of generation 1."""
    head = make_head(classes, 0)
    print(step(head, move=False), flush=True)
    began = time.perf_counter()
    save_checkpoint(head, folder, 0)
    print(time.perf_counter() - began, flush=True)
    step(head, move=True)
    save_checkpoint(head, folder, 1)


def main() -> None:
    """Save, kill, load, compare; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=10_000_000)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(cpu_count())
    if options.save:
        save_twice(options.folder, options.classes)
        return
    command = [sys.executable, "-m", __spec__.name, str(options.folder), "--classes", str(options.classes), "--save"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    before, saved = float(process.stdout.readline()), float(process.stdout.readline())
    files = -(-options.classes // ROWS) // 2
    while len(list(options.folder.glob("step-000000001/tablet-*"))) < files and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    written = len(list(options.folder.glob("step-000000001/tablet-*.rows")))
    head = make_head(options.classes, 99)
    began = time.perf_counter()
    generation = load_checkpoint(head, options.folder)
    loaded, after = time.perf_counter() - began, step(head, move=False)
    print(
        f"{options.classes:,} classes x {DIM}: generation 0 saved in {saved:.1f} s; generation 1 killed after "
        f"{written} tablets; complete generations {[g.step for g in list_generations(options.folder)]}; generation "
        f"{generation.step} loaded in {loaded:.1f} s; loss {before!r}, then {after!r}"
    )
    if process.returncode != -9 or generation.step != 0 or before != after:
        raise SystemExit("the layer did not survive")


if __name__ == "__main__":
    main()
