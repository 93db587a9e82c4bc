"""The execution of an assignment on workers: start check, then all tiles, each recorded as it ends."""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from distributed import Client

from ..base.dtypes import output_nodata
from ..cluster.backdrop import draw_backdrop
from ..cluster.dashboard import Watch
from ..cluster.schedule import Lost, count_threads, job_on, run_cells
from ..cluster.tile_map import backdrop_message, begin_message, tile_message
from ..engines.precision_loss import PrecisionLoss
from ..output.fingerprint import MIXED
from ..output.records import RunFolder
from ..output.resume import SourceChangedError, SourceGuard
from ..output.store import (
    CONTEXT,
    FAILED,
    NODATA,
    create_output,
    open_array,
    update_header,
    write_core,
    write_status,
)
from ..output.tile_record import TileRecord
from ..output.tile_states import TileStates
from ..planning.plan import TilePlan
from ..rasters.parts import reference_to
from ..system.files import remove_store
from ..system.logs import log
from ..system.machine import find_versions, release_freed_memory
from ..system.meter import MemoryMeter
from .assignment import Assignment
from .check import StartCheck, require_exact
from .conversion import Converted, load_autocast, tell_loss
from .events import ClusterReady, Listener, StartChecked, TileFinished
from .reference import ComputedPatch
from .start_check import run_start_check
from .worker import RunSpec
from .workers import compare_workers, find_dashboard, find_device_peak

SYNC_EVERY_S = 2
"""Seconds after which records of tiles are on the disk at the latest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Where a run's tiles are entered as they end: in the records, in their states, and with whoever listens."""

    folder: RunFolder
    states: TileStates
    guard: SourceGuard
    meter: MemoryMeter
    tell: Listener


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What became of an execution."""

    began: float
    """`time.perf_counter()` when workers were there, and when the last tile was written."""
    ended: float
    check: StartCheck
    loss: PrecisionLoss | None
    device_peak_bytes: int


def execute(
    client: Client,
    assignment: Assignment,
    converted: Converted,
    todo: npt.NDArray[np.bool_],
    ledger: Ledger,
    *,
    patience: float,
    tile_map: bool,
) -> Executed:
    """Start check, then all tiles of `todo` (down, across).

    Raises:
        TilerError: the start check failed, or the source changed while it was read.
    """
    release_freed_memory()  # of the conversion, before the start check needs as much
    spec = _make_spec(assignment, converted, ledger.folder)
    with job_on(client, spec, _begin_message(spec, assignment, todo) if tile_map else None) as watch:
        _tell_ready(client, assignment.plan, watch, ledger.tell)
        began = time.perf_counter()
        try:
            with _backdrop(watch, spec.run_id, assignment):
                check, loss = _check_start(client, spec, assignment, converted, ledger.tell)
                if assignment.begins:
                    # Only now: an output that is replaced is lost to no run that could not start.
                    _create(assignment, converted, ledger.folder)
                precision_loss = {"precision_loss": loss.to_json()} if loss else {}
                update_header(assignment.out, {"start_check": check.to_json(), **precision_loss})
                _run_tiles(client, spec, todo, watch, ledger, began, patience)
                ended = time.perf_counter()
                peak = find_device_peak(client, spec.run_id) if assignment.plan.device != "cpu" else 0
                ledger.folder.sync()
                ledger.guard.require()
        except SourceChangedError:
            # Nor may the output be continued when the old file is put back.
            mixed = {**assignment.fingerprint, **converted.fingerprint, "input": MIXED}
            update_header(assignment.out, {"fingerprint": mixed})
            raise
    return Executed(began=began, ended=ended, check=check, loss=loss, device_peak_bytes=peak)


def finish_output(assignment: Assignment, states: TileStates) -> None:
    """Give failed tiles their nodata, and write the tiles' states."""
    plan, out = assignment.plan, assignment.out
    array = open_array(out, assignment.description.kind, "r+")
    dtype = np.dtype(plan.output_dtype)
    for row, column in np.argwhere(states.status == FAILED):
        core = plan.grid.window(int(row), int(column))
        write_core(array, core, np.full((plan.output_shape[0], *core.shape), output_nodata(dtype), dtype))
        if plan.receptive is not None:
            write_core(open_array(out, CONTEXT, "r+"), core, np.full((1, *core.shape), NODATA, np.uint8))
    write_status(out, states.status)


def _make_spec(assignment: Assignment, converted: Converted, folder: RunFolder) -> RunSpec:
    return RunSpec(
        run_id=uuid.uuid4().hex[:8],
        raster=assignment.raster.made_absolute(),
        plan=assignment.plan,
        program=converted.program,
        fill=assignment.fill,
        out=str(assignment.out),
        array=assignment.description.kind,
        zarr_format=assignment.zarr_format,
        generation=folder.generation,
    )


def _begin_message(spec: RunSpec, assignment: Assignment, todo: npt.NDArray[np.bool_]) -> dict[str, Any]:
    plan = assignment.plan
    return begin_message(
        run=spec.run_id,
        title=f"segment {assignment.out.name}",
        shape=plan.output_shape[1:],
        core=plan.core,
        counts=plan.grid.counts,
        kept=~todo,
    )


def _tell_ready(client: Client, plan: TilePlan, watch: Watch, tell: Listener) -> None:
    link = find_dashboard(client, with_map=watch.is_on)
    threads = count_threads(client)
    unplanned = compare_workers(plan, list(threads.values()))
    if unplanned:
        log.warning("%s", unplanned)
    tell(ClusterReady(workers=len(threads), dashboard=link, unplanned=unplanned))


def _check_start(
    client: Client, spec: RunSpec, assignment: Assignment, converted: Converted, tell: Listener
) -> tuple[StartCheck, PrecisionLoss | None]:
    """(the start check, passed; what few bits cost).

    Raises:
        ExactnessError: tiles differ from the reference.
    """
    converted, plan = load_autocast(converted), assignment.plan
    reference, losses = assignment.reference(converted.engine), [converted.loss]

    def measure(patches: list[ComputedPatch]) -> None:
        losses.append(assignment.reference(converted.engine).measure_tiles(patches))
        tell_loss(losses[-1], tell)

    measures = plan.engine == "torch" and plan.precision != "float32"
    check = run_start_check(client, spec, reference, measure if measures else None)
    log.info("start check: %s", check.sentence())
    tell(StartChecked(check=check))
    require_exact(check)
    return check, losses[-1]


def _run_tiles(
    client: Client,
    spec: RunSpec,
    todo: npt.NDArray[np.bool_],
    watch: Watch,
    ledger: Ledger,
    began: float,
    patience: float,
) -> None:
    pixels, synced, total = 0, time.monotonic(), int(todo.sum())
    plan, folder, states = spec.plan, ledger.folder, ledger.states
    cells = (at for at in plan.order() if todo[at])
    for (row, column), outcome in run_cells(client, spec, cells, "tile", patience=patience, cell_s=plan.slow_tile_s):
        record = outcome
        if isinstance(outcome, Lost):
            record = TileRecord.failure(row, column, plan.grid.window(row, column).pixels, outcome.reason)
            watch.tell(tile_message(spec.run_id, (row, column), "failed", error=outcome.reason))
        ledger.guard.look()
        if record.state == "failed":
            ledger.guard.require()
            log.error("tile %d,%d failed: %s", record.row, record.column, record.error)
        folder.append(record)
        states.add(record)
        pixels += record.pixels
        if time.monotonic() - synced > SYNC_EVERY_S:
            folder.sync()
            synced = time.monotonic()
        ledger.tell(
            TileFinished(
                record=record,
                finished=states.ended,
                total=total,
                pixels=pixels,
                elapsed_s=time.perf_counter() - began,
                memory_bytes=ledger.meter.current_bytes,
            )
        )


def _backdrop(watch: Watch, run_id: str, assignment: Assignment) -> contextlib.AbstractContextManager[None]:
    """Draws the picture under the tile map while this is open; of a network that shrinks, none."""
    if not watch.is_on or assignment.plan.scale != ("1", "1"):
        return contextlib.nullcontext()
    area = assignment.plan.wanted_region
    return draw_backdrop(assignment.raster, area, lambda grey: watch.tell(backdrop_message(run_id, grey)))


def _create(assignment: Assignment, converted: Converted, folder: RunFolder) -> None:
    folder.require()
    with folder.making():
        remove_store(assignment.out)
        folder.clear()
        if converted.quantised is not None:
            converted.quantised.write(folder.path)
        create_output(
            assignment.out,
            plan=assignment.plan,
            description=assignment.description,
            place=assignment.raster.place,
            header={
                "fingerprint": assignment.fingerprint | converted.fingerprint,
                "source": reference_to(assignment.raster),
                "versions": find_versions(),
            },
            zarr_format=assignment.zarr_format,
        )
