"""What of an earlier call is believed, and what must agree before it is continued."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base.choices import ZarrFormat
from ..base.errors import BudgetError, DamagedError, OutputError, RasterError
from ..base.text import first_line, format_bytes
from ..planning.plan import TilePlan
from ..rasters.parts import open_reference, reference_to
from ..rasters.raster import Raster
from ..system.files import sizes_below
from ..system.logs import log
from ..system.places import place_of, scheme_of, url_of
from .fingerprint import find_differences, fingerprint_raster
from .records import RunFolder
from .store import chunks_of, find_chunk_fault, plan_of, read_header


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRecord:
    """In place of a tile's record: its chunks are not what was recorded."""

    row: int
    column: int
    error: str

    def to_json(self) -> dict[str, Any]:
        return {"row": self.row, "column": self.column, "state": "lost", "error": self.error}


Kept = dict[tuple[int, int], str]
"""Tiles that need no further work, and why they failed; empty for those that are done."""


def is_unfinished(out: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether an output is this run's, and not done."""
    try:
        header = read_header(out)
    except DamagedError:
        return False
    stored = header.get("fingerprint")
    return "run" not in header and isinstance(stored, dict) and not find_differences(stored, fingerprint)


def require_continuable(
    out: Path,
    fingerprint: dict[str, Any],
    now: TilePlan,
    *,
    paths: Sequence[str],
    resume: bool,
    core: int | None,
    remedy: str = "--overwrite",
) -> TilePlan:
    """The plan of an existing output that this run may continue.

    Args:
        now: the plan that a new output would get: its budgets and devices are this call's.
        paths: of the raster.
        remedy: what replaces the output.

    Raises:
        OutputError: it is foreign, another run's, or resuming was switched off.
        BudgetError: its plan needs more memory than this run may take.
    """
    header = read_header(out)
    if not resume:
        raise OutputError(f"{out} exists; choose another path, or {remedy}")
    plan = plan_of(out, header)
    differences = find_differences(header["fingerprint"], fingerprint, (source_paths(header), paths))
    if differences:
        raise OutputError(f"{out} was made by another run: {'; '.join(differences)}; {remedy} replaces it")
    if core is not None and plan.core != (core, core):
        raise OutputError(f"{out} was begun with cores of {plan.core[0]}, got {core}; leave --core out, or {remedy}")
    if plan.memory.total_bytes > now.memory_budget_bytes:
        raise BudgetError(
            f"memory must be at least {format_bytes(plan.memory.total_bytes)} to continue {out} with its own plan, "
            f"got {format_bytes(now.memory_budget_bytes)}; raise --memory, or {remedy}"
        )
    if plan.device_bytes > now.device_budget_bytes:
        raise BudgetError(
            f"device memory must be at least {format_bytes(plan.device_bytes)} to continue {out} with its own plan, "
            f"got {format_bytes(now.device_budget_bytes)}; raise --device-memory, or {remedy}"
        )
    if plan.device == "cpu":
        return plan
    # The devices may be others than before, or fewer; never more, since host memory was planned for so many workers.
    workers = min(plan.workers, now.workers)
    return replace(
        plan,
        device=now.device,
        device_names=now.device_names[:workers],
        device_budget_bytes=now.device_budget_bytes,
        workers=workers,
    )


def ignored_options(plan: TilePlan, workers: int | None, threads: int | None) -> str:
    """What is asked for and not done, since an output that is continued keeps its own plan, whose memory was counted
    for just that; empty: nothing."""
    asked = {"workers": (workers, plan.workers), "threads": (threads, plan.threads)}
    ignored = [f"{name} {own}, not {other}" for name, (other, own) in asked.items() if other not in (None, own)]
    return f"the output keeps the plan that it was begun with: {', '.join(ignored)}" if ignored else ""


def keep_tiles(
    out: Path,
    plan: TilePlan,
    kind: str,
    folder: RunFolder,
    zarr_format: ZarrFormat,
    *,
    retry_failed: bool,
    redo: Collection[tuple[int, int]] = (),
) -> Kept:
    """The tiles that need no further work: done ones whose chunks are as they were written, failed ones unless they are
    to be tried again.

    Chunks were flushed before their record was made, so that size and presence tell what was lost since. Of a run that
    died the last ones are read too.

    Args:
        redo: tiles that are not believed whatever their record says.
    """
    records = folder.read()
    recent = folder.doubted(records)
    sizes = sizes_below(out)
    kept: Kept = {}
    for at, record in records.items():
        if at in redo:
            continue
        if not plan.grid.has(*at):
            log.warning("a record of tile %d,%d, which there is not, is passed over", *at)
            continue
        if record.get("state") == "failed":
            if not retry_failed:
                kept[at] = str(record.get("error") or "failed")
            continue
        chunks = record.get("chunks", {})
        names = chunks_of(kind, plan, plan.tile(*at), zarr_format)
        faults = [
            find_chunk_fault(out, name, tuple(chunks.get(name, (0, ""))), sizes, read=at in recent) for name in names
        ]
        fault = next(filter(None, faults), "")
        if record.get("state") == "done" and not fault:
            kept[at] = ""
        else:
            fault = fault or str(record.get("error", ""))
            log.warning("tile %d,%d is done again: %s", *at, fault)
            # For the next call, should this one not come so far.
            folder.append(LostRecord(row=at[0], column=at[1], error=fault))
    return kept


def source_paths(header: dict[str, Any]) -> list[str]:
    """What an output was made from."""
    return list(header.get("source", {}).get("paths", ()))


class SourceChangedError(RasterError):
    """What was read so far is of two contents."""


class SourceGuard:
    """Sees to it that what is read is one raster from the first tile to the last: its files may be replaced meanwhile,
    and tiles of two contents make no map."""

    def __init__(self, raster: Raster, remedy: str) -> None:
        self._raster, self._remedy = raster, remedy
        self._known = fingerprint_raster(raster)
        self._next = 0.0

    def require(self) -> None:
        """Describe the raster anew.

        Raises:
            SourceChangedError: it is another than it was.
            RasterError: it is gone, or out of reach.
        """
        began = time.monotonic()
        require_source(self._raster)
        try:
            now = fingerprint_raster(open_reference(reference_to(self._raster), trust=self._raster.options.trust))
        except Exception as error:
            reason = first_line(error)
            raise RasterError(
                f"{self._raster.path} cannot be described again: {reason}; when it can, the same command goes on"
            ) from error
        if now != self._known:
            raise SourceChangedError(f"{self._raster.path} was changed while it was read; {self._remedy}")
        ended = time.monotonic()
        self._next = ended + max(GUARD_EVERY_S, GUARD_SHARE * (ended - began))

    def look(self) -> None:
        """`require` now and then, so that it costs next to nothing; what is only out of reach is left to the tiles."""
        if self._raster.is_far or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + GUARD_EVERY_S
        try:
            self.require()
        except SourceChangedError:
            raise
        except RasterError as error:
            log.warning("%s", error)


GUARD_EVERY_S = 5.0
GUARD_SHARE = 50
"""A description of the raster is followed by this many times its own time without one."""


def require_source(raster: Raster) -> None:
    """A tile that fails is one thing; a source that is gone is another, which must not fail all that are left.

    Raises:
        RasterError: a file of the raster is not there.
    """
    for file in (raster.path, *raster.sources, *raster.files):
        name = url_of(file) or file
        if name.startswith("/vsi") or (":" in name and not scheme_of(name)):
            continue  # one of GDAL's names for a part of a file
        try:
            there = place_of(name).exists()
        except Exception as error:
            raise RasterError(f"{name} cannot be reached; when it can, the same command goes on") from error
        if not there:
            raise RasterError(f"{file} is gone; when it is back, the same command goes on")
