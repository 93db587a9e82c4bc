"""What of an earlier call is believed, and what must agree before it is continued."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BudgetError, OutputError, RasterError
from .files import sizes_below
from .fingerprint import find_differences
from .memory import format_bytes
from .places import place_of, scheme_of, url_of
from .plan import TilePlan
from .raster import Raster
from .records import RunFolder, log
from .store import ZarrFormat, chunks_of, find_chunk_fault, read_header


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRecord:
    """In place of a tile's record: its chunks are not what was recorded."""

    row: int
    column: int
    error: str

    def to_json(self) -> dict[str, Any]:
        return {"row": self.row, "column": self.column, "state": "lost", "error": self.error}


Records = dict[tuple[int, int], dict[str, Any]]


def is_unfinished(out: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether an output is this run's, and not done."""
    header = read_header(out)
    return "run" not in header and not find_differences(header.get("fingerprint", {}), fingerprint)


def require_continuable(
    out: Path, fingerprint: dict[str, Any], *, resume: bool, budget: int, core: int | None
) -> TilePlan:
    """The plan of an existing output that this run may continue.

    Raises:
        OutputError: it is foreign, another run's, or resuming was switched off.
        BudgetError: its plan needs more memory than this run may take.
    """
    header = read_header(out)
    if not resume:
        raise OutputError(f"{out} exists; choose another path, or --overwrite")
    differences = find_differences(header.get("fingerprint", {}), fingerprint)
    if differences:
        raise OutputError(f"{out} was made by another run: {'; '.join(differences)}; --overwrite replaces it")
    plan = TilePlan.from_json(header["plan"])
    if core is not None and plan.core != (core, core):
        raise OutputError(f"{out} was begun with cores of {plan.core[0]}, got {core}; leave --core out, or --overwrite")
    if plan.memory.total_bytes > budget:
        raise BudgetError(
            f"memory must be at least {format_bytes(plan.memory.total_bytes)} to continue {out} with its own plan, "
            f"got {format_bytes(budget)}; raise --memory, or --overwrite"
        )
    return plan


def keep_tiles(
    out: Path,
    plan: TilePlan,
    kind: str,
    folder: RunFolder,
    zarr_format: ZarrFormat,
    *,
    retry_failed: bool,
    redo: Collection[tuple[int, int]] = (),
) -> Records:
    """The records that need no further work: of done tiles whose chunks are as they were written, of failed ones unless
    they are to be tried again.

    Chunks were flushed before their record was made, so that size and presence tell what was lost since. Of a run that
    died the last ones are read too.

    Args:
        redo: tiles that are not believed whatever their record says.
    """
    records = folder.read()
    recent = folder.doubted(records)
    sizes = sizes_below(out)
    kept: Records = {}
    for at, record in records.items():
        if at in redo:
            continue
        if record.get("state") == "failed":
            if not retry_failed:
                kept[at] = record
            continue
        chunks = record.get("chunks", {})
        names = chunks_of(kind, plan, plan.tile(*at), zarr_format)
        faults = [
            find_chunk_fault(out, name, tuple(chunks.get(name, (0, ""))), sizes, read=at in recent) for name in names
        ]
        fault = next(filter(None, faults), "")
        if record.get("state") == "done" and not fault:
            kept[at] = record
        else:
            log.warning("tile %d,%d is done again: %s", *at, fault)
            # For the next call, should this one not come so far.
            folder.append(LostRecord(row=at[0], column=at[1], error=fault))
    return kept


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
