"""Editing: what enrolling, replacing and removing do to rows and names, and the files of the generation after it.

Nothing here makes a generation valid: the manifest is written by who publishes what these functions return.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base.errors import HeadError
from ..base.name_list import NameList, compose, compose_all, require_name
from .files import STORAGE, Manifest, NamedSum, read_whole, write_names, write_rows
from .state import GalleryState
from .top_k import NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Rows that get other owners, and persons who come or go."""

    at: npt.NDArray[np.int64]
    """(n,): the rows, those beyond the last one new."""
    owners: npt.NDArray[np.int32]
    """(n,): the person of each; -1: nobody."""
    unit: npt.NDArray[np.float32]
    """(m, dim): what the first m of the rows hold; the others zeros."""
    removed: tuple[int, ...] = ()
    """Numbers of persons who go."""
    added: tuple[str, ...] = ()
    """Names of persons who come; their numbers follow on the last one."""


def require_names(names: Sequence[str], count: int) -> list[str]:
    """Names of so many embeddings, composed.

    Raises:
        HeadError: another number of names, none, or what is no name.
    """
    if len(names) != count or not count:
        raise HeadError(f"each embedding needs a name, and there must be one, got {len(names)} and {count}")
    composed = compose_all(names)
    for name in composed:
        require_name(name)
    return composed


def plan_enrolment(state: GalleryState, names: list[str], unit: npt.NDArray[np.float32], *, add: bool) -> Edit:
    """New rows at the end.

    Args:
        names: of each vector, composed.
        add: persons who are there already get more templates.

    Raises:
        HeadError: somebody is there already, and `add` is not given.
    """
    numbers = state.names.find(set(names))
    if numbers and not add:
        raise HeadError(f"{_list(sorted(numbers))} in the gallery already; replace them, or add templates to them")
    fresh = [name for name in dict.fromkeys(names) if name not in numbers]
    numbers |= {name: len(state.names) + place for place, name in enumerate(fresh)}
    owners = np.array([numbers[name] for name in names], np.int32)
    at = np.arange(len(state.owners), len(state.owners) + len(owners))
    return Edit(at=at, owners=owners, unit=unit, added=tuple(fresh))


def plan_replacement(state: GalleryState, names: list[str], unit: npt.NDArray[np.float32]) -> Edit:
    """Other vectors in the rows of some persons.

    Args:
        names: of each vector, composed.

    Raises:
        HeadError: somebody is not there.
    """
    numbers = _find_all(state, names)
    owners = np.array([numbers[name] for name in names], np.int32)
    taken = state.rows_of(np.unique(owners))
    # Old places are filled again, whoever's they were; what is left over is emptied, or goes to the end.
    at = np.concatenate([taken, np.arange(len(owners) - len(taken)) + len(state.owners)])[: len(owners)]
    empty = taken[len(owners) :]
    at = np.concatenate([at, empty])
    owners = np.concatenate([owners, np.full(len(empty), NOBODY, np.int32)])
    return Edit(at=at, owners=owners, unit=unit)


def plan_removal(state: GalleryState, names: Iterable[str]) -> Edit:
    """Nobody and zeros in the rows of some persons.

    Raises:
        HeadError: somebody is not there.
    """
    numbers = _find_all(state, names)
    empty = state.rows_of(np.fromiter(numbers.values(), np.int64))
    return Edit(
        at=empty,
        owners=np.full(len(empty), NOBODY, np.int32),
        unit=np.empty((0, state.manifest.dim), np.float32),
        removed=tuple(numbers.values()),
    )


def _find_all(state: GalleryState, names: Iterable[str]) -> dict[str, int]:
    wanted = set(compose_all(names))
    numbers = state.names.find(wanted)
    if missing := wanted - numbers.keys():
        raise HeadError(f"{_list(sorted(missing))} not in the gallery")
    if not wanted:
        raise HeadError("a change needs at least one name")
    return numbers


def write_edit(folder: Path, state: GalleryState, edit: Edit) -> GalleryState:
    """The generation after an edit, its files written: those that it touches, or, where holes are too many, all."""
    old = state.manifest
    everyone = np.concatenate([state.owners, np.full(max(0, int(edit.at.max()) + 1 - old.rows), NOBODY, np.int32)])
    everyone[edit.at] = edit.owners
    names = state.names.copy()
    touched_names = names.change(list(edit.removed), list(edit.added))
    manifest = replace(old, generation=old.generation + 1, rows=len(everyone), calibration=None)
    after = replace(state, manifest=manifest, owners=everyone, names=names)
    if np.count_nonzero(everyone == NOBODY) > max(old.tablet_rows, len(everyone) // 2):
        # Nothing but holes is removed on the way, so that one generation does both.
        return _write_compact(folder, after, old, edit.at, edit.unit)
    tablets = _write_touched(folder, after, old, edit)
    chunks = list(old.names)
    for index in sorted(touched_names):
        entry = write_names(folder, manifest.generation, index, names.chunks[index])
        chunks[index : index + 1] = [entry]
    return replace(after, manifest=replace(manifest, tablets=tablets, names=chunks))


def _write_touched(folder: Path, after: GalleryState, old: Manifest, edit: Edit) -> list[NamedSum]:
    """All tablets; those that have a row of the edit are written anew."""
    size, at = old.tablet_rows, edit.at
    tablets = list(old.tablets)
    order = np.argsort(at, kind="stable")
    sorted_at = at[order]
    for index in np.unique(at // size).tolist():
        part = order[slice(*np.searchsorted(sorted_at, [index * size, (index + 1) * size]))]
        rows = torch.zeros((after.manifest.rows_of(index), old.dim), dtype=after.dtype)
        if index < len(old.tablets):
            before = read_whole(folder, old, index)
            rows[: len(before)] = before
        _fill(rows, at[part] - index * size, part, edit.unit)
        whose = after.owners[index * size : index * size + len(rows)].astype(np.int64)
        entry = write_rows(folder, after.manifest.generation, index, rows, whose, index * size)
        tablets[index : index + 1] = [entry]
    return tablets


def write_composed(folder: Path, state: GalleryState) -> tuple[GalleryState, bool]:
    """(the generation in which persons whose names differ in nothing but how accents are written are one, its files
    written; whether there were such persons). Its calibration is kept where there were none."""
    names = [compose(state.names.name(number)) for number in range(len(state.names))]
    first: dict[str, int] = {}
    owner = np.array([first.setdefault(name, number) for number, name in enumerate(names)], np.int32)
    is_merged = len(first) < len(names) - names.count("") + ("" in first)
    everyone = np.where(state.owners == NOBODY, NOBODY, owner[state.owners]).astype(np.int32)
    fresh = NameList()
    fresh.change([], [name if first[name] == number else "" for number, name in enumerate(names)])
    old = state.manifest
    calibration = None if is_merged else old.calibration
    manifest = replace(old, generation=old.generation + 1, calibration=calibration)
    after = replace(state, manifest=manifest, owners=everyone, names=fresh)
    nothing = np.empty(0, np.int64), np.empty((0, old.dim), np.float32)
    return _write_compact(folder, after, old, *nothing), is_merged


def _write_compact(
    folder: Path, state: GalleryState, old: Manifest, at: npt.NDArray[np.int64], unit: npt.NDArray[np.float32]
) -> GalleryState:
    """The files of a generation without holes: rows in the same order, persons numbered anew in the same order.

    Args:
        state: its rows as they are numbered in `old`, those of `at` changed to `unit`.
    """
    size = old.tablet_rows
    live = np.flatnonzero(state.owners != NOBODY)
    numbers, owners = np.unique(state.owners[live], return_inverse=True)
    owners = owners.astype(np.int32)
    names = NameList()
    touched = names.change([], [state.names.name(int(number)) for number in numbers])
    generation = state.manifest.generation
    changed = {int(row): place for place, row in enumerate(at.tolist())}
    reader = _OldRows(folder, old)
    tablets: list[NamedSum] = []
    for start in range(0, len(live), size):
        chosen = live[start : start + size]
        rows = reader.read(chosen)
        moved = np.array([place for place, row in enumerate(chosen.tolist()) if row in changed], np.int64)
        _fill(rows, moved, np.array([changed[int(row)] for row in chosen[moved]], np.int64), unit)
        whose = owners[start : start + size].astype(np.int64)
        tablets.append(write_rows(folder, generation, len(tablets), rows, whose, start))
    chunks = [write_names(folder, generation, index, names.chunks[index]) for index in sorted(touched)]
    manifest = replace(state.manifest, rows=len(live), tablets=tablets, names=chunks)
    return replace(state, manifest=manifest, owners=owners, names=names)


class _OldRows:
    """Rows of a generation, asked for in ascending order: a tablet is read once, and one is held."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._held: tuple[int, Tensor] = (-1, torch.empty(0))

    def read(self, chosen: npt.NDArray[np.int64]) -> Tensor:
        """(chosen, dim); zeros in place of rows that the generation has not."""
        manifest, size = self._manifest, self._manifest.tablet_rows
        rows = torch.zeros((len(chosen), manifest.dim), dtype=STORAGE[manifest.storage])
        for index in np.unique(chosen // size).tolist():
            if index >= len(manifest.tablets):
                continue
            if self._held[0] != index:
                self._held = (index, read_whole(self._folder, manifest, index))
            tablet = self._held[1]
            places = np.flatnonzero(chosen // size == index)
            there = chosen[places] - index * size
            known = there < len(tablet)
            rows[torch.from_numpy(places[known])] = tablet[torch.from_numpy(there[known])]
        return rows


def _fill(
    rows: Tensor, places: npt.NDArray[np.int64], which: npt.NDArray[np.int64], unit: npt.NDArray[np.float32]
) -> None:
    """Rows at `places` become the vectors `which`; those beyond the last vector zeros."""
    given = which < len(unit)
    rows[torch.from_numpy(places[~given])] = 0
    rows[torch.from_numpy(places[given])] = torch.from_numpy(unit[which[given]]).to(rows.dtype)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"
