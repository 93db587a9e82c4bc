"""Small parts: what lies in an output beside its pixels, found damaged and written again from its header."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..base.errors import OutputError
from ..base.text import first_line
from ..rasters.georeference import from_attributes
from ..system.files import MOST_TEXT, make_folder, read_place, sizes_below, write_whole
from .records import RunFolder, writing
from .store import (
    DONE,
    FAILED,
    STATUS,
    OutputDescription,
    create_placed_output,
    finish_metadata,
    open_array,
    plan_of,
    read_attributes,
    read_header,
    write_status,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFault:
    """An array whose metadata, or a small one whose values, are not what the header says."""

    array: str
    reason: str


GATHERED = ".zmetadata"
"""All metadata of a v2 store in one file."""
States = Mapping[tuple[int, int], Any]


def find_part_faults(out: Path, states: States) -> tuple[PartFault, ...]:
    """Look at the metadata of every array of an output, and at the values of coordinates and tile states.

    Args:
        states: "done" or "failed" of each tile that has one, by the records; empty where there are none.
    """
    header, sizes = read_header(out), sizes_below(out)
    faults: list[PartFault] = []
    with _made_anew(out, header, states) as twin:
        for name in sorted(zarr.open_group(str(twin), mode="r", use_consolidated=False).array_keys()):
            reason = _find_fault(out, twin, name, sizes)
            if reason:
                faults.append(PartFault(array=name, reason=reason))
        if (twin / GATHERED).exists() and not _is_json(out / GATHERED):
            faults.append(PartFault(array=GATHERED, reason=f"{GATHERED} cannot be decoded"))
    return tuple(faults)


def mend_parts(out: Path, faults: tuple[PartFault, ...], states: States) -> None:
    """Write damaged parts again; chunks of pixels are not touched.

    Raises:
        OutputError: the output cannot be written, or is being written by a run.
    """
    with writing(out), RunFolder(out):
        header = read_header(out)
        with _made_anew(out, header, states) as twin:
            for name in {fault.array for fault in faults}:
                for file in sorted(path for path in (twin / name).rglob("*") if path.is_file()):
                    place = out / file.relative_to(twin).as_posix()
                    make_folder(place.parent)
                    write_whole(place, file.read_bytes())
        finish_metadata(out)


def states_by_header(header: Mapping[str, Any], tiles: Iterator[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Of a finished output without records: what the summary of its last run calls failed, the others done."""
    failed = {(entry["row"], entry["column"]) for entry in header["run"]["failures"]}
    return {at: "failed" if at in failed else "done" for at in tiles}


@contextmanager
def _made_anew(out: Path, header: dict[str, Any], states: States) -> Iterator[Path]:
    """The same output without pixels, in a folder of its own."""
    plan = plan_of(out, header)
    attributes = read_attributes(out)
    reference: dict[str, Any] | None = None
    with suppress(OutputError):  # the group's own attributes say the same
        reference = dict(open_array(out, "spatial_ref").attrs)
    with tempfile.TemporaryDirectory(prefix="outsize-") as folder:
        twin = Path(folder, "twin.zarr")
        try:
            create_placed_output(
                twin,
                plan=plan,
                description=OutputDescription.from_json(header),
                place=from_attributes(attributes, reference),
                header={},
                zarr_format=2 if header["fingerprint"].get("zarr_format") == 2 else 3,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{out} has damaged metadata: {error}; segment --overwrite makes it anew") from error
        if "run" in header:
            status = np.zeros(plan.grid.counts, np.uint8)
            for at in plan.grid:
                status[at] = {"done": DONE, "failed": FAILED}.get(states.get(at, ""), 0)
            write_status(twin, status)
        yield twin


def _find_fault(out: Path, twin: Path, name: str, sizes: Callable[[str], int | None]) -> str:
    """What is wrong with an array; empty where nothing is."""
    meant = open_array(twin, name)
    chunks = [path for path in (twin / name).rglob("*") if path.is_file() and not _is_metadata(path.name)]
    for path in (twin / name).iterdir():
        if _is_metadata(path.name) and sizes(f"{name}/{path.name}") is None:
            return f"{name}/{path.name} is missing"
    try:
        found = open_array(out, name)
    except OutputError as error:
        return f"metadata of {name} cannot be read: {first_line(error.__cause__ or error)}"
    for what in ("shape", "dtype", "chunks"):
        if getattr(found, what) != getattr(meant, what):
            return f"metadata of {name} say {what} {getattr(found, what)}, not {getattr(meant, what)}"
    for path in chunks:
        if sizes(path.relative_to(twin).as_posix()) is None:
            return f"{path.relative_to(twin).as_posix()} is missing"
    if chunks:
        try:
            values = np.asarray(found[...])
        except Exception as error:  # noqa: BLE001 - codecs raise what they like
            return f"{name} cannot be decoded: {first_line(error)}"
        # States may be behind the records, after a call that was interrupted.
        if name != STATUS and not np.allclose(values, np.asarray(meant[...]), rtol=1e-12, atol=0):
            return f"{name} holds other values than the header says"
    return ""


def _is_json(place: Path) -> bool:
    try:
        return isinstance(json.loads(read_place(place, MOST_TEXT)), dict)
    except (ValueError, OSError, RecursionError):
        return False


def _is_metadata(name: str) -> bool:
    return name in ("zarr.json", ".zarray", ".zattrs")
