"""`outsize face benchmark`: ranks of a giant layer on this machine, timed."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ...models.faceid.layer.benchmark import BenchmarkSpec, make_rule, write_spec
from ...models.faceid.layer.head_plan import HeadPlan, plan_head
from ...tiler.base.errors import UsageError
from ...tiler.base.text import format_bytes, parse_bytes
from ...tiler.system.machine import cpu_count
from ...tiler.system.meter import MemoryMeter
from ..base.console import Console
from .ranks import run_ranks

RESERVE_BYTES = 1_000_000_000
"""Of the machine's memory that is left to others where no budget is given."""


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
    product_seconds: float


def run_face_benchmark(console: Console, options: FaceBenchmarkOptions) -> dict[str, Any]:
    """Plan, start the ranks, time the steps, print shares.

    Raises:
        HeadMemoryError: the layer does not fit the budget, or this machine.
        RankError: a rank ended early.
    """
    plan = _plan(console, options)
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
        product_s=options.product_seconds,
    )
    with tempfile.TemporaryDirectory() as folder, MemoryMeter() as meter:
        write_spec(spec, Path(folder))
        measured = run_ranks("outsize.models.faceid.layer.benchmark", spec.ranks, spec.threads, Path(folder))
    values = _summarise(plan, spec, measured, max(meter.peak_bytes, meter.current_bytes))
    console.result(_sentence(values), values)
    return values


def require_cores(ranks: int) -> None:
    """Raises:
    UsageError: more ranks than this machine has cores.
    """
    if ranks > cpu_count():
        raise UsageError(f"ranks must be at most the machine's {cpu_count()} cores, got {ranks}")


def available_bytes(memory: str | None) -> int:
    """The budget that is named, or what this machine has left."""
    return parse_bytes(memory) if memory else psutil.virtual_memory().available - RESERVE_BYTES


def _plan(console: Console, options: FaceBenchmarkOptions) -> HeadPlan:
    """The plan of the layer, shown; refused where it, or the ranks, do not fit this machine."""
    require_cores(options.ranks)
    plan = plan_head(
        options.classes,
        options.dim,
        batch=options.batch,
        ranks=options.ranks,
        threads=options.threads or max(1, cpu_count() // options.ranks),
        storage=getattr(torch, options.storage),
        rule=make_rule(options.rule),
        sample=options.sample,
        keep_cosines=options.keep_cosines,
    )
    console.remark_lines(plan.explain().split("\n"))
    plan.require(available_bytes(options.memory))
    return plan


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
