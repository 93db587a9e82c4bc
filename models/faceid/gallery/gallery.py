"""The gallery: enrolled faces, looked up exactly; changed without training, in files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch import distributed as dist

from ....tiler.base.text import parse_bytes, reason_of
from ..base.collectives import Ranks
from ..base.errors import GalleryError, HeadError
from ..base.name_list import NameList, compose, compose_all, require_name
from ..layer.tablets import BLOCK_ROWS, ROWS, TabletLayout
from .files import (
    LOCK,
    STORAGE,
    Calibration,
    Manifest,
    NamedSum,
    find_damage,
    find_leftovers,
    is_free,
    manifest_name,
    read_names,
    read_newest,
    read_owners,
    read_whole,
    remove_all,
    remove_leftovers,
    write_manifest,
    write_names,
    write_rows,
)
from .rows import GalleryRows, TabletRows
from .search import Tell, search_rows
from .search_plan import SearchPlan, plan_search
from .top_k import NOBODY, Best, unit_rows

ALONE = Ranks(group=None, rank=0, size=1)
PROBES = 1000
"""Persons that are compared with all others to learn how like strangers are."""
EXPECTED = 10
"""Strangers that must be expected beyond a threshold before its rate is believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Somebody in the gallery."""

    name: str
    score: float
    """Cosine of her nearest template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Who a face may be."""

    matches: tuple[Match, ...]
    """Persons beyond the threshold, nearest first; none: unknown."""
    nearest: float
    """The highest score of anybody; -infinity in an empty gallery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """A generation in memory."""

    manifest: Manifest
    owners: npt.NDArray[np.int32]
    """(rows,): the person's number; -1 where a row's person was removed."""
    names: NameList
    rows: TabletRows

    @classmethod
    def read(cls, folder: Path) -> _State:
        manifest = read_newest(folder)
        names = NameList(read_names(folder, manifest, index) for index in range(len(manifest.names)))
        parts: list[npt.NDArray[np.int32]] = []
        for index, entry in enumerate(manifest.tablets):
            whose = read_owners(folder, manifest, index)
            if whose.min() < NOBODY or whose.max() >= len(names):
                raise GalleryError(
                    f"{folder / entry.name} is damaged: its rows belong to persons {whose.min()} ... {whose.max()}, "
                    f"there are {len(names)}"
                )
            parts.append(whose.astype(np.int32))
        owners = np.concatenate(parts) if parts else np.empty(0, np.int32)
        return cls(manifest=manifest, owners=owners, names=names, rows=TabletRows(folder, manifest))

    def with_rows_of(self, before: _State) -> _State:
        """The same; what was read and checked of the generation before is not read again."""
        return replace(self, rows=TabletRows(self.rows.folder, self.manifest, before.rows))


class Gallery:
    """Faces by name, one or more templates each: identify(embeddings) -> the nearest persons, exactly.

    Guarantee: scores are the dot products of the stored rows and the query, both of length 1, exact to a float64's
    rounding, and order is (score descending, then order of enrolment); the same bits for any number of ranks and
    threads. Memory stays below `plan_identify(...).total_bytes`, which is within the budget. Files change by whole
    generations: after a kill at any moment the gallery is as before or as after. What is stored of a person: the name
    and the templates.

    Ranks of torch.distributed share the work of `identify`, which all of them call with the same faces; changes are
    made by one process, then the others `reload`.
    """

    def __init__(self, folder: Path, memory: int, threads: int | None, group: dist.ProcessGroup | None) -> None:
        self.folder, self._memory = folder, memory
        self._threads = threads or torch.get_num_threads()
        self._ranks = Ranks.of(group)
        self._state = _State.read(folder)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        dim: int,
        embedder: str,
        storage: str = "float32",
        tablet_rows: int = ROWS,
        memory: int | str = "2GB",
        threads: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Gallery:
        """A new, empty gallery.

        Args:
            dim: numbers of an embedding.
            embedder: SHA-256 of the embedder (`EmbedderFile.sha256`), or any word that names what makes the embeddings.
            storage: "float32", or "float16": half the bytes; scores are exact over rows as they are stored.

        Raises:
            HeadError: a rule is broken; the folder holds something.
        """
        root = Path(folder)
        if storage not in STORAGE:
            raise HeadError(f"storage must be one of {', '.join(STORAGE)}, got {storage}")
        if dim < 1 or tablet_rows < 1 or not embedder:
            raise HeadError(f"dim must be >= 1 and embedder named, got {dim} and {embedder!r}")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # embeddings are biometric data
        if not is_free(root):
            raise HeadError(f"{root} must be a new or empty folder, got files there")
        manifest = Manifest(
            generation=0,
            dim=dim,
            storage=storage,
            embedder=embedder,
            rows=0,
            tablet_rows=tablet_rows,
            tablets=[],
            names=[],
            calibration=None,
        )
        write_manifest(root, manifest)
        return cls(root, parse_bytes(memory), threads, group)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        embedder: str | None = None,
        memory: int | str = "2GB",
        threads: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Gallery:
        """A gallery that is there. What an interrupted change left behind is deleted.

        Args:
            embedder: what makes the faces that will be looked up; None: not compared.
            memory: of this process; rows are kept in it where they fit.
            threads: None: torch's number.

        Raises:
            GalleryError: there is none, it is damaged, or another embedder made it.
        """
        root = Path(folder)
        gallery = cls(root, parse_bytes(memory), threads, group)
        if embedder is not None and embedder != gallery.embedder:
            raise GalleryError(
                f"{root} was made by another embedder: {gallery.embedder[:16]} there, {embedder[:16]} now; scores "
                f"between two embedders mean nothing: take that one, or enroll into a new gallery"
            )
        if not gallery._state.names.is_composed:
            gallery._compose_names()
        if find_leftovers(root, gallery._state.manifest):
            try:
                with gallery._changing():
                    pass
            except (GalleryError, OSError):
                pass  # somebody is changing it, or it may only be read
        return gallery

    @staticmethod
    def discard(folder: str | Path) -> None:
        """Delete what is there of a gallery that never had anybody in it, but for the folder; any other stays."""
        root = Path(folder)
        with suppress(Timeout), FileLock(str(root / LOCK), timeout=0):
            if {path.name for path in root.glob("generation-*.json")} <= {manifest_name(0)}:
                remove_all(root)

    def reload(self) -> None:
        """Take up what another process changed."""
        self._take(_State.read(self.folder))

    def _take(self, state: _State) -> None:
        self._state = state.with_rows_of(self._state)

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return self._state.manifest.dim

    @property
    def storage(self) -> str:
        """Type of the rows."""
        return self._state.manifest.storage

    @property
    def embedder(self) -> str:
        """What made the embeddings."""
        return self._state.manifest.embedder

    @property
    def generation(self) -> int:
        """One more after each change."""
        return self._state.manifest.generation

    @property
    def calibration(self) -> Calibration | None:
        """How like strangers are; a change discards it."""
        return self._state.manifest.calibration

    @property
    def templates(self) -> int:
        """Rows of all persons."""
        return int(np.count_nonzero(self._state.owners != NOBODY))

    @property
    def people(self) -> int:
        """Persons."""
        owners = self._state.owners
        return int(np.count_nonzero(np.bincount(owners[owners != NOBODY])))

    @property
    def stored_bytes(self) -> int:
        """Of the files."""
        return sum(entry.size for entry in self._state.manifest.files)

    def names(self) -> Iterator[str]:
        """Of all persons, in the order of enrolment."""
        return iter(self._state.names)

    def __contains__(self, name: str) -> bool:
        return bool(self._state.names.find([name]))

    def find(self, names: Iterable[str]) -> set[str]:
        """Those of some names that are in the gallery, composed (`name_list.compose`)."""
        return set(self._state.names.find(compose_all(names)))

    def find_damage(self) -> list[str]:
        """Read every file against its checksum; what is wrong with each that is damaged."""
        return find_damage(self.folder, self._state.manifest)

    def _layout(self, state: _State, ranks: int) -> TabletLayout | None:
        manifest = state.manifest
        if not manifest.rows:
            return None
        block = min(BLOCK_ROWS, manifest.tablet_rows)
        while manifest.tablet_rows % block:
            block -= 1
        return TabletLayout(classes=manifest.rows, ranks=ranks, tablet_rows=manifest.tablet_rows, block_rows=block)

    def plan_identify(self, queries: int, k: int = 5) -> SearchPlan:
        """What `identify` takes in this process.

        Raises:
            HeadMemoryError: the budget is too small.
        """
        return self._plan(self._state, queries, k, self._ranks.size)

    def _plan(self, state: _State, queries: int, k: int, ranks: int) -> SearchPlan:
        return plan_search(
            self._layout(state, ranks),
            self.dim,
            storage=self.storage,
            item_bytes=STORAGE[self.storage].itemsize,
            queries=queries,
            k=k,
            threads=self._threads,
            # While they are made, owners are there twice.
            names_bytes=state.names.held_bytes + 4 * state.owners.nbytes,
            budget=self._memory,
        )

    def identify(
        self,
        embeddings: npt.ArrayLike,
        k: int = 5,
        threshold: float | None = None,
        *,
        tell: Tell | None = None,
    ) -> list[Answer]:
        """Who each face may be: the k nearest persons, exactly.

        Args:
            embeddings: (faces, dim) of any length but 0.
            threshold: persons are named where score > threshold; None: always.
            tell: told of progress.

        Raises:
            HeadError: wrong shapes or numbers.
            HeadMemoryError: the budget is too small.
            GalleryError: the gallery is damaged, or somebody changed it: open it again.
        """
        if threshold is not None and np.isnan(threshold):
            raise HeadError("a threshold must be a number, got nan, beyond which nobody is")
        unit = self._unit(embeddings)
        state = self._state  # another thread may change the gallery meanwhile
        self._require_one_generation(state.manifest.generation)
        best = self._search(state, unit, k, self._ranks, tell)
        answers: list[Answer] = []
        for scores, owners in zip(best.scores.tolist(), best.owners.tolist(), strict=True):
            found = tuple(
                Match(name=state.names.name(owner), score=score)
                for score, owner in zip(scores, owners, strict=True)
                if owner != NOBODY and (threshold is None or score > threshold)
            )
            answers.append(Answer(matches=found, nearest=scores[0]))
        return answers

    def _require_one_generation(self, generation: int) -> None:
        """Ranks that opened the gallery before and after a change would search the rows of neither."""
        found = self._ranks.gather_tablets(torch.tensor([generation]), [1] * self._ranks.size).unique().tolist()
        if len(found) > 1:
            raise GalleryError(
                f"{self.folder} was changed while ranks opened it: generations {', '.join(map(str, found))}; open it "
                f"again on all of them"
            )

    def _unit(self, embeddings: npt.ArrayLike) -> npt.NDArray[np.float32]:
        if isinstance(embeddings, Tensor):
            given = embeddings.detach().cpu()
            embeddings = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
        values = np.asarray(embeddings)
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise HeadError(f"embeddings must be (faces, {self.dim}) for this gallery, got {values.shape}")
        return unit_rows(values)

    def _search(self, state: _State, unit: npt.NDArray[np.float32], k: int, ranks: Ranks, tell: Tell | None) -> Best:
        if k < 1:
            raise HeadError(f"k must be >= 1, got {k}")
        layout = self._layout(state, ranks.size)
        if layout is None:
            return Best.none(len(unit), k)
        plan = self._plan(state, len(unit), k, ranks.size)
        source = GalleryRows(state.rows, state.owners, keep=not plan.reads_disk)
        return search_rows(
            source, unit, k, layout, ranks=ranks, threads=self._threads, query_part=plan.query_part, tell=tell
        )

    def enroll(
        self,
        names: Sequence[str],
        embeddings: npt.ArrayLike,
        *,
        add: bool = False,
        calibrate: bool = False,
        tell: Tell | None = None,
    ) -> int:
        """Add persons; returns how many are new. Nothing is trained.

        Args:
            names: of each embedding; one that comes several times has several templates.
            embeddings: (len(names), dim).
            add: give more templates to those who are there already, who are refused otherwise.
            calibrate: let persons of the gallery stand in for strangers afterwards, as `calibrate` without strangers
                does; both are one change.
            tell: told of the progress of that.

        Raises:
            HeadError: wrong names or embeddings; somebody is there already. Nothing has changed then.
            GalleryError: another process is changing the gallery.
        """
        unit = self._unit(embeddings)
        names = self._names(names, len(unit))
        with self._changing():
            state = self._state
            numbers = state.names.find(set(names))
            if numbers and not add:
                raise HeadError(
                    f"{_list(sorted(numbers))} in the gallery already; replace them, or add templates to them"
                )
            fresh = [name for name in dict.fromkeys(names) if name not in numbers]
            numbers |= {name: len(state.names) + place for place, name in enumerate(fresh)}
            owners = np.array([numbers[name] for name in names], np.int32)
            at = np.arange(len(state.owners), len(state.owners) + len(owners))
            self._publish(self._rewrite(state, at, owners, unit, removed=[], added=fresh), calibrate, tell)
        return len(fresh)

    def replace(
        self, names: Sequence[str], embeddings: npt.ArrayLike, *, calibrate: bool = False, tell: Tell | None = None
    ) -> None:
        """Give persons other templates than they had.

        Args:
            calibrate: let persons of the gallery stand in for strangers afterwards, as `calibrate` without strangers
                does; both are one change.
            tell: told of the progress of that.

        Raises:
            HeadError: wrong names or embeddings; somebody is not there. Nothing has changed then.
            GalleryError: another process is changing the gallery.
        """
        unit = self._unit(embeddings)
        names = self._names(names, len(unit))
        with self._changing():
            state = self._state
            numbers = self._numbers(names)
            owners = np.array([numbers[name] for name in names], np.int32)
            taken = self._rows_of(np.unique(owners))
            # Old places are filled again, whoever's they were; what is left over is emptied, or goes to the end.
            at = np.concatenate([taken, np.arange(len(owners) - len(taken)) + len(state.owners)])[: len(owners)]
            empty = taken[len(owners) :]
            at = np.concatenate([at, empty])
            owners = np.concatenate([owners, np.full(len(empty), NOBODY, np.int32)])
            self._publish(self._rewrite(state, at, owners, unit, removed=[], added=[]), calibrate, tell)

    def remove(self, names: Iterable[str], *, calibrate: bool = False, tell: Tell | None = None) -> int:
        """Remove persons; returns how many templates went. Their names and templates are in no file afterwards.

        Args:
            calibrate: let persons of the gallery stand in for strangers afterwards, as `calibrate` without strangers
                does; both are one change.
            tell: told of the progress of that.

        Raises:
            HeadError: somebody is not there. Nothing has changed then.
            GalleryError: another process is changing the gallery.
        """
        with self._changing():
            numbers = self._numbers(names)
            empty = self._rows_of(np.fromiter(numbers.values(), np.int64))
            owners = np.full(len(empty), NOBODY, np.int32)
            none = np.empty((0, self.dim), np.float32)
            state = self._rewrite(self._state, empty, owners, none, removed=list(numbers.values()), added=[])
            self._publish(state, calibrate, tell)
        return len(empty)

    def calibrate(
        self, strangers: npt.ArrayLike | None = None, probes: int = PROBES, *, tell: Tell | None = None
    ) -> Calibration:
        """Learn how like somebody in the gallery those are who are not in it, and store it.

        Args:
            strangers: (faces, dim) of persons who are not in the gallery; the best score of each is stored. None: one
                template of each of up to `probes` persons of the gallery, spread evenly over them, compared with
                everybody else.
            tell: told of progress.

        Raises:
            HeadError: there is nobody to compare.
            GalleryError: another process is changing the gallery.
        """
        with self._changing():
            calibration = self._compare(strangers, probes, tell)
            manifest = replace(self._state.manifest, generation=self.generation + 1, calibration=calibration)
            self._publish(replace(self._state, manifest=manifest))
        return calibration

    def _compare(self, strangers: npt.ArrayLike | None, probes: int, tell: Tell | None) -> Calibration:
        """What `calibrate` stores."""
        if strangers is not None:
            unit, own = self._unit(strangers), None
        else:
            unit, own = self._probes(probes)
        best = self._search(self._state, unit, 1 if own is None else 2, ALONE, tell)
        scores = best.scores[:, 0]
        if own is not None:
            scores = np.where(best.owners[:, 0] == own, best.scores[:, 1], scores)
        scores = np.sort(scores[np.isfinite(scores)])[::-1]
        if not len(scores):
            raise HeadError("a calibration needs faces that can be compared with another person's, got none")
        return Calibration(scores=scores.tolist(), of="enrolled" if strangers is None else "strangers")

    def _probes(self, probes: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """(unit vectors, whose): the first template of some persons."""
        owners = self._state.owners
        whose, first = np.unique(owners, return_index=True)
        whose, first = whose[whose != NOBODY], first[whose != NOBODY]
        chosen = np.unique(np.linspace(0, len(whose) - 1, min(probes, len(whose))).astype(np.int64))
        order = chosen[np.argsort(first[chosen])]
        rows = [self._state.rows.read_row(int(row)) for row in first[order]]
        if not rows:
            return np.empty((0, self.dim), np.float32), whose
        return unit_rows(np.stack(rows)), whose[order]

    def threshold_for(self, fpir: float) -> float:
        """The threshold beyond which a stranger's best score lies with at most this probability, as the calibration has
        it: of its n scores at most fpir n lie beyond.

        Raises:
            HeadError: there is no calibration, or one of too few scores: 10 must be expected beyond.
        """
        if not 0 < fpir < 1:
            raise HeadError(f"a false positive identification rate must lie between 0 and 1, got {fpir}")
        calibration = self.calibration
        if calibration is None:
            raise HeadError(f"{self.folder} has no calibration, which a rate needs; calibrate it, or give a threshold")
        count = len(calibration.scores)
        if fpir * count < EXPECTED:
            raise HeadError(
                f"a rate of {fpir:g} needs a calibration of at least {int(np.ceil(EXPECTED / fpir)):,} faces, "
                f"{self.describe_rates()}"
            )
        return calibration.scores[int(fpir * count + 1e-9)]  # scores equal to it are rejected too

    def describe_rates(self) -> str:
        """Which rates the calibration knows thresholds of, in words."""
        count = len(self.calibration.scores) if self.calibration else 0
        lowest = _round_up(EXPECTED / count) if count else 1.0
        then = f"take a rate from {lowest:g} on" if lowest < 1 else "give a threshold"
        return f"this one has {count:,}; calibrate with more strangers, or {then}"

    def rate_of(self, score: float) -> float | None:
        """The share of the calibration's strangers who have such a score with somebody, or a higher one."""
        if self.calibration is None:
            return None
        scores = np.array(self.calibration.scores)
        return float(np.count_nonzero(scores >= score) / len(scores))

    def _names(self, names: Sequence[str], count: int) -> list[str]:
        """Names of a change, composed."""
        if len(names) != count or not count:
            raise HeadError(f"each embedding needs a name, and there must be one, got {len(names)} and {count}")
        composed = compose_all(names)
        for name in composed:
            require_name(name)
        return composed

    def _numbers(self, names: Iterable[str]) -> dict[str, int]:
        wanted = set(compose_all(names))
        numbers = self._state.names.find(wanted)
        if missing := wanted - numbers.keys():
            raise HeadError(f"{_list(sorted(missing))} not in the gallery")
        if not wanted:
            raise HeadError("a change needs at least one name")
        return numbers

    def _rows_of(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        return np.flatnonzero(np.isin(self._state.owners, numbers))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the gallery alone, as its newest generation is."""
        try:
            lock = FileLock(str(self.folder / LOCK), timeout=0)
            lock.acquire()
        except Timeout:
            raise GalleryError(f"another process is changing {self.folder}; try again when it has ended") from None
        try:
            if read_newest(self.folder).generation != self.generation:
                self.reload()
            remove_leftovers(self.folder, self._state.manifest)
            yield
        except BaseException:
            with suppress(GalleryError, OSError):
                remove_leftovers(self.folder, read_newest(self.folder))  # nobody is in a file who was not enrolled
            raise
        finally:
            lock.release()

    def _rewrite(
        self,
        state: _State,
        at: npt.NDArray[np.int64],
        owners: npt.NDArray[np.int32],
        unit: npt.NDArray[np.float32],
        *,
        removed: list[int],
        added: list[str],
    ) -> _State:
        """The files of a generation in which the rows `at` have other owners; the first len(unit) of them these
        vectors, the others zeros."""
        old, dtype = state.manifest, STORAGE[self.storage]
        size = old.tablet_rows
        everyone = np.concatenate([state.owners, np.full(max(0, int(at.max()) + 1 - old.rows), NOBODY, np.int32)])
        everyone[at] = owners
        names = state.names.copy()
        touched_names = names.change(removed, added)
        manifest = replace(old, generation=old.generation + 1, rows=len(everyone), calibration=None)
        if np.count_nonzero(everyone == NOBODY) > max(size, len(everyone) // 2):
            # Nothing but holes is removed on the way, so that one generation does both.
            return self._compact(replace(state, manifest=manifest, owners=everyone, names=names), old, at, unit)
        tablets = list(old.tablets)
        order = np.argsort(at, kind="stable")
        sorted_at = at[order]
        for index in np.unique(at // size).tolist():
            part = order[slice(*np.searchsorted(sorted_at, [index * size, (index + 1) * size]))]
            rows = torch.zeros((manifest.rows_of(index), self.dim), dtype=dtype)
            if index < len(old.tablets):
                before = read_whole(self.folder, old, index)
                rows[: len(before)] = before
            _fill(rows, at[part] - index * size, part, unit)
            whose = everyone[index * size : index * size + len(rows)].astype(np.int64)
            entry = write_rows(self.folder, manifest.generation, index, rows, whose, index * size)
            tablets[index : index + 1] = [entry]
        chunks = list(old.names)
        for index in sorted(touched_names):
            entry = write_names(self.folder, manifest.generation, index, names.chunks[index])
            chunks[index : index + 1] = [entry]
        manifest = replace(manifest, tablets=tablets, names=chunks)
        return replace(state, manifest=manifest, owners=everyone, names=names)

    def _compose_names(self) -> None:
        """Make one person of those whose names differ in nothing but how accents are written, as galleries have them
        that are older than this rule."""
        try:
            with self._changing():
                state = self._state
                if state.names.is_composed:  # somebody else was first
                    return
                names = [compose(state.names.name(number)) for number in range(len(state.names))]
                first: dict[str, int] = {}
                owner = np.array([first.setdefault(name, number) for number, name in enumerate(names)], np.int32)
                merged = len(first) < len(names) - names.count("") + ("" in first)
                everyone = np.where(state.owners == NOBODY, NOBODY, owner[state.owners]).astype(np.int32)
                fresh = NameList()
                fresh.change([], [name if first[name] == number else "" for number, name in enumerate(names)])
                old = state.manifest
                calibration = None if merged else old.calibration
                manifest = replace(old, generation=old.generation + 1, calibration=calibration)
                after = replace(state, manifest=manifest, owners=everyone, names=fresh)
                none = np.empty((0, self.dim), np.float32)
                published = self._compact(after, old, np.empty(0, np.int64), none)
                self._publish(published, calibrate=merged and old.calibration is not None)
        except OSError as error:
            raise GalleryError(
                f"{self.folder} has names whose accents are characters of their own, which are to be composed, and "
                f"cannot be written: {reason_of(error)}; open it once where it can"
            ) from error

    def _compact(
        self, state: _State, old: Manifest, at: npt.NDArray[np.int64], unit: npt.NDArray[np.float32]
    ) -> _State:
        """The files of a generation without holes: rows in the same order, persons numbered anew in the same order."""
        size, dtype = old.tablet_rows, STORAGE[self.storage]
        live = np.flatnonzero(state.owners != NOBODY)
        numbers, owners = np.unique(state.owners[live], return_inverse=True)
        owners = owners.astype(np.int32)
        names = NameList()
        touched = names.change([], [state.names.name(int(number)) for number in numbers])
        generation = state.manifest.generation
        changed = {int(row): place for place, row in enumerate(at.tolist())}
        tablets: list[NamedSum] = []
        before: tuple[int, Tensor] = (-1, torch.empty(0))
        for start in range(0, len(live), size):
            chosen = live[start : start + size]
            rows = torch.zeros((len(chosen), self.dim), dtype=dtype)
            for index in np.unique(chosen // size).tolist():
                places = np.flatnonzero(chosen // size == index)
                if index < len(old.tablets):
                    if before[0] != index:
                        before = (index, read_whole(self.folder, old, index))
                    there = chosen[places] - index * size
                    known = there < len(before[1])
                    rows[torch.from_numpy(places[known])] = before[1][torch.from_numpy(there[known])]
            moved = np.array([place for place, row in enumerate(chosen.tolist()) if row in changed], np.int64)
            _fill(rows, moved, np.array([changed[int(row)] for row in chosen[moved]], np.int64), unit)
            whose = owners[start : start + size].astype(np.int64)
            tablets.append(write_rows(self.folder, generation, len(tablets), rows, whose, start))
        chunks = [write_names(self.folder, generation, index, names.chunks[index]) for index in sorted(touched)]
        manifest = replace(state.manifest, rows=len(live), tablets=tablets, names=chunks)
        return replace(state, manifest=manifest, owners=owners, names=names)

    def _calibrated(self, state: _State, tell: Tell | None) -> _State:
        """A generation whose files are there, calibrated by its own persons if it has two."""
        before = self._state
        self._take(state)
        try:
            calibration = self._compare(None, PROBES, tell) if self.people > 1 else None
        finally:
            self._take(before)
        return replace(state, manifest=replace(state.manifest, calibration=calibration))

    def _publish(self, state: _State, calibrate: bool = False, tell: Tell | None = None) -> None:
        """Make a generation of files that are there, then delete what it does not name."""
        if calibrate:
            state = self._calibrated(state, tell)
        write_manifest(self.folder, state.manifest)
        self._take(state)
        remove_leftovers(self.folder, state.manifest)


def _fill(
    rows: Tensor, places: npt.NDArray[np.int64], which: npt.NDArray[np.int64], unit: npt.NDArray[np.float32]
) -> None:
    """Rows at `places` become the vectors `which`; those beyond the last vector zeros."""
    given = which < len(unit)
    rows[torch.from_numpy(places[~given])] = 0
    rows[torch.from_numpy(places[given])] = torch.from_numpy(unit[which[given]]).to(rows.dtype)


def _round_up(number: float) -> float:
    """To two digits."""
    unit = 10 ** (np.floor(np.log10(number)) - 1)
    return float(np.ceil(number / unit - 1e-9) * unit)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"
