"""A whole raster through a network: prepare, convert, check, run, finish."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Unpack

from distributed import Client
from torch import nn

from ..analysis.network import Network
from ..cluster.client import ClusterKeeper, ClusterOptions
from ..output.options import WriteOptions
from ..output.records import RunFolder, writing
from ..output.resume import SourceGuard
from ..output.store import OutputDescription, update_header
from ..output.tile_states import TileStates
from ..planning.options import PlanOptions
from ..rasters.parts import count_pixel_bytes
from ..system.logs import log
from ..system.machine import find_versions, spare_lost_threads
from ..system.meter import MemoryMeter
from ..system.places import place_of, require_lasting
from .assignment import Assignment, begin_or_continue, prepare_assignment
from .conversion import begin_conversion
from .events import Listener, RunPlanned
from .execution import Executed, Ledger, execute, finish_output
from .request import RunKeywords, RunRequest, ignore, split_keywords
from .summary import RunSummary
from .workers import open_workers


def predict(
    raster: Any,
    network: Network | nn.Module,
    out: str | Path,
    *,
    planning: PlanOptions | None = None,
    writing: WriteOptions | None = None,
    description: OutputDescription | None = None,
    fill: tuple[float, ...] | None = None,
    client: Client | None = None,
    cluster: ClusterOptions | ClusterKeeper | None = None,
    tile_map: bool = True,
    listener: Listener | None = None,
    **keywords: Unpack[RunKeywords],
) -> RunSummary:
    """Run a network over a whole raster, tile by tile on Dask, into a Zarr store of output format 1.

    Guarantee: every pixel equals the module's on the whole raster up to floating-point rounding, which a start check
    confirms on sampled tiles before anything is written; nodata in, nodata out. The same call continues a run that was
    interrupted.

    Args:
        raster: an open one, or whatever `open_raster` takes: a path, an array.
        network: analysed, or a module, which is then analysed for the raster's pixels.
        planning: what of the plan is chosen already: memory, engine, core, region, ...; None: nothing.
        writing: how the output is treated: resume, overwrite, retry_failed, ...; None: as the defaults say.
        description: what the output means; None: told from the network's output dtype and channels.
        fill: raw value of each band that stands in for nodata; None: 0.
        client: a Dask client to use; None: one is opened as `cluster` says.
        tile_map: show the run on the page /tilemap of the Dask dashboard.
        listener: called with every event.
        keywords: fields of `PlanOptions` and `WriteOptions`, such as memory="2GB" or overwrite=True, in place of those
            of `planning` and `writing`.

    Returns:
        What was done, with failed tiles listed. Failed tiles hold nodata.

    Raises:
        TilerError: its subclasses say what: raster, budget, output, engine, start check.
        TypeError: a keyword that is no option.
    """
    planning, writing = split_keywords(keywords, planning, writing)
    request = RunRequest(
        planning=planning,
        writing=writing,
        description=description,
        fill=fill,
        client=client,
        cluster=cluster or ClusterOptions(),
        tile_map=tile_map,
        listener=listener or ignore,
    )
    return run_raster(raster, network, out, request)


def run_raster(raster: Any, network: Network | nn.Module, out: str | Path, request: RunRequest) -> RunSummary:
    """`predict`, with all that is asked of it in one value.

    Raises:
        TilerError: as `predict`.
    """
    called = time.perf_counter() if request.since is None else request.since
    if request.client is None:
        request.cluster_options.require_startable()
    spare_lost_threads()
    out = place_of(out).absolute()
    require_lasting(out)
    with MemoryMeter() as meter:
        assignment = prepare_assignment(raster, network, out, request)
        with writing(out), RunFolder(out) as folder:
            return _run(assignment, folder, request, meter, called)


def _run(
    assignment: Assignment, folder: RunFolder, request: RunRequest, meter: MemoryMeter, called: float
) -> RunSummary:
    assignment, kept, ignored = begin_or_continue(assignment, folder, request)
    plan, tell = assignment.plan, request.listener
    folder.result = {"versions": find_versions(), "plan": plan.summarise()}
    states, resumed = TileStates(plan, kept), len(kept)
    del kept
    todo = states.find_missing(None if request.scope.rest else request.scope.redo)
    count = int(todo.sum())
    died = str(folder.before) if folder.before is not None and not folder.before.ended else None
    tell(RunPlanned(plan=plan, resumed=resumed, pixels=plan.grid.count_pixels(todo), died=died, ignored=ignored))
    executed = None
    if count:
        guard = SourceGuard(assignment.raster, "segment --overwrite begins anew")
        ledger = Ledger(folder=folder, states=states, guard=guard, meter=meter, tell=tell)
        converting = begin_conversion(assignment, folder.path, tell)
        with open_workers(request.client, request.cluster, plan) as connected:
            executed = execute(
                connected,
                assignment,
                converting.result(),
                todo,
                ledger,
                patience=request.writing.patience,
                tile_map=request.shows_map,
            )
    folder.require()
    is_whole = resumed + states.ended == len(plan.grid)
    if is_whole:
        finish_output(assignment, states)
    summary = _summarise(assignment, states, executed, meter, called, tiles=count, resumed=resumed)
    folder.result["summary"] = summary.to_json()
    if count and is_whole:
        update_header(assignment.out, {"run": summary.to_json()})
    log.info("finished: %s", summary.to_json())
    return summary


def _summarise(
    assignment: Assignment,
    states: TileStates,
    executed: Executed | None,
    meter: MemoryMeter,
    called: float,
    *,
    tiles: int,
    resumed: int,
) -> RunSummary:
    plan, pixel_bytes = assignment.plan, count_pixel_bytes(assignment.raster)
    began = executed.began if executed else time.perf_counter()
    seconds = executed.ended - began if executed else 0.0
    return RunSummary(
        out=str(assignment.out),
        pixels=states.pixels,
        startup_s=began - called,
        seconds=seconds,
        mpx_per_s=states.pixels / seconds / 1e6 if seconds else 0.0,
        peak_bytes=max(meter.peak_bytes, meter.current_bytes),
        predicted_peak_bytes=plan.memory.total_bytes,
        tiles=tiles,
        resumed_tiles=resumed,
        failed_tiles=states.failed,
        start_check=executed.check if executed else None,
        read_amplification=states.relate(states.decoded_bytes, pixel_bytes),
        check_read_amplification=states.relate(states.checked_bytes, pixel_bytes) or 0.0,
        predicted_read_amplification=plan.read_amplification,
        undeclared_pixels=states.undeclared_pixels,
        not_finite_pixels=states.not_finite_pixels,
        engine=plan.engine,
        precision=plan.precision,
        loss=executed.loss if executed else None,
        device=plan.device,
        device_peak_bytes=executed.device_peak_bytes if executed else 0,
        predicted_device_peak_bytes=plan.device_bytes,
    )
