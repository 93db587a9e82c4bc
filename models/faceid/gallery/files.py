"""A gallery's files: rows with their owners, names, and a manifest for each generation, which is what makes them one.

GALLERY/rows-000000-000000007.tablet       of tablet 0, written for generation 7
GALLERY/names-000000-000000007.txt         16,384 names, a line each
GALLERY/generation-000000007.json          every file's SHA-256 and size; written last

A file is never changed. A generation names new files for what changed and old ones for what did not; when its manifest
is on the disk, everything that it does not name is deleted. Little endian, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ....tiler.system.files import sync_folder
from ....tiler.system.plain_file import NoFileError, open_plain
from ..base.errors import GalleryError
from ..layer.tablet_file import FileSum, as_bytes, write_file

FORMAT = 2
KNOWN_FORMATS = (1, 2)
"""The first had no checksum of owners alone."""
MAGIC = b"OUTGALL\0"
TABLET_FORMAT = 1
HEADER_BYTES = 128
_HEADER = struct.Struct("<8sIIQQQ")
STORAGE = {"float32": torch.float32, "float16": torch.float16}
LOCK = "lock"
_OURS = re.compile(r"\.?(rows-\d{6}-\d{9}\.tablet|names-\d{6}-\d{9}\.txt|generation-\d{9}\.json)(\.partial)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSum:
    """A file of a generation."""

    name: str
    sha256: str
    size: int
    owners_sha256: str | None = None
    """Of a tablet's owners alone, which are read without its rows."""


Signature = tuple[int, ...]
"""What tells a file that was looked at from another that stands in its place: device, inode, size, times of change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How like somebody in the gallery those are who are not in it."""

    scores: list[float]
    """Of each stranger's picture the best with anybody, descending."""
    of: str
    """"strangers", or "enrolled": persons in the gallery compared with all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A generation."""

    generation: int
    dim: int
    storage: str
    embedder: str
    """SHA-256 of the embedder that made the rows."""
    rows: int
    """Those of removed persons included, which hold zeros."""
    tablet_rows: int
    tablets: list[NamedSum]
    names: list[NamedSum]
    calibration: Calibration | None

    @property
    def files(self) -> list[NamedSum]:
        return [*self.tablets, *self.names]

    @property
    def row_bytes(self) -> int:
        return self.dim * STORAGE[self.storage].itemsize

    def rows_of(self, index: int) -> int:
        """Of a tablet."""
        return min(self.tablet_rows, self.rows - index * self.tablet_rows)


def manifest_name(generation: int) -> str:
    return f"generation-{generation:09d}.json"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a generation, whose files are there."""
    sync_folder(folder)
    body = asdict(manifest)
    text = json.dumps({"format": FORMAT, "sha256": _digest(body), "gallery": body}, indent=1)
    write_file(folder / manifest_name(manifest.generation), [text.encode()])
    sync_folder(folder)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def has_gallery(folder: Path) -> bool:
    """Whether a gallery is or was in a folder, sound or not."""
    return any(folder.glob("generation-*.json"))


def is_free(folder: Path) -> bool:
    """Whether a gallery can be made in a folder: it is empty, but for what a kill left of the making of one."""
    return all(path.name == f".{manifest_name(0)}.partial" for path in folder.iterdir())


def read_newest(folder: Path) -> Manifest:
    """The newest generation whose manifest is sound.

    Raises:
        GalleryError: there is none.
    """
    reasons: list[str] = []
    for path in sorted(folder.glob("generation-*.json"), reverse=True):
        try:
            return _read_manifest(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reasons.append(f"{path.name} is damaged ({error})")
    lacks = "has no generation" if folder.is_dir() else "is not there"
    raise GalleryError(f"{folder} is no gallery: {'; '.join(reasons) or f'it {lacks}; outsize face enroll makes one'}")


def _read_manifest(path: Path) -> Manifest:
    with open_plain(path) as file:
        value = json.loads(file.read())
    if value["format"] not in KNOWN_FORMATS:
        raise ValueError(f"format {value['format']}, this version reads {' and '.join(map(str, KNOWN_FORMATS))}")
    body = value["gallery"]
    if _digest(body) != value["sha256"]:
        raise ValueError("its checksum is another")
    calibration = body.pop("calibration")
    tablets, names = ([NamedSum(**entry) for entry in body.pop(kind)] for kind in ("tablets", "names"))
    manifest = Manifest(
        **body, tablets=tablets, names=names, calibration=Calibration(**calibration) if calibration else None
    )
    _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Refuse numbers that do not fit each other, and names that lead out of the folder."""
    numbers = (manifest.generation, manifest.dim, manifest.rows, manifest.tablet_rows)
    if not all(type(number) is int for number in numbers) or min(numbers) < 0 or min(numbers[1], numbers[3]) < 1:
        raise ValueError(f"generation, dim, rows and rows of a tablet are {', '.join(map(str, numbers))}")
    if manifest.storage not in STORAGE or len(manifest.tablets) != -(-manifest.rows // manifest.tablet_rows):
        raise ValueError(f"{manifest.rows} rows of {manifest.storage} in {len(manifest.tablets)} tablets")
    for kind, entries in (("rows-", manifest.tablets), ("names-", manifest.names)):
        for entry in entries:
            if not (_OURS.fullmatch(entry.name) and entry.name.startswith(kind)):
                raise ValueError(f"it names the file {entry.name!r}")


def write_rows(
    folder: Path, generation: int, index: int, rows: Tensor, owners: npt.NDArray[np.int64], first: int
) -> NamedSum:
    """Write a tablet: header, rows (R, D), owners (R,), flushed to the disk."""
    name = f"rows-{index:06d}-{generation:09d}.tablet"
    header = _HEADER.pack(
        MAGIC, TABLET_FORMAT, list(STORAGE.values()).index(rows.dtype), first, rows.shape[0], rows.shape[1]
    ).ljust(HEADER_BYTES, b"\0")
    whose = owners.astype("<i8").tobytes()
    written = _named(name, write_file(folder / name, [header, as_bytes(rows), whose]))
    return replace(written, owners_sha256=hashlib.sha256(whose).hexdigest())


def write_names(folder: Path, generation: int, index: int, chunk: bytes) -> NamedSum:
    """Write a chunk of names."""
    name = f"names-{index:06d}-{generation:09d}.txt"
    return _named(name, write_file(folder / name, [chunk]))


def _named(name: str, written: FileSum) -> NamedSum:
    return NamedSum(name=name, sha256=written.sha256, size=written.size)


def read_rows(folder: Path, manifest: Manifest, index: int, start: int, out: Tensor) -> Signature:
    """Read rows of a tablet from `start` on into `out` (n, D), which is contiguous and of the gallery's type; of which
    file, whose checksum is the caller's to look at.

    Raises:
        GalleryError: the file is gone or too short.
    """
    entry = manifest.tablets[index]
    view = as_bytes(out)
    with _open(folder, entry) as file:
        found = _signature(file)
        file.seek(HEADER_BYTES + start * manifest.row_bytes)
        if file.readinto(view) != view.nbytes:
            raise GalleryError(f"{folder / entry.name} ends too early")
    return found


def read_owners(folder: Path, manifest: Manifest, index: int) -> npt.NDArray[np.int64]:
    """(R,): of a tablet, against their checksum; its header must be the manifest's.

    Raises:
        GalleryError: damaged, another's, or gone.
    """
    entry, rows = manifest.tablets[index], manifest.rows_of(index)
    with _open(folder, entry) as file:
        _check_header(folder, manifest, index, file.read(HEADER_BYTES))
        if entry.owners_sha256 is None:
            check_tablet(folder, manifest, index)
        file.seek(HEADER_BYTES + rows * manifest.row_bytes)
        value = file.read(8 * rows + 1)
    if len(value) != 8 * rows:
        raise GalleryError(f"{folder / entry.name} must hold {rows} owners, got {len(value) // 8}")
    if entry.owners_sha256 not in (None, hashlib.sha256(value).hexdigest()):
        raise _damaged(folder, entry)
    return np.frombuffer(value, "<i8").astype(np.int64)


def _check_header(folder: Path, manifest: Manifest, index: int, value: bytes) -> None:
    wanted = (
        MAGIC,
        TABLET_FORMAT,
        list(STORAGE).index(manifest.storage),
        index * manifest.tablet_rows,
        manifest.rows_of(index),
        manifest.dim,
    )
    if _HEADER.unpack_from(value.ljust(HEADER_BYTES, b"\0")) != wanted:
        name = manifest.tablets[index].name
        raise GalleryError(f"{folder / name} is damaged: its header is not the manifest's")


def check_tablet(folder: Path, manifest: Manifest, index: int) -> Signature:
    """Compare a tablet with its checksum; which file it was.

    Raises:
        GalleryError: damaged, or gone.
    """
    entry, digest = manifest.tablets[index], hashlib.sha256()
    with _open(folder, entry) as file:
        found = _signature(file)
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != entry.sha256:
        raise _damaged(folder, entry)
    return found


def read_whole(folder: Path, manifest: Manifest, index: int, out: Tensor | None = None) -> Tensor:
    """The rows of a tablet, against its checksum.

    Args:
        out: (R, D), contiguous and of the gallery's type, that they are read into; None: a new one.

    Raises:
        GalleryError: damaged, or gone.
    """
    entry = manifest.tablets[index]
    if out is None:
        out = torch.empty((manifest.rows_of(index), manifest.dim), dtype=STORAGE[manifest.storage])
    view, digest = as_bytes(out), hashlib.sha256()
    with _open(folder, entry) as file:
        digest.update(file.read(HEADER_BYTES))
        whole = file.readinto(view) == view.nbytes
        digest.update(view)
        digest.update(file.read(8 * len(out)))
        if not whole or file.read(1) or digest.hexdigest() != entry.sha256:
            raise _damaged(folder, entry)
    return out


def read_names(folder: Path, manifest: Manifest, index: int) -> bytes:
    """A chunk of names.

    Raises:
        GalleryError: damaged, or gone.
    """
    entry = manifest.names[index]
    with _open(folder, entry) as file:
        chunk = file.read(entry.size + 1)
    if hashlib.sha256(chunk).hexdigest() != entry.sha256:
        raise _damaged(folder, entry)
    return chunk


def _damaged(folder: Path, entry: NamedSum) -> GalleryError:
    return GalleryError(f"{folder / entry.name} is damaged: its checksum is not the manifest's")


def _signature(file: BufferedReader) -> Signature:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _open(folder: Path, entry: NamedSum) -> BufferedReader:
    try:
        return open_plain(folder / entry.name)
    except NoFileError as error:
        raise GalleryError(f"{folder / entry.name} is damaged: {error.strerror}") from None
    except FileNotFoundError:
        raise GalleryError(
            f"{folder / entry.name} is gone: somebody changed the gallery since it was opened, open it again"
        ) from None


def find_damage(folder: Path, manifest: Manifest) -> list[str]:
    """Read every file against its checksum; what is wrong with each that is damaged."""
    damaged: list[str] = []
    for entry in manifest.files:
        digest = hashlib.sha256()
        try:
            with open_plain(folder / entry.name) as file:
                while part := file.read(1 << 22):
                    digest.update(part)
        except OSError as error:
            damaged.append(f"{entry.name}: {error.strerror}")
            continue
        if digest.hexdigest() != entry.sha256:
            damaged.append(f"{entry.name}: its checksum is not the manifest's")
    return damaged


def find_leftovers(folder: Path, manifest: Manifest) -> list[Path]:
    """Files of other generations, manifests first: what is half deleted must not look whole."""
    kept = {manifest_name(manifest.generation), *(entry.name for entry in manifest.files)}
    found = [path for path in folder.iterdir() if _OURS.fullmatch(path.name) and path.name not in kept]
    return sorted(found, key=lambda path: ("generation-" not in path.name, path.name))


def remove_all(folder: Path) -> None:
    """Delete a gallery's files, manifests first."""
    for path in sorted(folder.iterdir(), key=lambda path: ("generation-" not in path.name, path.name)):
        if path.name == LOCK or _OURS.fullmatch(path.name):
            path.unlink()
    sync_folder(folder)


def remove_leftovers(folder: Path, manifest: Manifest) -> int:
    """Delete files of other generations, from the disk too; how many."""
    leftovers = find_leftovers(folder, manifest)
    for path in leftovers:
        with suppress(FileNotFoundError):
            path.unlink()
    if leftovers:
        sync_folder(folder)
    return len(leftovers)
