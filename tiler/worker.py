"""What one process keeps for a run, and what it does with a tile: read, run, write, report."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from distributed import Worker, WorkerPlugin

from .check import CheckPatch
from .engine import Engine, EngineProgram
from .events import TileRecord
from .geometry import Interval, Window
from .plan import Tile, TilePlan
from .raster import Raster, RasterReader, read_filled
from .receptive import footprint
from .store import open_array, output_nodata, write_core


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


def missing_in_output(
    missing: npt.NDArray[np.bool_], window: Window, core: Window, scale: tuple[Fraction, Fraction]
) -> npt.NDArray[np.bool_]:
    """Nodata of a core's pixels: an output pixel is nodata where every input pixel under it is."""
    valid = (~missing).astype(np.int64)
    for axis, (interval, origin, ratio) in enumerate(
        ((core.rows, window.y, scale[0]), (core.columns, window.x, scale[1]))
    ):
        under = [footprint(Interval(start=i, stop=i + 1), ratio) for i in range(interval.start, interval.stop)]
        size = valid.shape[axis]
        first = np.clip([u.start - origin for u in under], 0, size)
        last = np.clip([u.stop - origin for u in under], 0, size)
        # Valid pixels up to each position, so that a difference counts those of any footprint.
        counts = np.concatenate([np.zeros_like(np.take(valid, [0], axis)), np.cumsum(valid, axis)], axis)
        valid = np.take(counts, last, axis) - np.take(counts, first, axis)
    return valid == 0


class TileRunner:
    """One process's reader, engine and output array of a run.

    Several threads may call it: reading and writing go on beside the one computation.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self._read_lock, self._compute_lock = threading.Lock(), threading.Lock()
        self._reader: RasterReader | None = None
        self._engine: Engine | None = None
        self._scale = (Fraction(spec.plan.scale[0]), Fraction(spec.plan.scale[1]))

    def _read(self, tile: Tile) -> Any:
        with self._read_lock:
            if self._reader is None:
                self._reader = self.spec.raster.open_reader()
            return read_filled(self._reader, self.spec.raster, tile.window, self.spec.fill)

    def _reopen(self) -> None:
        with self._read_lock:
            if self._reader is not None:
                self._reader.close()
            self._reader = None

    def _loaded(self) -> Engine:
        if self._engine is None:
            self._engine = self.spec.program.load()
        return self._engine

    def run(self, row: int, column: int) -> TileRecord:
        """Do one tile; a failure is a record too, after one more try with the source opened anew."""
        tile = self.spec.plan.tile(row, column)
        try:
            return self._run(tile)
        except Exception:  # noqa: BLE001 - whatever a tile raises must not end the run
            self._reopen()
        try:
            return self._run(tile)
        except Exception as error:  # noqa: BLE001
            reason = (str(error).strip().splitlines() or [""])[0]
            return TileRecord(
                row=row,
                column=column,
                state="failed",
                pixels=tile.core.pixels,
                read_s=0,
                compute_s=0,
                write_s=0,
                worker=_process_name(),
                error=f"{type(error).__name__}: {reason}",
            )

    def _run(self, tile: Tile) -> TileRecord:
        began = time.perf_counter()
        filled = self._read(tile)
        was_read = time.perf_counter()
        missing = None
        if filled.missing is not None:
            missing = missing_in_output(filled.missing, tile.window, tile.core, self._scale)
        rows, columns = tile.crop.slices()
        if missing is not None and missing.all():
            # Nodata in, nodata out: nothing to compute.
            dtype = np.dtype(self.spec.plan.output_dtype)
            shape = (self.spec.plan.output_shape[0], *tile.core.shape)
            result = np.full(shape, output_nodata(dtype), dtype)
            computed = computing = time.perf_counter()
        else:
            with self._compute_lock:
                computing = time.perf_counter()
                # The engine reuses its output memory: copy the core before the next tile may run.
                result = self._loaded().run(filled.image)[:, rows, columns].copy()
                computed = time.perf_counter()
            if missing is not None:
                result[:, missing] = output_nodata(result.dtype)
        write_core(open_array(self.spec.out, self.spec.array, "r+"), tile.core, result)
        return TileRecord(
            row=tile.row,
            column=tile.column,
            state="done",
            pixels=tile.core.pixels,
            read_s=round(was_read - began, 4),
            compute_s=round(computed - computing, 4),
            write_s=round(time.perf_counter() - computed, 4),
            worker=_process_name(),
        )

    def check(self, patches: list[CheckPatch]) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """(finished, logits) of patches, computed as the run computes them: from their tiles' own windows."""
        whole: dict[tuple[int, int], tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
        for row, column in dict.fromkeys((patch.row, patch.column) for patch in patches):
            tile = self.spec.plan.tile(row, column)
            image = self._read(tile).image
            rows, columns = tile.crop.slices()
            with self._compute_lock:
                finished, logits = self._loaded().run_with_logits(image)
                whole[row, column] = (finished[:, rows, columns].copy(), logits[:, rows, columns].copy())
        results: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for patch in patches:
            rows, columns = patch.window.slices(self.spec.plan.grid.window(patch.row, patch.column))
            finished, logits = whole[patch.row, patch.column]
            results.append((finished[:, rows, columns].copy(), logits[:, rows, columns].copy()))
        return results

    def close(self) -> None:
        self._reopen()
        self._engine = None


def _process_name() -> str:
    return f"pid {os.getpid()}"


_RUNNERS: dict[str, TileRunner] = {}


class RunPlugin(WorkerPlugin):
    """Gives every worker process, a restarted one too, the run's one runner."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.name = f"outsize-{spec.run_id}"

    def setup(self, worker: Worker) -> None:  # noqa: ARG002 - Dask's signature
        _RUNNERS[self.spec.run_id] = TileRunner(self.spec)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        runner = _RUNNERS.pop(self.spec.run_id, None)
        if runner is not None:
            runner.close()


def run_tile(run_id: str, row: int, column: int) -> TileRecord:
    """A task: one tile of a run that this process knows."""
    return _RUNNERS[run_id].run(row, column)


def check_tiles(run_id: str, patches: list[CheckPatch]) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """A task: the start check's patches."""
    return _RUNNERS[run_id].check(patches)
