"""Where `face train` gets its faces: synthetic:N, a folder of folders, a CSV or Parquet list, a RecordIO file."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...models.faceid.pictures.image_list import SUFFIXES, read_image_list
from ...models.faceid.pictures.images import find_people
from ...models.faceid.pictures.record_io import RecordFile
from ...models.faceid.pictures.source import (
    FaceSource,
    PictureFiles,
    Read,
    RecordPictures,
    Roll,
    Whole,
    hold_out,
    keep_roll,
)
from ...sample_data.faces import OUTSIDE_TRAINING
from ...sample_data.identities import Nuisances, draw_faces
from ...sample_data.identity_list import IdentityList
from ...tiler.base.errors import TilerError, UsageError
from ...tiler.base.text import reason_of
from ...tiler.system.plain_file import open_plain
from ..base.console import count_of
from .pictures import describe_stray

SYNTHETIC = "synthetic:"
HELD_OUT = 500
"""Identities that are kept for measuring where nothing is said; of real ones at most a twentieth."""
MOST_COMPARED = 200_000
"""Picture files whose contents are compared before a training."""
_TRIED = 20
"""Pictures, spread over all, that are opened to learn their size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticOptions:
    """Of synthetic identities."""

    samples: int
    """Of each in an epoch, on average."""
    zipf: float
    label_noise: float
    pose: float
    light: float
    occlusion: float
    noise: float


class SyntheticFaces:
    """Faces drawn where they are asked for; each epoch has new ones."""

    def __init__(
        self,
        samples: IdentityList,
        nuisances: Nuisances,
        size: tuple[int, int],
        seed: int,
        *,
        first_identity: int = 0,
        first_sample: int = 0,
    ) -> None:
        self._samples, self._nuisances, self.size, self._seed = samples, nuisances, size, seed
        self._first_identity, self._first_sample = first_identity, first_sample
        self.identities = samples.identities

    @property
    def names(self) -> Sequence[str]:
        """Faces of one seed and number are one person's."""
        return [f"synthetic {self._seed} {self._first_identity + number}" for number in range(self.identities)]

    def __len__(self) -> int:
        return len(self._samples)

    def labels_of(self, samples: Whole, epochs: Whole) -> Whole:
        return self._samples.look_up(samples, epochs)[2]

    def read(self, samples: Whole, epochs: Whole) -> Read:
        identity, number, _ = self._samples.look_up(samples, epochs)
        identity, number = identity + self._first_identity, number + self._first_sample
        return list(draw_faces(self._seed, identity, number, *self.size, self._nuisances)), [], 0

    def describe(self) -> dict[str, Any]:
        known = self._samples
        return {
            "identities": known.identities,
            "samples": known.samples,
            "zipf": known.zipf,
            "label_noise": known.label_noise,
            **asdict(self._nuisances),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedFaces:
    """What a training sees, and what it is measured on."""

    training: FaceSource
    held_out: FaceSource | None
    remarks: list[str]
    left_out: list[tuple[str, str]]
    """(picture or identity, reason) of what is not used from the start."""


def open_faces(
    text: str,
    *,
    size: tuple[int, int] | None,
    resize: bool,
    held_out: int | None,
    seed: int,
    synthetic: SyntheticOptions,
    roll: Roll | None = None,
) -> OpenedFaces:
    """Open a source; no picture is decoded but some to learn their size.

    Args:
        text: "synthetic:N", or the path of a folder, a .csv or .parquet list or a .rec file.
        size: (height, width) of the pictures; None: 32 x 32 of synthetic ones, that of most of others.
        resize: scale pictures of other sizes, of the same shape.
        held_out: identities to measure with; None: 500, or a twentieth of the real ones.
        roll: of the training that goes on, which tells the classes and whom it is measured with; synthetic ones have
            their numbers.

    Raises:
        UsageError: no such source, too few identities, values out of range.
        HeadError: so many cannot be held out; a RecordIO file that is none.
    """
    if text.startswith(SYNTHETIC):
        return _open_synthetic(text, size or (32, 32), HELD_OUT if held_out is None else held_out, seed, synthetic)
    path = Path(text)
    if path.suffix.lower() == ".rec":
        found = _open_records(path, size, resize=resize)
    elif path.is_dir():
        found = _open_folder(path, size, resize=resize)
    elif path.suffix.lower() in SUFFIXES:
        found = _open_list(path, size, resize=resize)
    else:
        raise UsageError(
            f"faces come from synthetic:N, a folder with a folder for each identity, NAME.csv, NAME.parquet or "
            f"NAME.rec, got {text}{'' if path.exists() else ', which is not there'}"
        )
    return _part(text, found, held_out, seed, roll)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A source as it lies there, before anybody is held out."""

    source: FaceSource
    remarks: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    """(picture or identity, reason) of what is not used."""


def _open_records(path: Path, size: tuple[int, int] | None, *, resize: bool) -> _Found:
    records = RecordFile(path)
    remarks = (
        f"{records.mixed:,} of {count_of(records.identity_records, 'identity record')} in {path.name} list pictures of "
        "several labels: the pictures' own labels count",
    )
    tried = _spread(len(records.keys))
    named = [(records.name_of(int(records.keys[place])), partial(records.read, place)) for place in tried]
    source = RecordPictures(records, _choose_size(named, size, resize=resize), resize=resize)
    return _Found(source=source, remarks=remarks if records.mixed else (), left_out=tuple(records.damaged))


def _open_folder(path: Path, size: tuple[int, int] | None, *, resize: bool) -> _Found:
    found = find_people(path)
    paths = [str(picture) for pictures in found.people.values() for picture in pictures]
    labels = np.repeat(np.arange(len(found.people)), [len(pictures) for pictures in found.people.values()])
    remarks = [f"{describe_stray(found)}: no pictures, or in no identity's folder"] if found.stray else []
    opened = _open_files(paths, labels, list(found.people), size, resize=resize)
    empty = [(name, "its folder has no picture") for name in found.empty]
    return replace(opened, remarks=(*remarks, *opened.remarks), left_out=(*empty, *opened.left_out))


def _open_list(path: Path, size: tuple[int, int] | None, *, resize: bool) -> _Found:
    listed = read_image_list(path)
    left_out = f"{count_of(listed.repeated, 'line')} of {path.name} left out: the picture is listed before"
    opened = _open_files(listed.paths, listed.labels, listed.names, size, resize=resize)
    return replace(opened, remarks=(*([left_out] if listed.repeated else []), *opened.remarks))


def _open_files(
    paths: list[str], labels: Whole, names: list[str], size: tuple[int, int] | None, *, resize: bool
) -> _Found:
    """Picture files of identities by number, but for files that are others' equals."""
    remarks: list[str] = []
    left_out: list[tuple[str, str]] = []
    if len(paths) <= MOST_COMPARED:
        twins = _find_twins(paths, labels)
        left_out += [(paths[place], reason) for place, reason in twins.items()]
        kept = np.setdiff1d(np.arange(len(paths)), np.fromiter(twins, np.int64, len(twins)))
        paths, labels = [paths[place] for place in kept], labels[kept]
    else:
        remarks.append(f"{len(paths):,} pictures: not compared with each other, as up to {MOST_COMPARED:,} are")
    named = [(paths[place], partial(Path, paths[place])) for place in _spread(len(paths))]
    source = PictureFiles(paths, labels, names, _choose_size(named, size, resize=resize), resize=resize)
    return _Found(source=source, remarks=tuple(remarks), left_out=tuple(left_out))


def _part(text: str, found: _Found, held_out: int | None, seed: int, roll: Roll | None) -> OpenedFaces:
    """Whom a source trains on, and whom it is measured with."""
    source, remarks, left_out = found.source, list(found.remarks), list(found.left_out)
    everything = np.arange(len(source))
    pictures = np.bincount(source.labels_of(everything, np.zeros_like(everything)), minlength=source.identities)
    if (pictures > 0).sum() < 2:
        raise UsageError(f"{text} must have 2 identities to tell apart, got {(pictures > 0).sum()}")
    single = int((pictures == 1).sum())
    if single:
        remarks.append(
            f"{single:,} of {source.identities:,} identities have one picture, which does not show how they vary"
        )
    if roll is not None:
        training, kept = keep_roll(source, roll)
        return OpenedFaces(training=training, held_out=kept, remarks=remarks, left_out=left_out)
    several = int((pictures > 1).sum())
    count = min(HELD_OUT, source.identities // 20, several) if held_out is None else held_out
    training, kept = hold_out(source, count, seed)
    return OpenedFaces(training=training, held_out=kept, remarks=remarks, left_out=left_out)


def _open_synthetic(
    text: str, size: tuple[int, int], held_out: int, seed: int, options: SyntheticOptions
) -> OpenedFaces:
    number = text.removeprefix(SYNTHETIC).replace("_", "").replace(",", "")
    if not number.isdecimal() or int(number) < 2:
        raise UsageError(f"synthetic faces need 2 identities or more, such as synthetic:2000, got {text}")
    count = int(number)
    try:
        nuisances = Nuisances(pose=options.pose, light=options.light, occlusion=options.occlusion, noise=options.noise)
        samples = IdentityList(
            identities=count, samples=options.samples, zipf=options.zipf, label_noise=options.label_noise, seed=seed
        )
        training = SyntheticFaces(samples, nuisances, size, seed)
        kept = None
        if held_out:
            shown = IdentityList(identities=max(2, held_out), samples=4)
            kept = SyntheticFaces(shown, nuisances, size, seed, first_identity=count, first_sample=OUTSIDE_TRAINING)
        draw_faces(0, np.zeros(1, np.int64), np.zeros(1, np.int64), *size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return OpenedFaces(training=training, held_out=kept, remarks=[], left_out=[])


def _spread(count: int) -> list[int]:
    """Up to `_TRIED` places among so many, evenly."""
    return sorted({place * count // _TRIED for place in range(_TRIED)} if count else set())


def _choose_size(
    pictures: Sequence[tuple[str, Callable[[], Path | bytes]]], wanted: tuple[int, int] | None, *, resize: bool
) -> tuple[int, int]:
    """(height, width) of the training: what is wanted, or what most of the pictures have, the first of equally frequent
    ones.

    Args:
        pictures: name, and what gives file or bytes, of some.

    Raises:
        UsageError: not one of them has the size that is wanted, or can be opened.
    """
    if wanted is not None and resize:
        return wanted
    sizes: Counter[tuple[int, int]] = Counter()
    reason = ""
    for name, give in pictures:
        try:
            picture = give()
            with (
                io.BytesIO(picture) if isinstance(picture, bytes) else open_plain(picture) as file,
                Image.open(file) as image,
            ):
                sizes[image.height, image.width] += 1
        except (TilerError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = reason or f"{name}: {reason_of(error)}"
    if wanted is not None:
        if sizes and not {wanted, wanted[::-1]} & sizes.keys():  # a camera's picture may lie on its side
            (height, width), _ = sizes.most_common(1)[0]
            raise UsageError(
                f"--size must be that of the pictures, got {wanted[0]} x {wanted[1]}, where not one of "
                f"{sizes.total()} that were opened has it and most have {height} x {width}; give --resize, or leave it "
                "out"
            )
        return wanted
    if not sizes:
        raise UsageError(f"pictures must be files that can be opened, got {len(pictures)} that cannot; {reason}")
    return sizes.most_common(1)[0][0]


def _find_twins(paths: Sequence[str], labels: Whole) -> dict[int, str]:
    """Files with the content of one before them, with the reason to leave them out."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for place, path in enumerate(paths):
        try:
            by_size[Path(path).stat().st_size].append(place)
        except (OSError, ValueError):
            continue  # it is named when it is read
    twins: dict[int, str] = {}
    for places in by_size.values():
        seen: dict[bytes, int] = {}
        for place in places if len(places) > 1 else ():
            try:
                with open_plain(paths[place]) as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            except OSError:
                continue
            other = seen.setdefault(content, place)
            if other != place:
                same = "the same" if labels[other] == labels[place] else "another"
                twins[place] = f"it is the same file as {paths[other]}, of {same} identity"
    return twins
