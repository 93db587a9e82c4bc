"""Timed steps of a layer with random batches, on one machine: the time of each pass, and what plain products take."""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ....tiler.system.machine import die_with_parent
from ....tiler.system.process_end import end_with
from .checkpoint import load_checkpoint, save_checkpoint
from .head import ShardedMarginHead
from .row_rules import RULES, RowRule
from .tablets import BLOCK_ROWS
from .threads import run_tablets


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSpec:
    """What every rank of a benchmark does."""

    classes: int
    dim: int
    batch: int
    """Of all ranks."""
    ranks: int
    threads: int
    """Of each rank."""
    steps: int
    rule: str
    storage: str
    margin: str
    keep_cosines: bool
    sample: float
    checkpoint: str | None
    """Folder to save the layer to and load it from, timed; None: neither."""
    product_s: float = 1.0
    """Seconds for products alone, shared by threads and one for each thread, before the steps and after them."""
    seed: int = 0


def make_rule(name: str) -> RowRule:
    """A rule with a modest learning rate."""
    return RULES[name](lr=0.001 if name == "rms" else 0.1)


def measure_products(batch: int, dim: int, seconds: float, *, together: bool = False) -> float:
    """FLOP/s of the three float32 products of a block, alone: w x^T, G^T w, G x.

    Args:
        together: each of torch's threads has products of its own, as in the layer; otherwise all share each product,
            as torch does by itself.
    """

    def multiply(until: float, number: int) -> int:
        del number
        x, w, g = torch.randn(batch, dim), torch.randn(BLOCK_ROWS, dim), torch.randn(BLOCK_ROWS, batch)
        columns, logits, features, rows = (
            x.T.contiguous(),
            torch.empty_like(g),
            torch.empty_like(x),
            torch.empty_like(w),
        )
        done = 0
        while time.perf_counter() < until or done < 3:
            torch.mm(w, columns, out=logits)
            torch.mm(g.T, w, out=features)
            torch.mm(g, x, out=rows)
            done += 1
        return done

    threads, began = torch.get_num_threads(), time.perf_counter()
    if together:
        done = sum(run_tablets(multiply, list(range(threads)), [began + seconds] * threads))
    else:
        done = multiply(began + seconds, 0)
    return done * 6 * batch * dim * BLOCK_ROWS / (time.perf_counter() - began)


def _measure_on_all_ranks(spec: BenchmarkSpec) -> list[float]:
    """Of all ranks at the same time: products shared by threads, and one for each thread."""
    if spec.ranks > 1:
        dist.barrier()
    speeds = torch.tensor(
        [measure_products(spec.batch, spec.dim, spec.product_s, together=together) for together in (False, True)],
        dtype=torch.float64,
    )
    if spec.ranks > 1:
        dist.all_reduce(speeds)
    return speeds.tolist()


def run_rank(rank: int, spec: BenchmarkSpec, folder: Path) -> None:
    """One rank; rank 0 writes what it measured to FOLDER/result.json, all write a line when a step is done."""
    torch.set_num_threads(spec.threads)
    if spec.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=spec.ranks)
    began = time.perf_counter()
    head = ShardedMarginHead(
        spec.classes,
        spec.dim,
        margin=spec.margin,
        storage=getattr(torch, spec.storage),
        rule=make_rule(spec.rule),
        sample=spec.sample,
        seed=spec.seed,
        keep_cosines=spec.keep_cosines,
    )
    result: dict[str, Any] = {"initialise_seconds": time.perf_counter() - began, "steps": []}
    share = slice(rank * spec.batch // spec.ranks, (rank + 1) * spec.batch // spec.ranks)
    generator = torch.Generator().manual_seed(spec.seed)
    products = [_measure_on_all_ranks(spec)]
    for number in range(spec.steps):
        features = torch.randn((spec.batch, spec.dim), generator=generator)[share].requires_grad_()
        labels = torch.randint(0, spec.classes, (spec.batch,), generator=generator)[share]
        if spec.ranks > 1:
            dist.barrier()
        began = time.perf_counter()
        loss = head(features, labels)
        loss.backward()
        seconds = time.perf_counter() - began
        result["steps"].append({"seconds": seconds, "loss": float(loss.detach()), **head.seconds})
        if rank == 0:
            print(
                f"step {number + 1} of {spec.steps}: {seconds:.2f} s, loss {float(loss.detach()):.4f}", file=sys.stderr
            )
    products.append(_measure_on_all_ranks(spec))
    result["sgemm_flops_per_s"], result["threaded_sgemm_flops_per_s"] = (max(of) for of in zip(*products, strict=True))
    if spec.checkpoint is not None:
        began = time.perf_counter()
        save_checkpoint(head, spec.checkpoint, head.step)
        saved = time.perf_counter()
        load_checkpoint(head, spec.checkpoint)
        result["save_seconds"], result["load_seconds"] = saved - began, time.perf_counter() - saved
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    if spec.ranks > 1:
        dist.destroy_process_group()


def main(rank: int, folder: Path, command: int) -> None:
    """`python -m outsize.models.faceid.layer.benchmark RANK FOLDER PID`: reads FOLDER/spec.json; PID is its parent."""
    die_with_parent(command)
    warnings.simplefilter("ignore")
    run_rank(rank, BenchmarkSpec(**json.loads((folder / "spec.json").read_text())), folder)


def write_spec(spec: BenchmarkSpec, folder: Path) -> None:
    (folder / "spec.json").write_text(json.dumps(asdict(spec)))


if __name__ == "__main__":
    end_with(lambda: main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
