"""A whole raster through a network: plan, check, run, finish."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from distributed import Client
from torch import nn

from ..analysis.network import Network, as_network
from ..analysis.weights import require_current
from ..base.dtypes import output_nodata, stored_dtype
from ..base.errors import DamagedError, OutputError, UsageError
from ..base.geometry import Interval, Window
from ..base.memory import CUDA_CONTEXT_BYTES, find_budget
from ..cluster.backdrop import draw_backdrop
from ..cluster.client import ClusterKeeper, ClusterOptions
from ..cluster.dashboard import Watch
from ..cluster.schedule import Lost, count_threads, job_on, run_cells
from ..cluster.tile_map import backdrop_message, begin_message, tile_message
from ..engines.engine import Engine, EngineProgram
from ..engines.loading import compile_program, load_windows
from ..engines.precision_loss import PrecisionLoss
from ..engines.programs import pack_programs
from ..engines.quantise import QuantisedNetwork, quantise_network, require_quantiser
from ..engines.torch import AUTOCAST, load_reference
from ..output.fingerprint import MIXED, make_fingerprint, state_before
from ..output.records import RunFolder, is_there, writing
from ..output.resume import (
    Kept,
    SourceChangedError,
    SourceGuard,
    ignored_options,
    is_unfinished,
    keep_tiles,
    require_continuable,
)
from ..output.store import (
    CONTEXT,
    FAILED,
    NODATA,
    OutputDescription,
    ZarrFormat,
    create_output,
    open_array,
    read_header,
    require_space,
    update_header,
    write_core,
    write_status,
)
from ..output.tile_record import TileRecord
from ..output.tile_states import TileStates
from ..planning.plan import TilePlan
from ..planning.planner import plan_tiles
from ..rasters.bands import match_network
from ..rasters.opening import as_raster
from ..rasters.parts import count_pixel_bytes, reference_to
from ..rasters.raster import Raster, fill_values, require_apart
from ..system.files import remove_store
from ..system.logs import log
from ..system.machine import find_versions, release_freed_memory, spare_lost_threads
from ..system.meter import MemoryMeter
from ..system.places import is_remote, place_of, require_lasting
from .calibration import read_calibration
from .check import StartCheck, require_exact
from .events import (
    Calibrating,
    ClusterReady,
    Event,
    Listener,
    LossMeasured,
    MemoryProbed,
    ProgramsMade,
    RunPlanned,
    StartChecked,
    TileFinished,
)
from .memory_probe import memory_lookup
from .reference import ComputedPatch, Reference
from .start_check import run_start_check
from .summary import RunSummary
from .worker import RunSpec
from .workers import compare_workers, find_dashboard, find_device_peak, open_workers

Array = npt.NDArray[Any]


def _default_description(network: Network) -> OutputDescription:
    dtype = stored_dtype(network.output_dtype)
    if dtype.kind == "f":
        return OutputDescription(kind="logits")
    if network.channels == 1:
        return OutputDescription(kind="class")
    if str(network.output_dtype) != "torch.uint8":
        raise UsageError(
            f"the network's output must be class numbers in one channel, uint8 or floating, got {dtype} in "
            f"{network.channels} channels; end it with .to(torch.uint8)"
        )
    return OutputDescription(kind="probability")


def predict(
    raster: Any,
    network: Network | nn.Module,
    out: str | Path,
    *,
    description: OutputDescription | None = None,
    fill: tuple[float, ...] | None = None,
    client: Client | None = None,
    cluster: ClusterOptions | ClusterKeeper | None = None,
    memory: str | int | None = None,
    engine: str | None = None,
    device: str | None = None,
    device_memory: str | int | None = None,
    batch: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    core: int | None = None,
    region: Window | None = None,
    mark_nodata_context: bool = False,
    zarr_format: ZarrFormat = 3,
    method: str | None = None,
    precision: str | None = None,
    compiles: bool = False,
    space_check: bool = True,
    resume: bool = True,
    overwrite: bool = False,
    retry_failed: bool = False,
    source_unchanged: bool = False,
    redo: Collection[tuple[int, int]] = (),
    rest: bool = True,
    patience: float = 300.0,
    tile_map: bool = True,
    listener: Listener | None = None,
    since: float | None = None,
) -> RunSummary:
    """Run a network over a whole raster, tile by tile on Dask, into a Zarr store of output format 1.

    Guarantee: every pixel equals the module's on the whole raster up to floating-point rounding, which a start check
    confirms on sampled tiles before anything is written; nodata in, nodata out. The same call continues a run that was
    interrupted.

    Args:
        raster: an open one, or whatever `open_raster` takes: a path, an array.
        network: analysed, or a module, which is then analysed for the raster's pixels.
        description: what the output means; None: told from the network's output dtype and channels.
        fill: raw value of each band that stands in for nodata; None: 0.
        client: a Dask client to use; None: one is opened as `cluster` says.
        memory: budget of all processes together; None: 2 GB, and 2 GB more for each CUDA device. `plan_tiles` has the
            other planning options.
        region: what is wanted, in pixels of the raster; None: all of it. Context comes from beyond it.
        mark_nodata_context: also write an array `nodata_context`: 1 where a pixel's receptive field touches nodata.
        method: "window" or "program"; None: windows where they are exact.
        precision: what the engine computes in; None: float32.
        compiles: run torch's windows by torch.compile.
        zarr_format: 3, or 2 for readers that know no other, such as GDAL before 3.12.
        space_check: refuse an output that might not fit on the disk.
        resume: continue an output whose fingerprint agrees; False: refuse an existing output.
        overwrite: replace an existing output.
        retry_failed: also do tiles again that failed in an earlier call; they hold nodata otherwise.
        source_unchanged: the caller vouches that files that were replaced or written to since, with their size and time
            of change as before, hold what they held: a copy that was put back.
        redo: (row, column) of tiles to do again, done or not.
        rest: also do what no call has done yet; False: only `redo`, and an unfinished output stays so.
        patience: seconds before a worker that does not answer is restarted, and its tile set aside; more where tiles
            take long.
        tile_map: show the run on the page /tilemap of the Dask dashboard.
        listener: called with every event.
        since: `time.perf_counter()` from which start-up is counted; None: this call.

    Returns:
        What was done, with failed tiles listed. Failed tiles hold nodata.

    Raises:
        TilerError: its subclasses say what: raster, budget, output, engine, start check.
    """
    called = time.perf_counter() if since is None else since
    cluster = cluster or ClusterOptions()
    options = cluster.options if isinstance(cluster, ClusterKeeper) else cluster
    if client is None:
        options.require_startable()
    spare_lost_threads()
    tell: Listener = listener or _ignore
    out = place_of(out).absolute()
    require_lasting(out)
    with MemoryMeter() as meter:
        raster = match_network(as_raster(raster), network)
        network = as_network(network, raster.bands, raster.dtype)
        filling: tuple[float, ...] = (0.0,) * raster.bands if fill is None else fill
        fill_values(filling, raster)  # refused before anything is begun
        require_current(network)
        description = description or _default_description(network)
        plan = plan_tiles(
            raster,
            network,
            memory=memory,
            engine=engine,
            device=device,
            device_memory=device_memory,
            batch=batch,
            workers=workers,
            threads=threads,
            core=core,
            region=region,
            mark_nodata_context=mark_nodata_context,
            method=method,
            precision=precision,
            compiles=compiles,
            to_store=is_remote(out),
            dashboard=client is None and options.serves_dashboard,
            memory_of=memory_lookup(network, raster.shape_yx, find_budget(memory), lambda: tell(MemoryProbed())),
        )
        fingerprint = make_fingerprint(raster, network, description, plan, filling, zarr_format)
        require_apart(raster, out)
        with writing(out):
            if out.is_symlink():
                raise OutputError(f"{out} is a link; name the store itself")
            if is_there(out):
                # A folder that is not ours is neither continued nor overwritten, nor given neighbours.
                try:
                    header = read_header(out)
                except DamagedError:
                    if not overwrite:
                        raise
                else:
                    fingerprint |= _quantised_before(header, plan)
                    if source_unchanged:
                        fingerprint |= state_before(header)
        with writing(out), RunFolder(out) as folder:
            kept: Kept = {}
            ignored = ""
            # An unfinished output of this very run is continued, also where a finished one would be replaced.
            begins = not is_there(out) or (overwrite and not is_unfinished(out, fingerprint))
            if begins:
                require_space(out, plan.output_bytes, "the output", check=space_check)
                if plan.precision == "int8":
                    require_quantiser()
            else:
                paths = reference_to(raster)["paths"]
                remedy = "--overwrite" if rest else "segment --overwrite"
                plan = require_continuable(out, fingerprint, plan, paths=paths, resume=resume, core=core, remedy=remedy)
                ignored = ignored_options(plan, workers, threads)
                kept = keep_tiles(
                    out, plan, description.kind, folder, zarr_format, retry_failed=retry_failed, redo=redo
                )
            folder.result = {"versions": find_versions(), "plan": plan.summarise()}
            states, resumed = TileStates(plan, kept), len(kept)
            del kept
            todo = states.find_missing(None if rest else redo)
            count = int(todo.sum())
            tell(
                RunPlanned(
                    plan=plan,
                    resumed=resumed,
                    pixels=plan.grid.count_pixels(todo),
                    died=str(folder.before) if folder.before is not None and not folder.before.ended else None,
                    ignored=ignored,
                )
            )
            run = _Run(
                raster=raster,
                network=network,
                plan=plan,
                description=description,
                fill=filling,
                fingerprint=fingerprint,
                out=out,
                begins=begins,
                zarr_format=zarr_format,
                folder=folder,
                states=states,
                meter=meter,
                tell=tell,
                patience=patience,
                tile_map=tile_map and (client is not None or options.dashboard_address is not None),
            )
            if count:
                run.convert()
                with open_workers(client, cluster, plan) as connected:
                    run.execute(connected, todo)
            folder.require()
            is_whole = resumed + states.ended == len(plan.grid)
            if is_whole:
                run.finish()
            began, pixels = run.began or time.perf_counter(), states.pixels
            seconds = (run.ended or began) - began
            peak = max(meter.peak_bytes, meter.current_bytes)
            summary = RunSummary(
                out=str(out),
                pixels=pixels,
                startup_s=began - called,
                seconds=seconds,
                mpx_per_s=pixels / seconds / 1e6 if seconds else 0.0,
                peak_bytes=peak,
                predicted_peak_bytes=plan.memory.total_bytes,
                tiles=count,
                resumed_tiles=resumed,
                failed_tiles=states.failed,
                start_check=run.check,
                read_amplification=states.relate(states.decoded_bytes, count_pixel_bytes(raster)),
                check_read_amplification=states.relate(states.checked_bytes, count_pixel_bytes(raster)) or 0.0,
                predicted_read_amplification=plan.read_amplification,
                undeclared_pixels=states.undeclared_pixels,
                not_finite_pixels=states.not_finite_pixels,
                engine=plan.engine,
                precision=plan.precision,
                loss=run.loss,
                device=plan.device,
                device_peak_bytes=run.device_peak_bytes,
                predicted_device_peak_bytes=plan.device_bytes,
            )
            folder.result["summary"] = summary.to_json()
            if count and is_whole:
                update_header(out, {"run": summary.to_json()})
            log.info("finished: %s", summary.to_json())
    return summary


def _quantised_before(header: dict[str, Any], plan: TilePlan) -> dict[str, Any]:
    """Which network in int8 an output was begun with: the only one that may continue it."""
    digest = header.get("fingerprint", {}).get("quantised")
    return {"quantised": digest} if plan.precision == "int8" and digest else {}


class _Run:
    """One call's run: the states of its tiles, its clock."""

    def __init__(
        self,
        *,
        raster: Raster,
        network: Network,
        plan: TilePlan,
        description: OutputDescription,
        fill: tuple[float, ...],
        fingerprint: dict[str, Any],
        out: Path,
        begins: bool,
        zarr_format: ZarrFormat,
        folder: RunFolder,
        states: TileStates,
        meter: MemoryMeter,
        tell: Listener,
        patience: float,
        tile_map: bool,
    ) -> None:
        self.raster, self.network, self.plan, self.description = raster, network, plan, description
        self.fill, self.fingerprint, self.out, self.folder = fill, fingerprint, out, folder
        self.meter, self.tell, self.patience, self.tile_map = meter, tell, patience, tile_map
        self.begins = begins
        self.guard = SourceGuard(raster, "segment --overwrite begins anew")
        self.zarr_format: ZarrFormat = zarr_format
        self.states = states
        self.check: StartCheck | None = None
        self.loss: PrecisionLoss | None = None
        self._quantised: QuantisedNetwork | None = None
        self._engine: Engine | None = None
        """Of a network in few bits, in this process: the start check's reference."""
        self.began: float | None = None
        self.ended: float | None = None
        self.device_peak_bytes = 0
        self._program: Future[EngineProgram] | None = None

    def convert(self) -> None:
        """Begin to convert the network for the engine, while workers start."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="convert")
        plan = self.plan
        if plan.precision == "int8":
            self._program = pool.submit(self._quantise)
        elif plan.method == "window":
            self._program = pool.submit(compile_program, self.network, plan.engine, plan.threads, plan.precision)
        else:
            rows, columns = (
                [Interval(start=span.core[0], stop=span.core[1]) for span in spans]
                for spans in (plan.rows, plan.columns)
            )
            self._program = pool.submit(
                pack_programs,
                self.network,
                plan.engine,
                plan.threads,
                self.raster.shape_yx,
                rows,
                columns,
                self._report,
                plan.precision,
            )
        pool.shutdown(wait=False)

    def _quantise(self) -> EngineProgram:
        """The network in int8: of the output that is continued, or made now; with its loss."""
        plan, held_out = self.plan, None
        if self.begins:
            y, x, height, width = plan.region
            found = read_calibration(self.raster, self.network, Window(y=y, x=x, height=height, width=width), self.fill)
            self.tell(Calibrating(windows=len(found.calibrated)))
            images = [sample.image for sample in found.calibrated]
            self._quantised, held_out = quantise_network(self.network, images, plan.threads), found.held_out
            self.fingerprint["quantised"] = self._quantised.digest
        else:
            self._quantised = QuantisedNetwork.read(self.folder.path, self.fingerprint["quantised"])
        program = self._quantised.pack(self.network, plan.threads)
        self._engine = load_windows(program)
        if held_out is not None:
            self.loss = self._reference().measure_loss(held_out)
        else:
            stored = read_header(self.out).get("precision_loss")
            self.loss = PrecisionLoss.from_json(stored) if stored else None
        self._tell_loss()
        return program

    def _measure_loss(self, patches: list[ComputedPatch]) -> None:
        self.loss = self._reference().measure_tiles(patches)
        self._tell_loss()

    def _tell_loss(self) -> None:
        if self.loss is not None:
            log.info("loss: %s", self.loss.sentence())
            self.tell(LossMeasured(loss=self.loss))

    def _reference(self) -> Reference:
        return Reference(raster=self.raster, plan=self.plan, network=self.network, fill=self.fill, engine=self._engine)

    def _report(self, made: int, total: int) -> None:
        self.tell(ProgramsMade(made=made, total=total))

    def execute(self, client: Client, todo: npt.NDArray[np.bool_]) -> None:
        """Start check, then all tiles of `todo` (down, across)."""
        run_id = uuid.uuid4().hex[:8]
        assert self._program is not None
        plan, converted = self.plan, self._program.result()
        release_freed_memory()  # of the conversion, before the start check needs as much
        program = replace(
            converted,
            device=plan.device,
            device_limit_bytes=max(0, plan.device_budget_bytes - CUDA_CONTEXT_BYTES),
            batch=plan.batch,
            with_logits=plan.with_logits,
            compiles=plan.compiles,
        )
        spec = RunSpec(
            run_id=run_id,
            raster=self.raster.made_absolute(),
            plan=self.plan,
            program=program,
            fill=self.fill,
            out=str(self.out),
            array=self.description.kind,
            zarr_format=self.zarr_format,
            generation=self.folder.generation,
        )
        begin = begin_message(
            run=run_id,
            title=f"segment {self.out.name}",
            shape=self.plan.output_shape[1:],
            core=self.plan.core,
            counts=self.plan.grid.counts,
            kept=~todo,
        )
        with job_on(client, spec, begin if self.tile_map else None) as watch:
            link = find_dashboard(client, with_map=watch.is_on)
            threads = count_threads(client)
            unplanned = compare_workers(plan, list(threads.values()))
            if unplanned:
                log.warning("%s", unplanned)
            self.tell(ClusterReady(workers=len(threads), dashboard=link, unplanned=unplanned))
            self.began = time.perf_counter()
            try:
                with self._backdrop(watch, run_id):
                    if plan.precision in AUTOCAST:
                        self._engine = load_reference(program)
                    measure = self._measure_loss if plan.engine == "torch" and plan.precision != "float32" else None
                    self.check = run_start_check(client, spec, self._reference(), measure)
                    self._engine = None
                    log.info("start check: %s", self.check.sentence())
                    release_freed_memory()
                    self.tell(StartChecked(check=self.check))
                    require_exact(self.check)
                    if self.begins:
                        # Only now: an output that is replaced is lost to no run that could not start.
                        self._create()
                    loss = {"precision_loss": self.loss.to_json()} if self.loss else {}
                    update_header(self.out, {"start_check": self.check.to_json(), **loss})
                    self._run_tiles(client, spec, todo, watch)
                    self.ended = time.perf_counter()
                    if self.plan.device != "cpu":
                        self.device_peak_bytes = find_device_peak(client, run_id)
                    self.folder.sync()
                    self.guard.require()
            except SourceChangedError:
                # Nor may the output be continued when the old file is put back.
                update_header(self.out, {"fingerprint": {**self.fingerprint, "input": MIXED}})
                raise

    def _run_tiles(self, client: Client, spec: RunSpec, todo: npt.NDArray[np.bool_], watch: Watch) -> None:
        assert self.began is not None
        pixels, synced, total = 0, time.monotonic(), int(todo.sum())
        cells = (at for at in self.plan.order() if todo[at])
        settings = {"patience": self.patience, "cell_s": self.plan.slow_tile_s}
        for (row, column), outcome in run_cells(client, spec, cells, "tile", **settings):
            record = outcome
            if isinstance(outcome, Lost):
                pixels_lost = self.plan.grid.window(row, column).pixels
                record = TileRecord.failure(row, column, pixels_lost, outcome.reason)
                watch.tell(tile_message(spec.run_id, (row, column), "failed", error=outcome.reason))
            self.guard.look()
            if record.state == "failed":
                self.guard.require()
                log.error("tile %d,%d failed: %s", record.row, record.column, record.error)
            self.folder.append(record)
            self.states.add(record)
            pixels += record.pixels
            if time.monotonic() - synced > 2:
                self.folder.sync()
                synced = time.monotonic()
            self.tell(
                TileFinished(
                    record=record,
                    finished=self.states.ended,
                    total=total,
                    pixels=pixels,
                    elapsed_s=time.perf_counter() - self.began,
                    memory_bytes=self.meter.current_bytes,
                )
            )

    def _backdrop(self, watch: Watch, run_id: str) -> contextlib.AbstractContextManager[None]:
        """Draws the picture under the tile map while this is open; of a network that shrinks, none."""
        if not watch.is_on or self.plan.scale != ("1", "1"):
            return contextlib.nullcontext()
        y, x, height, width = self.plan.region
        area = Window(y=y, x=x, height=height, width=width)
        return draw_backdrop(self.raster, area, lambda grey: watch.tell(backdrop_message(run_id, grey)))

    def _create(self) -> None:
        self.folder.require()
        with self.folder.making():
            remove_store(self.out)
            self.folder.clear()
            if self._quantised is not None:
                self._quantised.write(self.folder.path)
            create_output(
                self.out,
                plan=self.plan,
                description=self.description,
                place=self.raster.place,
                header={
                    "fingerprint": self.fingerprint,
                    "source": reference_to(self.raster),
                    "versions": find_versions(),
                },
                zarr_format=self.zarr_format,
            )

    def finish(self) -> None:
        """Give failed tiles their nodata, and write the tiles' states."""
        status = self.states.status
        array = open_array(self.out, self.description.kind, "r+")
        dtype = np.dtype(self.plan.output_dtype)
        for row, column in np.argwhere(status == FAILED):
            core = self.plan.grid.window(int(row), int(column))
            write_core(array, core, np.full((self.plan.output_shape[0], *core.shape), output_nodata(dtype), dtype))
            if self.plan.receptive is not None:
                write_core(open_array(self.out, CONTEXT, "r+"), core, np.full((1, *core.shape), NODATA, np.uint8))
        write_status(self.out, status)


def _ignore(event: Event) -> None:
    """The listener of a run that nobody watches."""
    del event
