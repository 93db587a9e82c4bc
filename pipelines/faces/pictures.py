"""Pictures of faces to embeddings: read one by one, what cannot be used is named and left out."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...models.faceid.base.errors import HeadError
from ...models.faceid.base.name_list import require_name
from ...models.faceid.embedder.file import Embedder
from ...models.faceid.gallery.top_k import unit_rows
from ...models.faceid.pictures.images import ImageError, PeopleFolder, read_picture
from ...tiler.base.text import one_line
from ...tiler.system.plain_file import open_plain
from ..base.console import Console, count_of

BATCH = 32
"""Pictures that are embedded at once."""


@dataclass(slots=True, kw_only=True)
class Pictures:
    """Faces that could be embedded, and what was wrong with the others."""

    paths: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """The person of each; without persons empty texts."""
    embeddings: npt.NDArray[np.float32]
    """(faces, dim), of length 1."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(picture or person, reason)."""
    doubled: int = 0
    """Pictures left out since another file of the same person has the same content."""
    grey: int = 0
    resized: int = 0

    def failures(self) -> list[dict[str, str]]:
        """For JSON."""
        return [{"path": path, "reason": reason} for path, reason in self.failed]

    def counts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "images": len(self.paths),
            "failed": self.failures(),
            "doubled_images": self.doubled,
            "grey_images": self.grey,
            "resized_images": self.resized,
        }


def embed_people(console: Console, embedder: Embedder, found: PeopleFolder, *, resize: bool) -> Pictures:
    """Embed the pictures of persons.

    A file that has the content of another of the same person is left out; of another person it fails, since one
    picture cannot show two.
    """
    good: dict[str, list[Path]] = {}
    failed: list[tuple[str, str]] = [(name, "its folder has no picture") for name in found.empty]
    for name, paths in found.people.items():
        try:
            require_name(name)
        except HeadError as error:
            failed.append((name, str(error)))
        else:
            good[name] = paths
    if found.stray:
        console.remark(f"{describe_stray(found)}: no pictures, or in no person's folder")
    pairs = [(path, name) for name, paths in good.items() for path in paths]
    return _embed(console, embedder, pairs, failed, resize=resize, unique=True)


def describe_stray(found: PeopleFolder) -> str:
    """Files that are not used, the first by its name."""
    such = "such as " if len(found.stray) > 1 else ""
    return f"{count_of(len(found.stray), 'file')} left alone ({such}{one_line(found.stray[0].name)})"


def embed_files(console: Console, embedder: Embedder, paths: Iterable[Path], *, resize: bool) -> Pictures:
    """Embed pictures of whomever they show; the same file may come twice."""
    return _embed(console, embedder, [(path, "") for path in paths], [], resize=resize, unique=False)


def _embed(
    console: Console,
    embedder: Embedder,
    pairs: list[tuple[Path, str]],
    failed: list[tuple[str, str]],
    *,
    resize: bool,
    unique: bool,
) -> Pictures:
    result = Pictures(embeddings=np.empty((0, embedder.description.dim), np.float32), failed=failed)
    parts: list[npt.NDArray[np.float32]] = []
    reader = _read(result, embedder, pairs, resize=resize, unique=unique)
    began = time.monotonic()
    with console.step("embed", len(pairs), counts_pixels=False) as step:
        while batch := list(itertools.islice(reader, BATCH)):
            images = torch.from_numpy(np.stack([pixels for _, _, pixels in batch]))
            vectors = embedder.embed(images).double().numpy()
            for (path, name, _), vector in zip(batch, vectors, strict=True):
                try:
                    parts.append(unit_rows(vector[None]))
                except HeadError:
                    result.failed.append((str(path), "its embedding has no direction"))
                    continue
                result.paths.append(path)
                result.names.append(name)
            done = count_of(len(result.paths), "picture")
            step.advance(len(batch), f"{done}, {len(result.paths) / (time.monotonic() - began):.0f} a second")
    if parts:
        result.embeddings = np.concatenate(parts)
    _remark(console, result)
    return result


def _read(
    result: Pictures, embedder: Embedder, pairs: list[tuple[Path, str]], *, resize: bool, unique: bool
) -> Iterator[tuple[Path, str, npt.NDArray[np.uint8]]]:
    seen: dict[bytes, tuple[Path, str]] = {}
    height, width = embedder.description.height, embedder.description.width
    for path, name in pairs:
        try:
            if unique:
                with open_plain(path) as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                other, owner = seen.setdefault(content, (path, name))
                if other != path and owner == name:
                    result.doubled += 1
                    continue
                if other != path:
                    raise ImageError(f"it is the same file as {other}, of another person")
            picture = read_picture(path, height, width, resize=resize)
        except ImageError as error:
            result.failed.append((str(path), str(error)))
            continue
        except OSError as error:
            result.failed.append((str(path), f"it cannot be read: {error.strerror or error}"))
            continue
        result.grey += picture.was_grey
        result.resized += picture.was_resized
        yield path, name, picture.pixels


def _remark(console: Console, result: Pictures) -> None:
    """One line for each kind of thing that a user should know, and for each of the first pictures that failed."""
    failed = [one_line(f"{path}: {reason}") for path, reason in result.failed]
    console.remark_first(failed, "cannot be used; outsize --json names all" if result.paths else "cannot be used")
    if result.doubled:
        console.remark(f"{count_of(result.doubled, 'picture')} left out: the same file comes twice for one person")
    if result.grey:
        console.remark(f"{count_of(result.grey, 'picture')} without colour: grey was taken for red, green and blue")
    if result.resized:
        console.remark(f"{count_of(result.resized, 'picture')} resized")


def group_by_person(pictures: Pictures, *, each: bool) -> tuple[list[str], npt.NDArray[np.float32]]:
    """(names, templates): the mean of a person's unit embeddings, made of length 1 again; or each of them."""
    if each or not pictures.names:
        return pictures.names, pictures.embeddings
    counts = Counter(pictures.names)
    names, which = np.unique(pictures.names, return_inverse=True)
    means = np.zeros((len(names), pictures.embeddings.shape[1]))
    np.add.at(means, which, pictures.embeddings.astype(np.float64))
    means /= np.array([counts[name] for name in names.tolist()])[:, None]
    return names.tolist(), unit_rows(means)
