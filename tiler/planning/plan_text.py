"""A plan in words: one line for each of its sections, in the order of the table below."""

from __future__ import annotations

from ..base.text import format_bytes, format_seconds, one_line
from ..rasters.reading import MUCH_READ
from .decisions import PlanDecisions


def explain_decisions(plan: PlanDecisions, flops_per_s: float | None) -> str:
    """All sections that have something to say, a line each.

    Args:
        flops_per_s: of the matrix product on this machine, or its CUDA devices; None: no time is estimated.
    """
    sections = {
        "raster": _say_raster(plan),
        "padding": _say_padding(plan),
        "region": _say_region(plan),
        "output": _say_output(plan),
        "halo": _say_halo(plan),
        "tiles": _say_tiles(plan),
        "overhead": _say_overhead(plan),
        "reading": _say_reading(plan),
        "engine": _say_engine(plan),
        "precision": _say_precision(plan),
        "memory": _say_memory(plan),
        "device": _say_device(plan),
        "context": _say_context(plan),
        "work": _say_work(plan),
        "time": _say_time(plan, flops_per_s),
    }
    return "\n".join(f"{name:<9} {one_line(text)}" for name, text in sections.items() if text)


def _say_raster(plan: PlanDecisions) -> str:
    bands, height, width = plan.raster_shape
    return f"{height} x {width} px, {_count(bands, 'band')} {plan.raster_dtype}, {height * width / 1e6:.1f} Mpx"


def _say_padding(plan: PlanDecisions) -> str:
    if plan.size_multiple <= 1:
        return ""
    return (
        f"sizes padded to multiples of {plan.size_multiple} at bottom and right with the model's fill value, the "
        "result cropped: the network takes others not, or not to their last pixel"
    )


def _say_region(plan: PlanDecisions) -> str:
    y, x, height, width = plan.region
    is_whole = plan.region == (0, 0, *plan.raster_shape[1:])
    return "" if is_whole else f"{height} x {width} px from row {y}, column {x}"


def _say_output(plan: PlanDecisions) -> str:
    channels, height, width = plan.output_shape
    return f"{height} x {width} px, {channels} x {plan.output_dtype}, chunks {plan.chunk[0]} x {plan.chunk[1]}"


def _say_halo(plan: PlanDecisions) -> str:
    source = "derived from the traced graph" if plan.is_known else "as stated, not derived"
    reach = (
        "each operation computes only the pixels that a core needs"
        if plan.method == "program"
        else f"windows start on a stride of {_pair(plan.stride)} px"
    )
    return f"{plan.halo}, {source}; {reach}"


def _say_tiles(plan: PlanDecisions) -> str:
    rows, columns = plan.grid.counts
    window_h, window_w = plan.largest_window
    kinds = _count(plan.geometries, "program" if plan.method == "program" else "window shape")
    return (
        f"{rows * columns} ({rows} x {columns}), core {_pair(plan.core)}, largest window {window_h} x {window_w}, "
        f"{kinds}"
    )


def _say_overhead(plan: PlanDecisions) -> str:
    done = "work" if plan.method == "program" else "pixels computed"
    return f"{100 * (plan.overlap - 1):.1f} % more {done} than wanted; blocks read {plan.read_amplification:.2f} x"


def _say_reading(plan: PlanDecisions) -> str:
    if plan.read_amplification <= MUCH_READ or plan.block == (0, 0):
        return ""
    fewer = ", fewer --workers (they share no blocks)" if plan.workers > 1 else ""
    return (
        f"blocks of {plan.block[0]} x {plan.block[1]} px are decoded up to {plan.read_amplification:.1f} times; to "
        f"decode them about once: more --memory{fewer}, or `outsize ingest` first, which stores squares of 512 px"
    )


def _say_engine(plan: PlanDecisions) -> str:
    compiled = ", compiled," if plan.compiles else ""
    numbers = plan.numbers if plan.precision == "float32" else plan.precision
    processes = _count(plan.workers, "worker process", "es")
    reason = f": {plan.engine_reason}" if plan.engine_reason else ""
    return (
        f"{plan.engine}{compiled} in {numbers} on {_name_device(plan)}, {processes} x {_count(plan.threads, 'thread')}"
        f", {plan.in_flight} tiles in flight each{reason}"
    )


def _name_device(plan: PlanDecisions) -> str:
    """Where the engine runs: cpu, cuda:1 (NAME), cuda (2 x NAME)."""
    if not plan.device_names:
        return plan.device
    names = [f"{plan.device_names.count(name)} x {name}" for name in dict.fromkeys(plan.device_names)]
    return f"{plan.device} ({', '.join(names)})"


def _say_precision(plan: PlanDecisions) -> str:
    if plan.precision != "int8":
        return ""
    return (
        "int8: ranges fixed once on windows of this raster; tiles equal the whole image under that network, and its "
        "loss against float32 is measured"
    )


def _say_memory(plan: PlanDecisions) -> str:
    memory = plan.memory
    return (
        f"{format_bytes(memory.total_bytes)} predicted peak of all processes, budget "
        f"{format_bytes(plan.memory_budget_bytes)} (client {format_bytes(memory.client_bytes)}, workers "
        f"{format_bytes(memory.worker_bytes)}, programs {format_bytes(memory.program_bytes)}, buffers "
        f"{format_bytes(memory.buffer_bytes)})"
    )


def _say_device(plan: PlanDecisions) -> str:
    if not plan.device_names:
        return ""
    together = f"batches of {plan.batch} windows" if plan.batch > 1 else "one window at a time"
    return (
        f"{format_bytes(plan.device_bytes)} predicted peak on each device, budget "
        f"{format_bytes(plan.device_budget_bytes)}, {together}"
    )


def _say_context(plan: PlanDecisions) -> str:
    if plan.receptive is None:
        return ""
    return "pixels whose receptive field touches nodata are marked in nodata_context"


def _say_work(plan: PlanDecisions) -> str:
    wanted = plan.region[2] * plan.region[3]
    return f"{plan.flops / 1e12:.3g} TFLOP, {plan.flops_bare / wanted / 1e3:.1f} kFLOP a pixel"


def _say_time(plan: PlanDecisions, flops_per_s: float | None) -> str:
    if not flops_per_s:
        return ""
    return (
        f"about {format_seconds(plan.estimate_s(flops_per_s))} and start-up (matrix product here: "
        f"{flops_per_s / 1e9:.0f} GFLOP/s)"
    )


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}" if values[0] == values[1] else f"{values[0]} x {values[1]}"
