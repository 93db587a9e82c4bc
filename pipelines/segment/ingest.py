"""`outsize ingest`: rasters of any kind into one Zarr store."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...tiler.base.errors import UsageError
from ...tiler.base.geometry import Window
from ...tiler.base.text import format_bytes, format_seconds
from ...tiler.cluster.client import ClusterOptions
from ...tiler.copying.transfer import TransferProgress, TransferSummary, copy_raster
from ...tiler.output.store import ZarrFormat
from ...tiler.rasters.nodata import exact_text
from ...tiler.rasters.notes import list_notes
from ...tiler.rasters.opening import open_with
from ...tiler.rasters.parts import open_mosaic, open_stack
from ...tiler.rasters.raster import Raster, ReadOptions
from ..base.console import Console, Step, count_of, describe_memory, refuse_picture_name

_LISTED = 20
"""Unreadable windows that a terminal shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestOptions:
    """What is copied, and how."""

    sources: tuple[str, ...]
    stack: bool
    mosaic: bool
    reading: ReadOptions
    memory: str
    workers: int | None
    zarr_format: ZarrFormat
    space_check: bool
    overwrite: bool


def _open(options: IngestOptions) -> Raster:
    if options.stack and options.mosaic:
        raise UsageError("files are a stack or a mosaic, got both --stack and --mosaic; choose one")
    if options.stack:
        return open_stack(options.sources, options.reading)
    if options.mosaic:
        return open_mosaic(options.sources, options.reading)
    if len(options.sources) > 1:
        raise UsageError(
            f"{len(options.sources)} files are bands of one grid (--stack) or pieces of one grid (--mosaic); say which"
        )
    return open_with(next(iter(options.sources)), options.reading)


def run_ingest(console: Console, options: IngestOptions, target: Path, cluster: ClusterOptions) -> TransferSummary:
    """Copy rasters, pixel by pixel equal, with their georeference, nodata and band names; tell what cannot be read."""
    refuse_picture_name("ingest", target)
    raster = _open(options)
    for word, text in list_notes(raster):
        console.remark(f"{word:<9} {text}")
    with ExitStack() as shown:
        listener = _Listener(console, raster, shown)
        summary = copy_raster(
            raster,
            target,
            memory=options.memory,
            workers=options.workers,
            cluster=cluster,
            zarr_format=options.zarr_format,
            space_check=options.space_check,
            overwrite=options.overwrite,
            listener=listener,
        )
    for y, x, height, width, reason in summary.unreadable[:_LISTED]:
        console.remark(f"unreadable {Window(y=y, x=x, height=height, width=width)}: {reason}")
    if len(summary.unreadable) > _LISTED:
        console.remark(f"unreadable and {len(summary.unreadable) - _LISTED} windows more, in {target}'s attributes")
    console.result(_sentence(raster, summary, target), summary.to_json())
    return summary


def _sentence(raster: Raster, summary: TransferSummary, target: Path) -> str:
    bands, height, width = summary.shape
    place = "georeferenced" if raster.place.crs_wkt else "no CRS"
    if raster.place.points:
        place = f"{len(raster.place.points)} ground control points"
    nodata = f", nodata {exact_text(raster.nodata)}" if raster.nodata is not None else ""
    mask = ", mask" if summary.masked else ""
    bad = f", {summary.unreadable_pixels} px UNREADABLE and nodata" if summary.unreadable else ""
    return (
        f"{target}: {height} x {width} px, {count_of(bands, 'band')} {summary.dtype}, {place}{nodata}{mask}{bad}; "
        f"{summary.pixels / 1e6:.1f} Mpx in {format_seconds(summary.seconds)} ({summary.mpx_per_s:.2f} Mpx/s), peak "
        f"memory {format_bytes(summary.peak_bytes)} (predicted {format_bytes(summary.predicted_peak_bytes)})"
    )


class _Listener:
    """Shows a copy's progress."""

    def __init__(self, console: Console, raster: Raster, shown: ExitStack) -> None:
        self._console, self._raster, self._shown = console, raster, shown
        self._step: Step | None = None

    def __call__(self, progress: TransferProgress) -> None:
        if self._step is None:
            plan = progress.plan
            where = count_of(plan.workers, "worker process") if plan.workers else "this process"
            self._console.remark(
                f"copy      {len(plan.grid)} cells of up to {plan.grid.cell[0]} x {plan.grid.cell[1]} px in {where}, "
                f"{format_bytes(plan.predicted_peak_bytes)} predicted peak of all processes"
            )
            if progress.resumed_cells:
                self._console.remark(f"resume    {progress.resumed_cells} of {len(plan.grid)} cells are there already")
            self._step = self._shown.enter_context(self._console.step("ingest", progress.pixels))
        if progress.advanced:
            self._step.advance(progress.advanced, describe_memory(progress.memory_bytes))
