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
import re
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...tiler.files import sync_folder
from .errors import GalleryError
from .tablet_file import FileSum, as_bytes, write_file

FORMAT = 1
MAGIC = b"OUTGALL\0"
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
    value = json.loads(path.read_text())
    if value["format"] != FORMAT:
        raise ValueError(f"format {value['format']}, this version reads {FORMAT}")
    body = value["gallery"]
    if _digest(body) != value["sha256"]:
        raise ValueError("its checksum is another")
    calibration = body.pop("calibration")
    tablets, names = ([NamedSum(**entry) for entry in body.pop(kind)] for kind in ("tablets", "names"))
    return Manifest(
        **body, tablets=tablets, names=names, calibration=Calibration(**calibration) if calibration else None
    )


def write_rows(
    folder: Path, generation: int, index: int, rows: Tensor, owners: npt.NDArray[np.int64], first: int
) -> NamedSum:
    """Write a tablet: header, rows (R, D), owners (R,), flushed to the disk."""
    name = f"rows-{index:06d}-{generation:09d}.tablet"
    header = _HEADER.pack(
        MAGIC, FORMAT, list(STORAGE.values()).index(rows.dtype), first, rows.shape[0], rows.shape[1]
    ).ljust(HEADER_BYTES, b"\0")
    parts = [header, as_bytes(rows), owners.astype("<i8").data.cast("B")]
    return _named(name, write_file(folder / name, parts))


def write_names(folder: Path, generation: int, index: int, chunk: bytes) -> NamedSum:
    """Write a chunk of names."""
    name = f"names-{index:06d}-{generation:09d}.txt"
    return _named(name, write_file(folder / name, [chunk]))


def _named(name: str, written: FileSum) -> NamedSum:
    return NamedSum(name=name, sha256=written.sha256, size=written.size)


def read_rows(folder: Path, manifest: Manifest, index: int, start: int, out: Tensor) -> None:
    """Read rows of a tablet from `start` on into `out` (n, D), which is contiguous and of the gallery's type.

    Raises:
        GalleryError: the file is gone or too short.
    """
    entry = manifest.tablets[index]
    view = as_bytes(out)
    with _open(folder, entry) as file:
        file.seek(HEADER_BYTES + start * manifest.row_bytes)
        if file.readinto(view) != view.nbytes:
            raise GalleryError(f"{folder / entry.name} ends too early")


def read_owners(folder: Path, manifest: Manifest, index: int) -> npt.NDArray[np.int64]:
    """(R,): of a tablet; its header must be the manifest's.

    Raises:
        GalleryError: the file is another's, gone, or of another size.
    """
    entry, rows = manifest.tablets[index], manifest.rows_of(index)
    with _open(folder, entry) as file:
        magic, version, dtype, first, count, dim = _HEADER.unpack_from(
            file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0")
        )
        wanted = (
            MAGIC,
            FORMAT,
            list(STORAGE).index(manifest.storage),
            index * manifest.tablet_rows,
            rows,
            manifest.dim,
        )
        if (magic, version, dtype, first, count, dim) != wanted:
            raise GalleryError(f"{folder / entry.name} is damaged: its header is not the manifest's")
        file.seek(HEADER_BYTES + rows * manifest.row_bytes)
        owners = np.frombuffer(file.read(), "<i8")
    if len(owners) != rows:
        raise GalleryError(f"{folder / entry.name} must hold {rows} owners, got {len(owners)}")
    return owners.astype(np.int64)


def read_whole(folder: Path, manifest: Manifest, index: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """(rows, owners) of a tablet, against its checksum.

    Raises:
        GalleryError: damaged, or gone.
    """
    entry = manifest.tablets[index]
    with _open(folder, entry) as file:
        value = bytearray(entry.size)
        whole = file.readinto(value) == entry.size and not file.read(1)
    if not whole or hashlib.sha256(value).hexdigest() != entry.sha256:
        raise GalleryError(f"{folder / entry.name} is damaged: its checksum is not the manifest's")
    count = manifest.rows_of(index)
    rows = torch.frombuffer(
        value, dtype=STORAGE[manifest.storage], count=count * manifest.dim, offset=HEADER_BYTES
    ).reshape(count, manifest.dim)
    owners = np.frombuffer(value, "<i8", offset=HEADER_BYTES + count * manifest.row_bytes).astype(np.int64)
    return rows, owners


def read_names(folder: Path, manifest: Manifest, index: int) -> bytes:
    """A chunk of names.

    Raises:
        GalleryError: damaged, or gone.
    """
    entry = manifest.names[index]
    with _open(folder, entry) as file:
        chunk = file.read()
    if hashlib.sha256(chunk).hexdigest() != entry.sha256:
        raise GalleryError(f"{folder / entry.name} is damaged: its checksum is not the manifest's")
    return chunk


def _open(folder: Path, entry: NamedSum) -> BufferedReader:
    try:
        return (folder / entry.name).open("rb")
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
            with (folder / entry.name).open("rb") as file:
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
