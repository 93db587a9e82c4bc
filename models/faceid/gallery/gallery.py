"""The gallery: enrolled faces, looked up exactly; changed without training, in files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import distributed as dist

from ....tiler.base.text import parse_bytes, reason_of
from ..base.collectives import Ranks
from ..base.errors import GalleryError, HeadError
from ..base.name_list import compose_all
from ..layer.tablets import ROWS
from .calibration import PROBES, compare_enrolled, compare_strangers, describe_rates, find_rate, find_threshold
from .editing import (
    Edit,
    plan_enrolment,
    plan_removal,
    plan_replacement,
    require_names,
    write_composed,
    write_edit,
)
from .files import (
    LOCK,
    STORAGE,
    Calibration,
    Manifest,
    find_damage,
    find_leftovers,
    is_free,
    manifest_name,
    read_newest,
    remove_all,
    remove_leftovers,
    write_manifest,
)
from .lookup import Answer, Lookup, name_answers, unit_vectors
from .search import Tell
from .search_plan import SearchPlan
from .state import GalleryState


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
        self.folder = folder
        self._lookup = Lookup(memory_bytes=memory, threads=threads or torch.get_num_threads())
        self._ranks = Ranks.of(group)
        self._state = GalleryState.read(folder)

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
        self._take(GalleryState.read(self.folder))

    def _take(self, state: GalleryState) -> None:
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
        return self._state.templates

    @property
    def people(self) -> int:
        """Persons."""
        return self._state.people

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

    def plan_identify(self, queries: int, k: int = 5) -> SearchPlan:
        """What `identify` takes in this process.

        Raises:
            HeadMemoryError: the budget is too small.
        """
        return self._lookup.plan(self._state, queries, k, self._ranks.size)

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
        unit = unit_vectors(embeddings, self.dim)
        state = self._state  # another thread may change the gallery meanwhile
        self._require_one_generation(state.manifest.generation)
        return name_answers(state, self._lookup.search(state, unit, k, self._ranks, tell), threshold)

    def _require_one_generation(self, generation: int) -> None:
        """Ranks that opened the gallery before and after a change would search the rows of neither."""
        found = self._ranks.gather_tablets(torch.tensor([generation]), [1] * self._ranks.size).unique().tolist()
        if len(found) > 1:
            raise GalleryError(
                f"{self.folder} was changed while ranks opened it: generations {', '.join(map(str, found))}; open it "
                f"again on all of them"
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
        unit = unit_vectors(embeddings, self.dim)
        names = require_names(names, len(unit))
        with self._changing():
            edit = plan_enrolment(self._state, names, unit, add=add)
            self._edit(edit, calibrate, tell)
        return len(edit.added)

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
        unit = unit_vectors(embeddings, self.dim)
        names = require_names(names, len(unit))
        with self._changing():
            self._edit(plan_replacement(self._state, names, unit), calibrate, tell)

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
            edit = plan_removal(self._state, names)
            self._edit(edit, calibrate, tell)
        return len(edit.at)

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
            if strangers is None:
                calibration = compare_enrolled(self._state, self._lookup, probes, tell)
            else:
                calibration = compare_strangers(self._state, self._lookup, strangers, tell)
            manifest = replace(self._state.manifest, generation=self.generation + 1, calibration=calibration)
            self._publish(replace(self._state, manifest=manifest))
        return calibration

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
        return find_threshold(calibration, fpir)

    def describe_rates(self) -> str:
        """Which rates the calibration knows thresholds of, in words."""
        return describe_rates(self.calibration)

    def rate_of(self, score: float) -> float | None:
        """The share of the calibration's strangers who have such a score with somebody, or a higher one."""
        return None if self.calibration is None else find_rate(self.calibration, score)

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

    def _compose_names(self) -> None:
        """Make one person of those whose names differ in nothing but how accents are written, as galleries have them
        that are older than this rule."""
        try:
            with self._changing():
                if self._state.names.is_composed:  # somebody else was first
                    return
                was_calibrated = self.calibration is not None
                state, is_merged = write_composed(self.folder, self._state)
                self._publish(state, calibrate=is_merged and was_calibrated)
        except OSError as error:
            raise GalleryError(
                f"{self.folder} has names whose accents are characters of their own, which are to be composed, and "
                f"cannot be written: {reason_of(error)}; open it once where it can"
            ) from error

    def _edit(self, edit: Edit, calibrate: bool, tell: Tell | None) -> None:
        self._publish(write_edit(self.folder, self._state, edit), calibrate, tell)

    def _publish(self, state: GalleryState, calibrate: bool = False, tell: Tell | None = None) -> None:
        """Make a generation of files that are there, then delete what it does not name.

        Args:
            calibrate: by its own persons first, if it has two.
        """
        state = state.with_rows_of(self._state)
        if calibrate:
            found = compare_enrolled(state, self._lookup, tell=tell) if state.people > 1 else None
            state = replace(state, manifest=replace(state.manifest, calibration=found)).with_rows_of(state)
        write_manifest(self.folder, state.manifest)
        self._state = state
        remove_leftovers(self.folder, state.manifest)
