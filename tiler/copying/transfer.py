"""Transfer: a raster copied into a Zarr store, window by window, in parallel, kill-safe; bad windows are set aside."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import zarr
from distributed import Client

from ..base.choices import ZarrFormat
from ..base.errors import OutputError, RasterError
from ..cluster.client import ClusterOptions, open_client
from ..cluster.schedule import Lost, job_on, run_cells
from ..cluster.tile_map import begin_message, kept_cells, tile_message
from ..output.fingerprint import fingerprint_raster
from ..output.records import RunFolder, is_there, writing
from ..output.resume import SourceChangedError, SourceGuard
from ..output.store import (
    MASK,
    add_mask,
    create_raster_group,
    find_chunk_fault,
    finish_metadata,
    open_array,
    require_replaceable,
    require_space,
)
from ..rasters.raster import Raster, require_apart
from ..rasters.scale import tag_attributes
from ..system.files import make_folder, remove_tree, replace_store, sizes_below
from ..system.meter import MemoryMeter
from ..system.places import is_remote, place_of, require_lasting
from ..system.stores import store_at
from .copier import IMAGE, CellRecord, TransferJob, chunks_of, probe_raster
from .transfer_plan import TransferPlan, plan_transfer

MARK = "outsize_copy"
"""Group attribute of every copy."""


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
    require_lasting(out)
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
        if out.is_symlink():
            raise OutputError(f"{out} is a link; name the store itself")
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
            array_attributes=tag_attributes(self.raster, self.zarr_format),
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
        names = chunks_of(self.raster, self.plan.chunk, self.plan.grid.window(*cell), self.zarr_format)
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


def _ignore(progress: TransferProgress) -> None:
    """The listener of a copy that nobody watches."""
    del progress
