"""What one process keeps for a run, and what it does with a tile: read, run, write, report."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from zarr.errors import BaseZarrError

from ..base.choices import ZarrFormat
from ..base.dtypes import output_nodata
from ..base.errors import EngineError, NotFiniteError, OutputError, RasterError, WorkerError
from ..base.text import first_line
from ..base.tile import Tile
from ..cluster.jobs import runner_of, told_plainly, unfit_worker
from ..cluster.tile_map import make_sketch
from ..engines.engine import EngineProgram, TileEngine
from ..engines.loading import load_tiles
from ..output.records import require_owner, writing
from ..output.resume import require_source
from ..output.store import CONTEXT, NODATA, chunks_of, open_array, seal_chunks, write_core
from ..output.tile_record import TileRecord
from ..output.values import as_stored, count_not_finite, count_under, missing_in_output, touches_nodata
from ..planning.plan import TilePlan
from ..rasters.block_cache import BlockStore
from ..rasters.raster import FilledWindow, Raster, RasterReader, read_filled
from ..rasters.reading import GDAL_CACHE_BYTES
from ..system.machine import release_freed_memory
from ..system.places import place_of

if TYPE_CHECKING:
    from ..planning.check_windows import CheckPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that a process needs to do any tile of a run."""

    run_id: str
    raster: Raster
    plan: TilePlan
    program: EngineProgram
    fill: tuple[float, ...]
    out: str
    array: str
    """Name of the output array in the store."""
    zarr_format: ZarrFormat
    generation: int
    """Of the run's owner: when another has taken over, this run's tiles write no more."""

    @property
    def in_flight(self) -> int:
        return self.plan.in_flight

    @property
    def gdal_cache_bytes(self) -> int:
        return GDAL_CACHE_BYTES

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.plan.engine,)

    def open(self, *, watched: bool = False) -> TileRunner:
        return TileRunner(self, watched=watched)


KEPT_BYTES = 8_000_000
"""Of a tile's result, up to which the start check's is kept for the run."""


class TileRunner:
    """One process's reader, engine and output array of a run.

    Several threads may call it: reading and writing go on beside the one computation.
    """

    def __init__(self, spec: RunSpec, *, watched: bool = False) -> None:
        self.spec = spec
        self._sketches: dict[tuple[int, int], bytes] | None = {} if watched else None
        self._read_lock, self._load_lock = threading.Lock(), threading.Lock()
        # An engine that is shared orders its callers by itself: it wants many at once.
        self._computing: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if spec.program.is_shared else threading.Lock()
        )
        self._reader: RasterReader | None = None
        self._blocks = BlockStore(spec.plan.cache_bytes) if spec.plan.cache_bytes else None
        self._counted_bytes = self._checked_bytes = 0
        self._engine: TileEngine | None = None
        self._checked: dict[tuple[int, int], npt.NDArray[Any]] = {}
        """Results that the start check has computed, just as a run does."""
        self._scale = (Fraction(spec.plan.scale[0]), Fraction(spec.plan.scale[1]))
        # A disk fails once more or for good; a network may fail some times in a row.
        self._attempts, self._pause_s = (5, 0.2) if spec.raster.is_far else (2, 0.0)

    def _read(self, tile: Tile) -> FilledWindow:
        with self._read_lock:
            if self._reader is None:
                self._reader = self.spec.raster.open_reader(self._blocks)
            return read_filled(self._reader, self.spec.raster, tile.window, self.spec.fill)

    def _count_decoded(self) -> int:
        """Bytes of all blocks that were decoded since this was asked last."""
        with self._read_lock:
            decoded = self._blocks.decoded_bytes if self._blocks else 0
            since, self._counted_bytes = decoded - self._counted_bytes, decoded
            return since

    def _reopen(self) -> None:
        with self._read_lock:
            if self._reader is not None:
                self._reader.close()
            if self._blocks is not None:
                self._blocks.clear()
            self._reader = None

    def _loaded(self) -> TileEngine:
        with self._load_lock:
            if self._engine is None:
                try:
                    self._engine = load_tiles(self.spec.program)
                except Exception as error:
                    # Whatever it is: an engine that does not load is no fault of a tile, and would fail all of them.
                    raise unfit_worker(error) from error
            return self._engine

    def run(self, row: int, column: int) -> TileRecord:
        """Do one tile; a failure is a record too, after more tries with the source opened anew.

        Raises:
            OutputError: the output cannot be written.
            WorkerError: this process can do no tile: its engine is missing, broken, or out of the device's memory.
            RasterError: this process does not see the raster's files.
            NotFiniteError: pixels that no network is given, wherever tiles are cut.
        """
        self._loaded()  # also where the first tiles are nodata: a process that cannot do tiles says so at once
        tile = self.spec.plan.tile(row, column)
        failure: Exception | None = None
        for attempt in range(self._attempts):
            if attempt:
                self._reopen()
                time.sleep(self._pause_s * 2 ** (attempt - 1))
            try:
                return self._run(tile)
            except (OutputError, WorkerError, NotFiniteError):
                raise  # no fault of the tile: the run stops, and goes on when they are mended
            except (EngineError, ImportError) as error:
                # Nor are these. A device without memory is the plan's fault, or that of another process on it: windows
                # of one kind take the same wherever they lie, so all that follow would become nodata, quickly.
                raise unfit_worker(error) from error
            except Exception as error:  # noqa: BLE001 - whatever else a tile raises must not end the run
                failure = error
        try:
            require_source(self.spec.raster)
        except RasterError as error:
            raise RasterError(str(unfit_worker(error))) from error
        reason = first_line(failure, "")
        return TileRecord.failure(
            row, column, tile.core.pixels, f"{type(failure).__name__}: {reason}", worker=_process_name()
        )

    def _run(self, tile: Tile) -> TileRecord:
        began = time.perf_counter()
        filled = self._read(tile)
        was_read = time.perf_counter()
        if self._sketches is not None:
            self._sketches[tile.row, tile.column] = self._sketch(tile, filled)
        missing = None
        if filled.missing is not None:
            missing = missing_in_output(filled.missing, tile.window, tile.core, self._scale)
        if missing is not None and missing.all():
            # Nodata in, nodata out: nothing to compute.
            dtype = np.dtype(self.spec.plan.output_dtype)
            shape, not_finite = (self.spec.plan.output_shape[0], *tile.core.shape), 0
            result = np.full(shape, output_nodata(dtype), dtype)
            computed = computing = time.perf_counter()
        else:
            with self._computing:
                computing = time.perf_counter()
                # The engine reuses its output memory: copy the core before the next tile may run.
                ready = self._checked.pop((tile.row, tile.column), None)
                result = ready if ready is not None else self._loaded().run_tile(filled.image, tile).copy()
                computed = time.perf_counter()
            not_finite = count_not_finite(result, missing)
            result = as_stored(result, missing)
        context = None
        if self.spec.plan.receptive is not None:
            context = touches_nodata(filled.missing, tile, self.spec.plan)
            if missing is not None:
                context[missing] = NODATA
        chunks = self._write(tile, result, context)
        checked_bytes, self._checked_bytes = self._checked_bytes, 0
        return TileRecord(
            row=tile.row,
            column=tile.column,
            state="done",
            pixels=tile.core.pixels,
            read_s=round(was_read - began, 4),
            compute_s=round(computed - computing, 4),
            write_s=round(time.perf_counter() - computed, 4),
            worker=_process_name(),
            at=round(time.time(), 3),
            chunks=chunks,
            decoded_bytes=self._count_decoded(),
            checked_bytes=checked_bytes,
            undeclared_pixels=count_under(filled.undeclared, tile.window, tile.core, self._scale),
            not_finite_pixels=not_finite,
        )

    def _sketch(self, tile: Tile, filled: FilledWindow) -> bytes:
        """The tile's core in grey; of a network that shrinks, nothing: its cores are no parts of the window."""
        if self._scale != (1, 1):
            return b""
        plan, core = self.spec.plan, tile.core
        rows, columns = core.slices(tile.window)
        missing = None if filled.missing is None else filled.missing[rows, columns]
        return make_sketch(filled.image[:, rows, columns], plan.core, plan.grid.counts, missing)

    def take_sketch(self, row: int, column: int) -> bytes:
        """The tile's part of the grey picture under the tile map; once."""
        return b"" if self._sketches is None else self._sketches.pop((row, column), b"")

    def _write(
        self, tile: Tile, result: npt.NDArray[Any], context: npt.NDArray[np.uint8] | None
    ) -> dict[str, tuple[int, str]]:
        """Write a tile's chunks; returns what was flushed to the disk.

        Raises:
            OutputError: the output cannot be written, or is another run's by now.
        """
        out, zarr_format = place_of(self.spec.out), self.spec.zarr_format
        with writing(out):
            require_owner(out, self.spec.generation)
            try:
                write_core(open_array(out, self.spec.array, "r+", zarr_format), tile.target, result)
                if context is not None:
                    write_core(open_array(out, CONTEXT, "r+", zarr_format), tile.target, context[None])
                names = chunks_of(self.spec.array, self.spec.plan, tile, zarr_format)
                return seal_chunks(out, names)
            except (BaseZarrError, FileNotFoundError) as error:
                reason = first_line(error, "")
                raise OutputError(
                    f"{out} cannot be written: {reason}; when it can, the same command goes on"
                ) from error

    def check(self, patches: list[CheckPatch]) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]] | None]:
        """(finished, logits) of patches, computed as the run computes them: from their tiles' own windows; None where
        the tile cannot be read."""
        results: list[tuple[npt.NDArray[Any], npt.NDArray[Any]] | None] = [None] * len(patches)
        for row, column in dict.fromkeys((patch.row, patch.column) for patch in patches):
            tile = self.spec.plan.tile(row, column)
            try:
                image = self._read(tile).image
            except RasterError:
                self._reopen()
                continue
            with self._computing:
                finished, logits = self._loaded().run_tile_with_logits(image, tile)
                plan = self.spec.plan
                if (plan.method == "program" or plan.with_logits) and finished.nbytes <= KEPT_BYTES:
                    # Computed by the very code of the run: without its logits a network might round otherwise.
                    self._checked[row, column] = finished.copy()
                for index, patch in enumerate(patches):
                    if (patch.row, patch.column) == (row, column):
                        rows, columns = patch.window.slices(tile.core)
                        # Only the patches are copied: all logits of a tile may take more than the network itself.
                        results[index] = (finished[:, rows, columns].copy(), logits[:, rows, columns].copy())
        self._checked_bytes += self._count_decoded()
        return results

    def device_peak_bytes(self) -> int:
        """Most that the engine has held on a CUDA device."""
        return self._engine.device_peak_bytes() if self._engine is not None else 0

    def close(self) -> None:
        self._reopen()
        self._engine = None
        if self.spec.program.is_shared:
            release_freed_memory()  # its threads and buffers hold each other, and the next run needs the device


def _process_name() -> str:
    return f"pid {os.getpid()}"


def check_tiles(run_id: str, patches: list[CheckPatch]) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]] | None]:
    """A task: the start check's patches."""
    with told_plainly():
        return runner_of(run_id).check(patches)


def device_peak(run_id: str) -> int:
    """A task on every worker: what the run took of its CUDA device."""
    return runner_of(run_id).device_peak_bytes()
