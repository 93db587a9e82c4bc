"""Transfer: a raster copied into a Zarr store, window by window, in parallel, kill-safe; bad windows are set aside."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import zarr
from distributed import Client

from .cluster import ClusterOptions, open_client
from .errors import BudgetError, OutputError, RasterError
from .files import make_folder, remove_tree, replace_store, sizes_below
from .fingerprint import fingerprint_raster
from .geometry import Grid, Interval, Window
from .machine import cpu_count
from .memory import MB, format_bytes, parse_bytes
from .meter import MemoryMeter
from .nodata import Array, Mask
from .places import is_remote, place_of, store_at
from .plan import STORE_BYTES
from .raster import Raster, RasterReader, require_apart
from .records import RunFolder, is_there, require_owner, writing
from .resume import SourceChangedError, SourceGuard
from .schedule import Lost, job_on, run_cells
from .store import (
    MASK,
    VALID,
    ZarrFormat,
    add_mask,
    chunk_name,
    create_raster_group,
    find_chunk_fault,
    finish_metadata,
    open_array,
    require_replaceable,
    require_space,
    seal_chunks,
)
from .tile_map import begin_message, kept_cells, make_sketch, tile_message

IMAGE = "image"
MARK = "outsize_copy"
"""Group attribute of every copy."""
CHUNK = 512
CELL_BYTES = 48 * MB
"""Of the pixels of one cell: what one task reads and writes."""
HERE_BYTES = 64 * MB
"""Rasters up to this size are copied in this process: starting workers would take longer."""
CLIENT_BYTES = 200 * MB
"""The commanding process with Dask, and each worker process with GDAL and Zarr; measured (docs/memory.md)."""
WORKER_BYTES = 140 * MB
CACHE_BYTES = 64 * MB
COPIES = 3
"""Of a cell's pixels at once: as read, as chunks, and half of that encoded, twice."""
PROBES = 16
"""Windows tried before the work begins; a raster of which none can be read is refused."""
PROBE_SIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """How a raster is copied; a pure function of (raster, budget, number of workers)."""

    grid: Grid
    chunk: tuple[int, int]
    workers: int
    """Processes; 0: this one."""
    cache_bytes: int
    """GDAL's block cache in each."""
    predicted_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRecord:
    """What is kept of a cell that was copied."""

    row: int
    column: int
    pixels: int
    unreadable: tuple[tuple[int, int, int, int, str], ...] = ()
    """(y, x, height, width, reason) of what could not be read: nodata in the copy."""
    state: str = "done"
    lost: bool = False
    """Its worker died over it."""
    chunks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Bytes and hash of its chunks, by their names in the store."""

    @property
    def error(self) -> str:
        """Why something of it is nodata."""
        return self.unreadable[0][4] if self.unreadable else ""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSummary:
    """What a copy did; of this call only, where it continued an earlier one."""

    out: str
    shape: tuple[int, int, int]
    dtype: str
    pixels: int
    seconds: float
    mpx_per_s: float
    peak_bytes: int
    """Sum of the PSS of all processes on this machine, sampled."""
    predicted_peak_bytes: int
    cells: int
    resumed_cells: int
    unreadable: tuple[tuple[int, int, int, int, str], ...]
    """(y, x, height, width, reason) of all windows that could not be read, earlier calls' too."""
    masked: bool
    """Whether the copy has a mask beside its pixels."""

    @property
    def unreadable_pixels(self) -> int:
        return sum(height * width for _, _, height, width, _ in self.unreadable)

    def to_json(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "pixels": self.pixels,
            "seconds": round(self.seconds, 3),
            "mpx_per_s": round(self.mpx_per_s, 3),
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "cells": self.cells,
            "resumed_cells": self.resumed_cells,
            "unreadable_pixels": self.unreadable_pixels,
            "unreadable": [
                {"window": [y, x, height, width], "error": error} for y, x, height, width, error in self.unreadable
            ],
            "mask": self.masked,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProgress:
    """What a listener is told: once with the plan (`advanced` 0), then after each cell."""

    plan: TransferPlan
    pixels: int
    """To do in this call."""
    advanced: int
    resumed_cells: int
    memory_bytes: int


def plan_transfer(
    raster: Raster, memory: str | int = "2GB", workers: int | None = None, *, to_store: bool = False
) -> TransferPlan:
    """Cut a raster into cells of whole chunks so that all processes together keep the budget.

    Args:
        to_store: the copy goes to an object store.

    Raises:
        BudgetError: one chunk of all bands, or one block of the file, is too large for it; names what would do.
    """
    budget = parse_bytes(memory)
    bands, height, width = raster.shape
    chunk = (min(CHUNK, height), min(CHUNK, width))
    chunk_bytes = raster.pixel_bytes * chunk[0] * chunk[1]
    here = raster.pixel_bytes * height * width <= HERE_BYTES and workers is None
    # Row and column centres are written as arrays.
    store = STORE_BYTES if to_store or raster.is_far else 0
    fixed = CLIENT_BYTES + store + 16 * (height + width)
    cache = CACHE_BYTES + (raster.block_bytes if raster.kind != "zarr" else 0)
    each = (0 if here else WORKER_BYTES + store) + cache + 2 * raster.block_bytes
    wanted = 0 if here else (workers or cpu_count())
    most = _cell_bytes_for(budget, fixed, each, max(1, wanted))
    while most < chunk_bytes and wanted > 1:
        wanted -= 1
        most = _cell_bytes_for(budget, fixed, each, wanted)
    if most < chunk_bytes:
        least = fixed + COPIES * chunk_bytes + each
        centres = 16 * (height + width)
        _, what, remedy = max(
            (centres, f"the positions of {height} rows and {width} columns are {format_bytes(centres)}", "cut it"),
            (
                raster.block_bytes,
                f"one of its blocks, {raster.block[0]} x {raster.block[1]} px, is {format_bytes(raster.block_bytes)}",
                "rewrite it in tiles",
            ),
            (
                chunk_bytes,
                f"{chunk[0]} x {chunk[1]} px of its {bands} bands are {format_bytes(chunk_bytes)}",
                "choose --bands",
            ),
        )
        raise BudgetError(
            f"memory must be at least {format_bytes(least + 0.5 * MB)} for {raster.path}: {what}; got "
            f"{format_bytes(budget)}; raise --memory, or {remedy}"
        )
    # Whole rows of chunks as far as memory allows: files in strips are then decoded once.
    fitting = int(min(most, CELL_BYTES) // chunk_bytes)
    across = max(1, min(-(-width // CHUNK), fitting))
    down = max(1, min(fitting // across, -(-raster.block[0] // CHUNK), -(-height // CHUNK)))
    grid = Grid(shape=(height, width), cell=(down * CHUNK, across * CHUNK))
    cell_bytes = raster.pixel_bytes * min(down * CHUNK, height) * min(across * CHUNK, width)
    process_bytes = max(1, min(wanted, len(grid))) * each
    return TransferPlan(
        grid=grid,
        chunk=chunk,
        workers=0 if here else min(wanted, len(grid)),
        cache_bytes=cache,
        predicted_peak_bytes=int(fixed + process_bytes + max(1, min(wanted, len(grid))) * COPIES * cell_bytes),
    )


def _cell_bytes_for(budget: int, fixed: int, each: int, workers: int) -> float:
    return (budget - fixed - workers * each) / workers / COPIES


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferJob:
    """All that a process needs to copy any cell."""

    run_id: str
    raster: Raster
    grid: Grid
    out: str
    """Where the copy is made, before it gets its name."""
    chunk: tuple[int, int]
    zarr_format: ZarrFormat
    owned: str
    """The output's own name, beside which its run's folder is."""
    generation: int
    gdal_cache_bytes: int = CACHE_BYTES
    in_flight: int = 1
    packages: tuple[str, ...] = ()

    def open(self, *, watched: bool = False) -> Copier:
        return Copier(self, watched=watched)


class Copier:
    """One process's reader and target arrays of a transfer.

    Several threads may call it: one reads while another writes.
    """

    def __init__(self, job: TransferJob, *, watched: bool = False) -> None:
        self.job = job
        self._sketches: dict[tuple[int, int], bytes] | None = {} if watched else None
        self._read_lock = threading.RLock()
        self._reader: RasterReader | None = None

    def run(self, row: int, column: int) -> CellRecord:
        """Copy one cell; what cannot be read of it is left nodata and told.

        Raises:
            OutputError: the target cannot be written, or is another run's by now.
        """
        window = self.job.grid.window(row, column)
        raster = self.job.raster
        unreadable: list[tuple[Window, str]] = []
        try:
            image, missing = self._read(window)
        except RasterError:
            image = np.full(
                (raster.bands, *window.shape), raster.nodata if raster.nodata is not None else 0, raster.dtype
            )
            missing = np.zeros(window.shape, np.bool_)
            for piece, pixels, where in self._read_pieces(window):
                rows, columns = piece.slices(window)
                if isinstance(pixels, str):
                    unreadable.append((piece, pixels))
                    missing[rows, columns] = True
                else:
                    image[:, rows, columns] = pixels
                    missing[rows, columns] = False if where is None else where
        if self._sketches is not None:
            self._sketches[row, column] = make_sketch(image, self.job.grid.cell, self.job.grid.counts, missing)
        return CellRecord(
            row=row,
            column=column,
            pixels=window.pixels,
            unreadable=tuple((w.y, w.x, w.height, w.width, reason) for w, reason in _joined(unreadable)),
            chunks=self._write(window, image, missing),
        )

    def take_sketch(self, row: int, column: int) -> bytes:
        """The cell's part of the grey picture under the tile map; once."""
        return b"" if self._sketches is None else self._sketches.pop((row, column), b"")

    def _write(self, window: Window, image: Array, missing: Mask | None) -> dict[str, tuple[int, str]]:
        job, out, owned = self.job, place_of(self.job.out), place_of(self.job.owned)
        rows, columns = window.slices()
        with writing(owned):
            require_owner(owned, job.generation)
            open_array(out, IMAGE, "r+", job.zarr_format)[:, rows, columns] = image
            if not job.raster.nodata_rule.is_plain:
                valid = np.full(window.shape, VALID, np.uint8)
                if missing is not None:
                    valid[missing] = 0
                open_array(out, MASK, "r+", job.zarr_format)[rows, columns] = valid
            return seal_chunks(out, _chunks_of(job.raster, job.chunk, window, job.zarr_format))

    def _read(self, window: Window) -> tuple[Array, Mask | None]:
        # GDAL's datasets are for one thread at a time.
        with self._read_lock:
            if self._reader is None:
                self._reader = self.job.raster.open_reader()
            try:
                image = self._reader.read(window)
                plain = self.job.raster.nodata_rule.is_plain
                return image, None if plain else self._reader.read_missing(window, image)
            except RasterError:
                # What a reader says after it failed once is not to be believed.
                self.close()
                raise

    def _read_pieces(self, window: Window) -> Iterator[tuple[Window, Array | str, Mask | None]]:
        """Halves of a window that cannot be read at once, and halves of those, down to the file's own blocks."""
        for half in _halves(window, self.job.raster.block):
            try:
                image, missing = self._read(half)
                yield half, image, missing
            except RasterError as error:
                if _halves(half, self.job.raster.block):
                    yield from self._read_pieces(half)
                else:
                    yield half, str(error), None

    def close(self) -> None:
        with self._read_lock:
            if self._reader is not None:
                self._reader.close()
            self._reader = None


def _chunks_of(raster: Raster, chunk: tuple[int, int], window: Window, zarr_format: ZarrFormat) -> list[str]:
    """Names of the chunks of a cell."""
    cells = Grid(shape=raster.shape_yx, cell=chunk).cells_touching(window)
    names = [chunk_name(IMAGE, (0, *cell), zarr_format) for cell in cells]
    return names + ([] if raster.nodata_rule.is_plain else [chunk_name(MASK, cell, zarr_format) for cell in cells])


def _halves(window: Window, block: tuple[int, int]) -> list[Window]:
    """A window cut in two along its longer side, in units of blocks, on a boundary of them; none if it is least."""
    for axis in sorted((0, 1), key=lambda a: -window.shape[a] / block[a]):
        sides = [window.rows, window.columns]
        side, unit = sides[axis], block[axis]
        first, last = -(-(side.start + 1) // unit), (side.stop - 1) // unit
        if first > last:
            continue
        middle = (first + last + 1) // 2 * unit
        halves: list[Window] = []
        for part in (Interval(start=side.start, stop=middle), Interval(start=middle, stop=side.stop)):
            sides[axis] = part
            halves.append(Window.from_intervals(*sides))
        return halves
    return []


def _joined(pieces: list[tuple[Window, str]]) -> list[tuple[Window, str]]:
    """Pieces of one width that lie under each other, as one."""
    joined: list[tuple[Window, str]] = []
    for piece, reason in sorted(pieces, key=lambda entry: (entry[0].x, entry[0].y)):
        if joined:
            last, why = joined[-1]
            if (last.x, last.width) == (piece.x, piece.width) and last.y + last.height == piece.y:
                joined[-1] = (Window(y=last.y, x=last.x, height=last.height + piece.height, width=last.width), why)
                continue
        joined.append((piece, reason))
    return joined


def copy_raster(
    raster: Raster,
    out: str | Path,
    *,
    memory: str | int = "2GB",
    workers: int | None = None,
    client: Client | None = None,
    cluster: ClusterOptions | None = None,
    zarr_format: ZarrFormat = 3,
    space_check: bool = True,
    overwrite: bool = False,
    listener: Callable[[TransferProgress], None] | None = None,
) -> TransferSummary:
    """Copy a raster into a Zarr store, with georeference, nodata and band names; small ones here, others on Dask.

    Guarantee: every pixel equals what the reader gives (rasterio's for files that GDAL opens). The store appears under
    its name only when it is whole. The same call continues one that was interrupted, if the source is still the same.
    A window that cannot be read, on a second try with the file opened anew, is nodata in the copy, by value or by mask,
    and is told; the rest is kept.

    Args:
        memory: budget of all processes together.
        workers: processes; None: one for each core, or none for small rasters.
        client: a Dask client to use; None: one is opened as `cluster` says.
        zarr_format: 3, or 2 for readers that know no other.
        space_check: refuse what might not fit on the disk.
        overwrite: replace an existing store.
        listener: told of the plan and of every cell.

    Raises:
        RasterError: nothing of the raster can be read; nothing is left of the copy.
        BudgetError: its blocks or bands are too large for the budget.
        OutputError: the target exists, is the source, or cannot be written.
    """
    out = place_of(out).absolute()
    _require_target(out, overwrite=overwrite)
    require_apart(raster, out)
    plan = plan_transfer(raster, memory, workers, to_store=is_remote(out))
    height, width = raster.shape_yx
    require_space(out, height * width * raster.pixel_bytes + 8 * (height + width), f"{raster.path}", check=space_check)
    with MemoryMeter() as meter, writing(out), RunFolder(out) as folder:
        _require_target(out, overwrite=overwrite)  # again, now that nobody else writes it
        return _Transfer(raster, out, plan, zarr_format, folder, meter, listener).run(client, cluster)


def _require_target(out: Path, *, overwrite: bool) -> None:
    with writing(out):
        there = is_there(out)
    if there and not overwrite:
        raise OutputError(f"{out} exists; choose another path, or --overwrite")
    if there:
        require_replaceable(out, MARK, "ingest")


class _Transfer:
    """One call's copy."""

    def __init__(
        self,
        raster: Raster,
        out: Path,
        plan: TransferPlan,
        zarr_format: ZarrFormat,
        folder: RunFolder,
        meter: MemoryMeter,
        listener: Callable[[TransferProgress], None] | None,
    ) -> None:
        self.raster, self.out, self.plan = raster, out, plan
        self.zarr_format: ZarrFormat = zarr_format
        self.folder, self.meter = folder, meter
        self._tell = listener or _ignore
        self.unfinished = out.with_name(out.name + ".creating")
        self.records: list[dict[str, Any]] = []
        self.fingerprint = {
            **fingerprint_raster(raster),
            "chunk": list(plan.chunk),
            "cell": list(plan.grid.cell),
            "zarr_format": zarr_format,
        }

    def run(self, client: Client | None, cluster: ClusterOptions | None) -> TransferSummary:
        began = time.perf_counter()
        todo = self._begin()
        resumed = len(self.plan.grid) - len(todo)
        pixels = sum(self.plan.grid.window(*cell).pixels for cell in todo)
        said = {"plan": self.plan, "pixels": pixels, "resumed_cells": resumed}
        self._tell(TransferProgress(**said, advanced=0, memory_bytes=self.meter.current_bytes))
        job = TransferJob(
            run_id=uuid.uuid4().hex[:8],
            raster=self.raster.made_absolute(),
            grid=self.plan.grid,
            out=str(self.unfinished),
            chunk=self.plan.chunk,
            zarr_format=self.zarr_format,
            owned=str(self.out),
            generation=self.folder.generation,
            gdal_cache_bytes=self.plan.cache_bytes,
        )
        guard = SourceGuard(self.raster, "the same command begins anew")
        try:
            self._copy_all(job, todo, client, cluster, guard, said)
        except SourceChangedError:
            self._abandon()
            raise
        unreadable = tuple(tuple(entry) for record in self.records for entry in record["unreadable"])
        if sum(h * w for _, _, h, w, _ in unreadable) == self.raster.shape_yx[0] * self.raster.shape_yx[1]:
            self._abandon()
            raise RasterError(f"no pixel can be read: {unreadable[0][4]}")
        masked = self._finish(unreadable)
        seconds = time.perf_counter() - began
        return TransferSummary(
            out=str(self.out),
            shape=self.raster.shape,
            dtype=str(self.raster.dtype),
            pixels=pixels,
            seconds=seconds,
            mpx_per_s=pixels / seconds / 1e6,
            peak_bytes=max(self.meter.peak_bytes, self.meter.current_bytes),
            predicted_peak_bytes=self.plan.predicted_peak_bytes,
            cells=len(todo),
            resumed_cells=resumed,
            unreadable=unreadable,
            masked=masked,
        )

    def _copy_all(
        self,
        job: TransferJob,
        todo: list[tuple[int, int]],
        client: Client | None,
        cluster: ClusterOptions | None,
        guard: SourceGuard,
        said: dict[str, Any],
    ) -> None:
        """Copy cells, keep their records, tell of them; the raster is still the same at the end.

        Raises:
            SourceChangedError: it is not.
        """
        synced = time.monotonic()
        for record in self._copy(job, todo, client, cluster):
            if record.unreadable:
                guard.require()
            guard.look()
            if record.lost:
                # Some of its chunks may be there; what nobody vouches for is nodata.
                rows, columns = self.plan.grid.window(record.row, record.column).slices()
                nodata = self.raster.nodata if self.raster.nodata is not None else 0
                open_array(self.unfinished, IMAGE, "r+")[:, rows, columns] = nodata
            self.folder.append(record)
            self.records.append(record.to_json())
            if time.monotonic() - synced > 2:
                self.folder.sync()
                synced = time.monotonic()
            self._tell(TransferProgress(**said, advanced=record.pixels, memory_bytes=self.meter.current_bytes))
        if todo:
            guard.require()

    def _begin(self) -> list[tuple[int, int]]:
        """The cells still to do, of an interrupted copy that may be continued or of a new one."""
        if self._stored_fingerprint() == self.fingerprint:
            sizes, records = sizes_below(self.unfinished), self.folder.read()
            recent = self.folder.doubted(records)
            done = {at: record for at, record in records.items() if self._is_kept(at, record, sizes, at in recent)}
            self.records = list(done.values())
            return [cell for cell in self.plan.grid if cell not in done]
        probe_raster(self.raster)
        remove_tree(self.unfinished)
        self.folder.clear()
        make_folder(self.unfinished.parent)
        rule = self.raster.nodata_rule
        create_raster_group(
            self.unfinished,
            name=IMAGE,
            shape=self.raster.shape,
            dims=("band", "y", "x"),
            dtype=self.raster.dtype,
            chunks=(self.raster.bands, *self.plan.chunk),
            place=self.raster.place,
            fill=self.raster.nodata if self.raster.nodata is not None else 0,
            nodata=self.raster.nodata,
            masked=not rule.is_plain,
            zarr_format=self.zarr_format,
            group_attributes={
                "band_names": list(self.raster.band_names),
                MARK: {
                    "fingerprint": self.fingerprint,
                    "sources": [Path(source).name for source in self.raster.sources or (self.raster.path,)],
                },
            },
        )
        return list(self.plan.grid)

    def _stored_fingerprint(self) -> Any:
        with suppress(Exception):
            attributes: Any = dict(zarr.open_group(store_at(self.unfinished, read_only=True), mode="r").attrs)
            open_array(self.unfinished, IMAGE)  # what cannot be opened is made anew
            return attributes[MARK]["fingerprint"]
        return None

    def _is_kept(
        self, cell: tuple[int, int], record: dict[str, Any], sizes: Callable[[str], int | None], read: bool
    ) -> bool:
        """Whether a cell's chunks are there as they were flushed before their record was made."""
        if not self.plan.grid.has(*cell) or not _is_list_of_windows(record.get("unreadable")):
            return False
        chunks = record["chunks"]
        names = _chunks_of(self.raster, self.plan.chunk, self.plan.grid.window(*cell), self.zarr_format)
        faults = (
            find_chunk_fault(self.unfinished, name, tuple(chunks.get(name, (0, ""))), sizes, read=read)
            for name in names
        )
        return not any(faults)

    def _copy(
        self,
        job: TransferJob,
        todo: list[tuple[int, int]],
        client: Client | None,
        cluster: ClusterOptions | None,
    ) -> Iterator[CellRecord]:
        if not todo:
            return
        if client is None and self.plan.workers == 0 and not (cluster and cluster.connects):
            copier = job.open()
            try:
                for cell in todo:
                    yield copier.run(*cell)
            finally:
                copier.close()
        elif client is not None:
            yield from _copy_on(client, job, todo, tile_map=True)
        else:
            with open_client(
                cluster or ClusterOptions(),
                workers=max(1, self.plan.workers),
                threads=1,
                gdal_cache_bytes=self.plan.cache_bytes,
            ) as connected:
                tile_map = (cluster or ClusterOptions()).dashboard_address is not None
                yield from _copy_on(connected, job, todo, tile_map=tile_map)

    def _finish(self, unreadable: tuple[Any, ...]) -> bool:
        """Mark what could not be read, and give the store its name; returns whether it has a mask."""
        masked = not self.raster.nodata_rule.is_plain
        if unreadable:
            if not masked and self.raster.nodata is None:
                # No number says nodata here, so a mask must.
                add_mask(self.unfinished, IMAGE, self.raster.shape_yx, self.plan.chunk)
                masked = True
            if masked:
                mask = open_array(self.unfinished, MASK, "r+")
                for y, x, height, width, _ in unreadable:
                    mask[y : y + height, x : x + width] = 0
            group = zarr.open_group(store_at(self.unfinished), mode="r+")
            told: Any = dict(group.attrs)[MARK]
            listed = [{"window": [y, x, h, w], "error": error} for y, x, h, w, error in unreadable]
            group.attrs[MARK] = {**told, "unreadable": listed}
        finish_metadata(self.unfinished)
        self.folder.require()
        with self.folder.making():
            replace_store(self.out, self.unfinished)
        remove_tree(self.unfinished)
        self.folder.discard()
        return masked

    def _abandon(self) -> None:
        remove_tree(self.unfinished)
        self.folder.discard()


def _is_list_of_windows(value: Any) -> bool:
    """(y, x, height, width, reason) each, as a cell's record has them."""
    return isinstance(value, list) and all(
        isinstance(entry, list) and len(entry) == 5 and all(isinstance(number, int) for number in entry[:4])
        for entry in value
    )


def _copy_on(client: Client, job: TransferJob, todo: list[tuple[int, int]], *, tile_map: bool) -> Iterator[CellRecord]:
    begin = begin_message(
        run=job.run_id,
        title=f"ingest {PurePath(job.owned).name}",
        shape=job.raster.shape_yx,
        core=job.grid.cell,
        counts=job.grid.counts,
        kept=kept_cells(job.grid.counts, todo),
    )
    with job_on(client, job, begin if tile_map else None) as watch:
        for (row, column), outcome in run_cells(client, job, todo, "ingest"):
            record = outcome
            if isinstance(outcome, Lost):
                # Nothing is known of its pixels, so all of them are called unreadable.
                w = job.grid.window(row, column)
                watch.tell(tile_message(job.run_id, (row, column), "failed", error=outcome.reason))
                lost = (w.y, w.x, w.height, w.width, f"{job.raster.path}: window {w}: {outcome.reason}")
                record = CellRecord(row=row, column=column, pixels=w.pixels, unreadable=(lost,), lost=True)
            yield record


def probe_raster(raster: Raster) -> None:
    """Try to read small windows spread over a raster until one succeeds.

    Raises:
        RasterError: none of them can be read; names the first.
    """
    # Within the file's own blocks, so that one bad block does not speak for its neighbours.
    cell = (max(1, min(PROBE_SIDE, raster.block[0])), max(1, min(PROBE_SIDE, raster.block[1])))
    grid = Grid(shape=raster.shape_yx, cell=cell)
    reader = raster.open_reader()
    first: RasterError | None = None
    try:
        for i in range(PROBES):
            # Golden-ratio steps along both axes: spread evenly whatever the number.
            steps = zip(grid.counts, (0.618034, 0.754878), strict=True)
            window = grid.window(*(int(count * (i * step % 1)) for count, step in steps))
            try:
                reader.read_missing(window, reader.read(window))
                return
            except RasterError as error:
                first = first or error
                reader.close()
    finally:
        reader.close()
    assert first is not None
    raise RasterError(f"none of {PROBES} windows spread over it can be read; {first}")


def _ignore(progress: TransferProgress) -> None:
    """The listener of a copy that nobody watches."""
    del progress
