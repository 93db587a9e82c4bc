"""Verification: is an output what a run wrote, and is what it wrote right?"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..analysis.graph import bound_of
from ..base.errors import OutputError, RasterError
from ..base.geometry import Window
from ..base.text import first_line
from ..output.records import read_owner, read_records, run_folder
from ..output.small_parts import PartFault, find_part_faults, states_by_header
from ..output.store import (
    CONTEXT,
    FAILED,
    STATUS,
    chunk_window,
    chunks_of,
    find_chunk_fault,
    open_array,
    plan_of,
    read_header,
)
from ..output.values import as_stored
from ..planning.check_windows import sample_patches
from ..planning.plan import TilePlan
from ..rasters.nodata import Array
from ..system.files import sizes_below
from ..system.machine import cpu_count
from .check import MOST_TIES, relative_tolerance
from .reference import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A tile that is not as it should be."""

    row: int
    column: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found in an output's store."""

    is_finished: bool
    """Whether a run of it came to its end: all tiles done or failed, failed ones made nodata."""
    parts: tuple[PartFault, ...]
    """Arrays of damaged metadata, coordinates or tile states."""

    tiles: int
    chunks: int
    stored_bytes: int
    has_records: bool
    """Without the run's folder beside the output, contents cannot be compared with what was written."""
    faults: tuple[Fault, ...]
    """Chunks that are missing, cannot be decoded, or hold another content; one for each tile."""
    unfinished: tuple[tuple[int, int], ...]
    """Tiles that no run has done yet."""
    failed: tuple[tuple[int, int], ...]
    """Tiles that failed, and hold nodata."""

    @property
    def state(self) -> str:
        """ "damaged"; "unfinished": no run came to its end; "partial": sound, with failed tiles; "sound"."""
        if self.faults or self.parts:
            return "damaged"
        if self.unfinished or not self.is_finished:
            return "unfinished"
        return "partial" if self.failed else "sound"

    @property
    def damaged(self) -> frozenset[tuple[int, int]]:
        return frozenset((fault.row, fault.column) for fault in self.faults)


def verify_output(out: Path, listener: Callable[[int], None] | None = None) -> Verification:
    """Read every chunk of an output: present, decodable, of the content that was written.

    Args:
        listener: called with the pixels of each tile that was looked at.

    Raises:
        OutputError: not an output, or one that is being written.
    """
    header = read_header(out)
    owner = read_owner(run_folder(out))
    if owner is not None and owner.may_live:
        raise OutputError(f"{out} is being written by {owner}; verify it when that has ended")
    plan, kind, zarr_format = plan_of(out, header), header["kind"], header["fingerprint"].get("zarr_format", 3)
    records, sizes = read_records(out), sizes_below(out)
    states = tile_states(out, header)
    parts = find_part_faults(out, states)
    # What cannot be opened for its metadata is compared with its records, and not decoded.
    opened = {name: open_array(out, name) for name in _pixels_of(kind, plan) if name not in {p.array for p in parts}}
    # What failed gets its nodata when the run ends.
    known = [at for at in plan.grid if states.get(at) == "done" or (states.get(at) == "failed" and "run" in header)]

    def look(at: tuple[int, int]) -> tuple[Fault | None, int, int]:
        names = chunks_of(kind, plan, plan.tile(*at), zarr_format)
        recorded = records.get(at, {}).get("chunks", {})
        faults = (
            _find_fault(out, name, recorded.get(name), sizes, opened.get(name.split("/", 1)[0])) for name in names
        )
        reason = next(filter(None, faults), "")
        size = sum(sizes(name) or 0 for name in names)
        return (Fault(row=at[0], column=at[1], reason=reason) if reason else None), len(names), size

    faults: list[Fault] = []
    chunks = stored = 0
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="verify") as pool:
        for at, (fault, count, size) in zip(known, pool.map(look, known), strict=True):
            chunks, stored = chunks + count, stored + size
            faults += [fault] if fault else []
            if listener is not None:
                listener(plan.grid.window(*at).pixels)
    return Verification(
        is_finished="run" in header,
        parts=parts,
        tiles=len(plan.grid),
        chunks=chunks,
        stored_bytes=stored,
        has_records=bool(records),
        faults=tuple(faults),
        unfinished=tuple(at for at in plan.grid if at not in states),
        failed=tuple(at for at in plan.grid if states.get(at) == "failed"),
    )


def tile_states(out: Path, header: dict[str, Any]) -> dict[tuple[int, int], str]:
    """ "done" or "failed" of each tile that has an end: by the records; without them by `status`, which is written when
    a run ends, or where that is damaged by the summary of that run.

    Raises:
        OutputError: neither is there.
    """
    plan, records = plan_of(out, header), read_records(out)
    if records:
        ended = {at: record["state"] for at, record in records.items() if record["state"] in ("done", "failed")}
        return {at: ended[at] for at in plan.grid if at in ended}
    try:
        status = np.asarray(open_array(out, STATUS)[...])
        if status.shape == plan.grid.counts:
            return {at: "failed" if status[at] == FAILED else "done" for at in plan.grid if status[at]}
    except Exception as error:
        if "run" not in header:
            raise OutputError(
                f"{out} has neither its run's folder nor tile states: its run never ended; run the same command again"
            ) from error
    return states_by_header(header, iter(plan.grid))


def _pixels_of(kind: str, plan: TilePlan) -> list[str]:
    """Arrays whose chunks belong to tiles."""
    return [kind, *([CONTEXT] if plan.receptive is not None else [])]


def _find_fault(
    out: Path, name: str, recorded: Any, sizes: Callable[[str], int | None], array: zarr.Array[Any] | None
) -> str:
    """Args: array: that has the chunk; None: not to be decoded."""
    if recorded is not None:
        fault = find_chunk_fault(out, name, tuple(recorded), sizes, read=True)
        if fault:
            return fault
    elif sizes(name) is None:
        return f"{name} is missing"
    if array is None:
        return ""
    try:
        array[chunk_window(array, name)]
    except Exception as error:  # noqa: BLE001 - codecs raise what they like
        return f"{name} cannot be decoded: {first_line(error)}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputation:
    """Stored pixels beside the same pixels computed in another way."""

    tiles: int
    pixels: int
    wrong: tuple[Fault, ...]
    """Tiles with pixels that differ beyond rounding."""
    ties: int
    """Pixels of another class where the reference's two best logits are equal up to rounding."""
    seconds: float
    by: str = "torch"
    """What recomputed."""

    def sentence(self) -> str:
        wrong = f"{len(self.wrong)} tiles WRONG" if self.wrong else "all equal"
        ties = f", {self.ties} ties" if self.ties else ""
        return f"{self.tiles} tiles, {self.pixels} px recomputed in larger windows by {self.by}: {wrong}{ties}"


def recompute_samples(
    out: Path,
    reference: Reference,
    samples: int,
    skip: frozenset[tuple[int, int]],
    kind: str,
) -> Recomputation:
    """Compare patches at corners of tiles, spread over the output, with the reference.

    Args:
        samples: tiles to compare, or all where there are fewer.
        skip: tiles that hold nothing to compare.

    Raises:
        RasterError: the source of no sampled tile can be read.
    """
    began, plan, bound = time.perf_counter(), reference.plan, bound_of(reference.network.module)
    array, reader = open_array(out, kind), reference.raster.open_reader()
    seen: dict[tuple[int, int], None] = {}
    wrong: dict[tuple[int, int], str] = {}
    pixels = ties = attempt = 0
    failure: RasterError | None = None
    wanted = min(samples, len(plan.grid) - len(skip))
    while len(seen) < wanted and attempt < 20 * (samples + 1):
        patches = sample_patches(plan, attempt)
        fresh = [at for at in dict.fromkeys((p.row, p.column) for p in patches) if at not in seen and at not in skip]
        chosen = fresh[: wanted - len(seen)]
        attempt += 1
        for patch in patches:
            at = (patch.row, patch.column)
            if at not in chosen:
                continue
            try:
                finished, logits = reference.run(reader, patch.window)
                missing = reference.find_missing(reader, patch.window)
            except RasterError as error:
                failure, reader = error, reference.raster.open_reader()
                continue
            seen[at] = None
            finished = as_stored(finished.copy(), missing)
            differs, tied = _compare(
                _stored(array, plan, patch.window), finished, logits, kind, relative_tolerance(plan.precision), bound
            )
            pixels, ties = pixels + differs.size, ties + int(tied.sum())
            if differs.any():
                wrong[at] = f"{int(differs.sum())} of {differs.size} sampled pixels differ from the reference"
    reader.close()
    if not seen and failure is not None:
        raise failure
    return Recomputation(
        tiles=len(seen),
        pixels=pixels,
        wrong=tuple(Fault(row=row, column=column, reason=reason) for (row, column), reason in wrong.items()),
        ties=ties,
        seconds=time.perf_counter() - began,
        by=reference.by,
    )


def _stored(array: Any, plan: TilePlan, window: Window) -> Array:
    """(channels, height, width) of an output, by a window of the whole result."""
    y, x = (value - origin for value, origin in zip((window.y, window.x), plan.output_origin, strict=True))
    rows, columns = slice(y, y + window.height), slice(x, x + window.width)
    return np.asarray(array[rows, columns])[None] if array.ndim == 2 else np.asarray(array[:, rows, columns])


def _compare(
    stored: Array, finished: Array, logits: Array, kind: str, relative: float, bound: float | None
) -> tuple[Array, Array]:
    """(differs, tied), each (height, width), beyond and within rounding."""
    finite = np.abs(logits[np.isfinite(logits)].astype(np.float64))
    tolerance = relative * float(finite.max(initial=0.0))
    with np.errstate(invalid="ignore"):
        if kind in ("logits", "values"):
            near = np.abs(stored.astype(np.float64) - finished) <= tolerance
            same = near | (stored == finished) | (np.isnan(stored) & np.isnan(finished))
            return np.logical_not(np.all(same, axis=0)), np.zeros(stored.shape[1:], bool)
        if kind == "probability":
            # One level of 254, for a probability that lies between two, and what logits move it: half as far at most.
            levels = 1 + int(min(254.0, 254 * tolerance / 2))
            near = np.abs(stored.astype(np.int16) - finished.astype(np.int16)) <= levels
            return np.logical_not(np.all(near, axis=0)), np.zeros(stored.shape[1:], bool)
    other: Array = np.any(stored != finished, axis=0)
    if logits.dtype.kind in "bui":
        # Class numbers tell nothing of how near the next class was.
        tied: Array = other & bool(other.mean() <= MOST_TIES)
    elif len(logits) < 2:
        near_bound = np.abs(logits[0].astype(np.float64) - bound) <= tolerance if bound is not None else False
        tied = np.logical_and(other, near_bound)
    else:
        best = np.sort(logits.astype(np.float64), axis=0)
        tied = np.logical_and(other, best[-1] - best[-2] <= 2 * tolerance)
    return np.logical_and(other, ~tied), tied
