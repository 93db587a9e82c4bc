"""What a training reads its pictures from: anything with labels, and pictures by number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..base.errors import HeadError
from .images import ImageError, Picture, read_picture
from .record_io import RecordFile

Pixels = npt.NDArray[np.uint8]
Whole = npt.NDArray[np.int64]
Read = tuple[list[Pixels | None], list[tuple[str, str]], int]
"""((height, width, 3) of each sample, or None where it cannot be used; (name, reason) of those that cannot; how many of
the others are grey)."""


class FaceSource(Protocol):
    """Samples of identities 0 ... identities - 1."""

    identities: int
    size: tuple[int, int]
    """(height, width) of every picture."""

    @property
    def names(self) -> Sequence[str]:
        """Of the identities, each once, by number; computed where they are asked for."""
        ...

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def labels_of(self, samples: Whole, epochs: Whole) -> Whole:
        """The identity of each, without reading a picture."""
        ...

    def read(self, samples: Whole, epochs: Whole) -> Read:
        """The pictures; called by several threads."""
        ...

    def describe(self) -> dict[str, Any]:
        """What tells this source from another, as plain values."""
        ...


class PictureFiles:
    """Pictures that are files."""

    def __init__(
        self, paths: Sequence[str], labels: Whole, names: Sequence[str], size: tuple[int, int], *, resize: bool = False
    ) -> None:
        """Args:
        labels: of each path, numbers of `names`.
        resize: scale pictures of other sizes, of the same shape.
        """
        self._paths, self._labels, self.names = list(paths), labels, list(names)
        self.identities, self.size, self._resize = len(names), size, resize

    def __len__(self) -> int:
        return len(self._paths)

    def labels_of(self, samples: Whole, epochs: Whole) -> Whole:  # noqa: ARG002 - the same in every epoch
        return self._labels[samples]

    def read(self, samples: Whole, epochs: Whole) -> Read:  # noqa: ARG002 - the same in every epoch
        height, width = self.size
        paths = [self._paths[sample] for sample in samples.tolist()]
        reads = [lambda path=path: read_picture(Path(path), height, width, resize=self._resize) for path in paths]
        return _read_each(paths, reads)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path, label in zip(self._paths, self._labels.tolist(), strict=True):
            digest.update(f"{self.names[label]}\0{Path(path).name}\n".encode())
        return {"pictures": len(self), "identities": self.identities, "sha256": digest.hexdigest()}


class RecordPictures:
    """Pictures of a RecordIO file; identities are its different labels, in their order."""

    def __init__(self, file: RecordFile, size: tuple[int, int], *, resize: bool = False) -> None:
        """Args:
        resize: scale pictures of other sizes, of the same shape.
        """
        self._file, self.size, self._resize = file, size, resize
        numbers, self._labels = np.unique(file.labels, return_inverse=True)
        self.identities, self.names = len(numbers), [str(number) for number in numbers.tolist()]

    def __len__(self) -> int:
        return len(self._file.keys)

    def labels_of(self, samples: Whole, epochs: Whole) -> Whole:  # noqa: ARG002 - the same in every epoch
        return self._labels[samples]

    def read(self, samples: Whole, epochs: Whole) -> Read:  # noqa: ARG002 - the same in every epoch
        height, width = self.size
        places = samples.tolist()
        names = [self._file.name_of(int(self._file.keys[place])) for place in places]
        reads = [
            lambda place=place: read_picture(self._file.read(place), height, width, resize=self._resize)
            for place in places
        ]
        return _read_each(names, reads)

    def describe(self) -> dict[str, Any]:
        return {"pictures": len(self), "identities": self.identities, **self._file.describe()}


def _read_each(names: list[str], reads: Sequence[Callable[[], Picture]]) -> Read:
    pixels: list[Pixels | None] = []
    failed: list[tuple[str, str]] = []
    grey = 0
    for name, read in zip(names, reads, strict=True):
        try:
            picture = read()
        except ImageError as error:
            pixels.append(None)
            failed.append((name, str(error)))
        else:
            pixels.append(picture.pixels)
            grey += picture.was_grey
    return pixels, failed, grey


class SourcePart:
    """Some identities of a source, numbered anew in the order in which they are given."""

    def __init__(self, source: FaceSource, identities: Whole) -> None:
        """Args:
        identities: of the source, without repetition. Its labels must be the same in every epoch.
        """
        self._source, self._chosen = source, identities
        self._numbers = np.full(source.identities, -1, np.int64)
        self._numbers[identities] = np.arange(len(identities))
        everything = np.arange(len(source))
        labels = source.labels_of(everything, np.zeros_like(everything))
        self._samples = np.flatnonzero(self._numbers[labels] >= 0)
        self.identities, self.size = len(identities), source.size
        if not len(self._samples):
            raise HeadError("a part of a source must have pictures, got identities without any")

    @property
    def names(self) -> Sequence[str]:
        names = self._source.names
        return [names[int(identity)] for identity in self._chosen]

    def __len__(self) -> int:
        return len(self._samples)

    def labels_of(self, samples: Whole, epochs: Whole) -> Whole:
        return self._numbers[self._source.labels_of(self._samples[samples], epochs)]

    def read(self, samples: Whole, epochs: Whole) -> Read:
        return self._source.read(self._samples[samples], epochs)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._chosen.tobytes()).hexdigest()
        return {**self._source.describe(), "part": self.identities, "part_sha256": digest}


def hold_out(source: FaceSource, count: int, seed: int) -> tuple[FaceSource, FaceSource | None]:
    """(source without `count` identities, those), drawn by the seed among identities with two pictures or more.

    Raises:
        HeadError: fewer than 2 identities would be left, or there are not so many with two pictures.
    """
    if not count:
        return source, None
    everything = np.arange(len(source))
    pictures = np.bincount(source.labels_of(everything, np.zeros_like(everything)), minlength=source.identities)
    several = np.flatnonzero(pictures > 1)
    if count > len(several) or source.identities - count < 2:
        raise HeadError(
            f"{count} identities cannot be held out of {source.identities}, of which {len(several)} have two pictures "
            "or more and 2 must be left; hold out fewer"
        )
    random = np.random.Generator(np.random.Philox(key=[seed, 19]))
    chosen = np.sort(random.permutation(several)[:count])
    rest = np.setdiff1d(np.flatnonzero(pictures), chosen)
    return SourcePart(source, rest), SourcePart(source, chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roll:
    """Which class each identity of a training is, by name, so that more can come without a number being changed."""

    classes: Sequence[str]
    """By number."""
    held_out: Sequence[str]
    """Identities that are measured with."""


def keep_roll(source: FaceSource, roll: Roll) -> tuple[FaceSource, FaceSource | None]:
    """(training part, part that is measured with) of a source, as a roll has them; identities that are not in it are
    classes behind its own, in their order.

    Raises:
        HeadError: classes of the roll are not in the source.
    """
    number = {name: place for place, name in enumerate(source.names)}
    lost = [name for name in roll.classes if name not in number]
    if lost:
        more = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        raise HeadError(
            f"identities that were trained on must stay in the source, {', '.join(lost[:5])}{more} "
            f"{'is' if len(lost) == 1 else 'are'} not there any more"
        )
    held = [number[name] for name in roll.held_out if name in number]
    if not held and list(roll.classes) == list(source.names):
        return source, None
    everything = np.arange(len(source))
    pictures = np.bincount(source.labels_of(everything, np.zeros_like(everything)), minlength=source.identities)
    old = np.array([number[name] for name in roll.classes], np.int64)
    fresh = np.setdiff1d(np.flatnonzero(pictures), np.concatenate([old, np.array(held, np.int64)]))
    measured = SourcePart(source, np.sort(np.array(held, np.int64))) if held else None
    return SourcePart(source, np.concatenate([old, fresh])), measured
