"""`outsize face benchmark` and `face train`: ranks of a giant layer on this machine, timed, or trained end to end."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..models.faceid.benchmark import BenchmarkSpec, make_rule, write_spec
from ..models.faceid.head_plan import HeadPlan, plan_head
from ..tiler.errors import TilerError, UsageError
from ..tiler.machine import cpu_count
from ..tiler.memory import format_bytes, parse_bytes
from ..tiler.meter import MemoryMeter
from .console import Console

RESERVE_BYTES = 1_000_000_000
"""Of the machine's memory that is left to others where no budget is given."""


class RankError(TilerError):
    """A rank ended early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceBenchmarkOptions:
    """What `face benchmark` is told."""

    classes: int
    dim: int
    batch: int
    ranks: int
    threads: int | None
    steps: int
    rule: str
    storage: str
    margin: str
    keep_cosines: bool
    sample: float
    memory: str | None
    checkpoint: Path | None


def run_face_benchmark(console: Console, options: FaceBenchmarkOptions) -> dict[str, Any]:
    """Plan, start the ranks, time the steps, print shares.

    Raises:
        HeadMemoryError: the layer does not fit the budget, or this machine.
        RankError: a rank ended early.
    """
    plan = _plan(console, options, options.classes, sample=options.sample, keep_cosines=options.keep_cosines)
    spec = BenchmarkSpec(
        classes=options.classes,
        dim=options.dim,
        batch=options.batch,
        ranks=options.ranks,
        threads=options.threads or max(1, cpu_count() // options.ranks),
        steps=options.steps,
        rule=options.rule,
        storage=options.storage,
        margin=options.margin,
        keep_cosines=options.keep_cosines,
        sample=options.sample,
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
    )
    with tempfile.TemporaryDirectory() as folder, MemoryMeter() as meter:
        write_spec(spec, Path(folder))
        measured = _run_ranks("outsize.models.faceid.benchmark", spec.ranks, spec.threads, Path(folder))
    values = _summarise(plan, spec, measured, max(meter.peak_bytes, meter.current_bytes))
    console.result(_sentence(values), values)
    return values


def _plan(
    console: Console,
    options: FaceBenchmarkOptions | FaceTrainOptions,
    classes: int,
    *,
    sample: float = 1.0,
    keep_cosines: bool = False,
) -> HeadPlan:
    """The plan of the layer, shown; refused where it, or the ranks, do not fit this machine."""
    if options.ranks > cpu_count():
        raise UsageError(f"ranks must be at most the machine's {cpu_count()} cores, got {options.ranks}")
    plan = plan_head(
        classes,
        options.dim,
        batch=options.batch,
        ranks=options.ranks,
        threads=options.threads or max(1, cpu_count() // options.ranks),
        storage=getattr(torch, options.storage),
        rule=make_rule(options.rule),
        sample=sample,
        keep_cosines=keep_cosines,
    )
    console.remark(plan.explain())
    free = psutil.virtual_memory().available - RESERVE_BYTES
    plan.require(parse_bytes(options.memory) if options.memory else free)
    return plan


def _run_ranks(module: str, ranks: int, threads: int, folder: Path) -> dict[str, Any]:
    """Run `python -m module RANK FOLDER` for each rank; what rank 0 wrote to result.json.

    Raises:
        RankError: a rank ended early; the others are ended too.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, "-P", "-m", module, str(rank), str(folder)], env=environment)
        for rank in range(ranks)
    ]
    try:
        running = dict(enumerate(processes))
        while running:
            for rank, process in list(running.items()):
                code = process.poll()
                if code:
                    raise RankError(f"rank {rank} of {ranks} ended with code {code}; what it said stands above")
                if code == 0:
                    del running[rank]
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return json.loads((folder / "result.json").read_text())


def _summarise(plan: HeadPlan, spec: BenchmarkSpec, measured: dict[str, Any], peak: int) -> dict[str, Any]:
    # The first step touches memory for the first time; with more than one, it is left out.
    steps = measured["steps"][1:] or measured["steps"]
    median = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    rate = plan.flops / median["seconds"]
    return {
        **plan.to_json(),
        "rule": spec.rule,
        "sample": spec.sample,
        "threads": spec.threads,
        "step_seconds": median["seconds"],
        "first_pass_seconds": median["first"],
        "second_pass_seconds": median["second"],
        "exchange_seconds": median["exchange"],
        "loss": measured["steps"][-1]["loss"],
        "gflops": rate / 1e9,
        "sgemm_gflops": measured["sgemm_flops_per_s"] / 1e9,
        "sgemm_share": rate / measured["sgemm_flops_per_s"],
        "threaded_sgemm_gflops": measured["threaded_sgemm_flops_per_s"] / 1e9,
        "threaded_sgemm_share": rate / measured["threaded_sgemm_flops_per_s"],
        "peak_bytes": peak,
        "initialise_seconds": measured["initialise_seconds"],
        **{name: measured[name] for name in ("save_seconds", "load_seconds") if name in measured},
    }


def _sentence(values: dict[str, Any]) -> str:
    lines = [
        f"step      {values['step_seconds']:.2f} s: first pass {values['first_pass_seconds']:.2f}, second with update "
        f"{values['second_pass_seconds']:.2f}, exchange {values['exchange_seconds']:.2f}",
        f"speed     {values['gflops']:.0f} GFLOP/s, {100 * values['sgemm_share']:.0f} % of plain products of the same "
        f"shapes ({values['sgemm_gflops']:.0f}), {100 * values['threaded_sgemm_share']:.0f} % of one product a thread "
        f"({values['threaded_sgemm_gflops']:.0f})",
        f"memory    {format_bytes(values['peak_bytes'])} peak of all processes (predicted "
        f"{format_bytes(values['machine_bytes'])}), {values['bytes_per_class']:,.0f} bytes a class",
    ]
    if "save_seconds" in values:
        lines.append(f"disk      saved in {values['save_seconds']:.1f} s, loaded in {values['load_seconds']:.1f} s")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceTrainOptions:
    """What `face train` is told."""

    out: Path
    identities: int
    dim: int
    batch: int
    ranks: int
    threads: int | None
    steps: int
    lr: float
    head_lr: float
    rule: str
    margin: str
    scale: float
    storage: str
    save_every: int
    memory: str | None
    seed: int


def run_face_train(console: Console, options: FaceTrainOptions) -> dict[str, Any]:
    """Train a small embedder on synthetic identities; goes on where an earlier run of the same options stopped.

    Raises:
        UsageError: OUT holds a training of other options.
        HeadMemoryError: the layer does not fit the budget, or this machine.
        RankError: a rank ended early.
    """
    from .face_training import TrainSpec, write_spec

    _plan(console, options, options.identities)
    values = {name: getattr(options, name) for name in options.__slots__ if name not in ("memory", "out", "threads")}
    spec = TrainSpec(
        **values, out=str(options.out.absolute()), threads=options.threads or max(1, cpu_count() // options.ranks)
    )
    _require_same_training(options.out, values)
    with tempfile.TemporaryDirectory() as folder, MemoryMeter() as meter:
        write_spec(spec, Path(folder))
        result = _run_ranks("outsize.pipelines.face_training", spec.ranks, spec.threads, Path(folder))
    result = {**result, "peak_bytes": max(meter.peak_bytes, meter.current_bytes), "out": str(options.out)}
    begun = f"went on from step {result['first_step']}, " if result["first_step"] else ""
    console.result(
        f"{options.out}: {begun}loss {result['loss']:.3f}, rank-1 of identities never seen "
        f"{100 * result['rank_1']:.1f} %, peak memory {format_bytes(result['peak_bytes'])}",
        result,
    )
    return result


def _require_same_training(out: Path, values: dict[str, Any]) -> None:
    """A folder holds one training; its options stand in options.json. Ranks may differ."""
    ours = {name: value for name, value in values.items() if name not in ("ranks", "save_every")}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "options.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        differing = [
            f"{name} {theirs.get(name)} there, {ours[name]} now" for name in ours if theirs.get(name) != ours[name]
        ]
        if differing:
            raise UsageError(f"{out} holds another training: {'; '.join(differing)}; choose another folder")
        return
    if any(out.iterdir()):
        raise UsageError(f"{out} must be a new or empty folder, or one of this training, got other files there")
    path.write_text(json.dumps(ours, indent=1))
