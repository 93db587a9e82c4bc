"""The planner: chooses tiles, engine and workers for a raster, a network and a memory budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

from torch import nn

from ..analysis.network import Network
from ..base.errors import BudgetError, UsageError
from ..base.memory import MemoryPrediction
from ..base.text import MB, format_bytes
from ..engines.devices import MachineFacts
from ..engines.memory import MemoryLookup, constant_memory
from ..rasters.reading import MUCH_READ
from .candidates import CORES, MOST_TILES, find_candidates
from .options import PlanKeywords, PlanOptions
from .plan import TilePlan
from .resolved import Resolved, resolve_options

MOST_WORK = 1.15
"""Of smaller cores that read less, relative to the largest ones: what more halo costs them."""


def plan_tiles(
    raster: Any,
    network: Network | nn.Module,
    options: PlanOptions | None = None,
    *,
    to_store: bool = False,
    dashboard: bool = False,
    memory_of: MemoryLookup = constant_memory,
    facts: MachineFacts | None = None,
    **keywords: Unpack[PlanKeywords],
) -> TilePlan:
    """Decide how to run a network over a raster within a memory budget.

    Args:
        raster: an open raster, whatever `open_raster` takes, or a shape (bands, height, width).
        network: analysed, or a module, which is then analysed for the raster's pixels.
        options: what is chosen already; None: nothing.
        to_store: the output is in an object store.
        dashboard: the planning process serves Dask's dashboard too.
        memory_of: what (engine, method, precision, threads, device) add to the network's tensors; `memory_lookup`
            measures it.
        facts: what engines and devices there are; None: those of this machine.
        keywords: fields of `PlanOptions`, such as memory="2GB", in place of those of `options`.

    Raises:
        UsageError: another number or kind of bands than the network takes; options below 1; a region outside.
        EngineError: the engine is not installed, or does not compute in that precision; no such device.
        BudgetError: no core fits the budget; names the smallest budget that can be kept.
    """
    resolved = resolve_options(raster, network, replace(options or PlanOptions(), **keywords), facts)
    first: TilePlan | None = None
    best: TilePlan | None = None
    least: MemoryPrediction | None = None
    least_device = 0
    for candidate in find_candidates(resolved, memory_of, to_store=to_store, dashboard=dashboard):
        least, least_device, plan = candidate.least, candidate.least_device_bytes, candidate.plan
        if plan is None:
            continue
        first = first or plan
        if plan.flops > MOST_WORK * first.flops:
            break
        # Smaller cores where the largest leave no room for the blocks that they share.
        if best is None or plan.read_amplification < best.read_amplification / MUCH_READ:
            best = plan
        if best.read_amplification <= MUCH_READ:
            break
    return best or _refuse(resolved, least, least_device)


def _refuse(resolved: Resolved, least: MemoryPrediction | None, least_device: int) -> TilePlan:
    """Say which budget would do, where none of the cores fits.

    Raises:
        UsageError: no core is large enough for the raster.
        BudgetError: always, else.
    """
    core, (_, height, width) = resolved.options.core or CORES[-1], resolved.shape
    if least is None:
        raise UsageError(
            f"a raster of {height} x {width} px has more than {MOST_TILES} tiles along one side; give a --region"
        )
    if least_device > resolved.device_budget_bytes:
        raise BudgetError(
            f"device memory must be at least {format_bytes(least_device + 0.5 * MB)} for this network (core "
            f"{core}), got {format_bytes(resolved.device_budget_bytes)} on each device; free the device, raise "
            "--device-memory, or use --device cpu"
        )
    needed, budget, raster = format_bytes(least.total_bytes + 0.5 * MB), resolved.budget_bytes, resolved.raster
    if raster is not None and raster.block_bytes > budget // 4:
        raise BudgetError(
            f"memory must be at least {needed}: one block of {raster.path} is "
            f"{raster.block[0]} x {raster.block[1]} px and {format_bytes(raster.block_bytes)}, got "
            f"{format_bytes(budget)}; raise --memory, or rewrite the file in tiles"
        )
    raise BudgetError(
        f"memory must be at least {needed} for this network with "
        f"{resolved.workers} worker{'s' if resolved.workers != 1 else ''} (core {core}), got {format_bytes(budget)}; "
        "raise --memory, or use fewer workers"
    )
