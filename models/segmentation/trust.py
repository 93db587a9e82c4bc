"""Trust: what a model file holds, whether reading it could run code, and whether the user allows that."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ...tiler.errors import UsageError

Content = Literal["safetensors", "pickle", "torch.export", "TorchScript"]


class ModelFileError(UsageError):
    """A model file that is missing, damaged, of another kind, or that could run code without leave to."""


def content_of(path: Path) -> Content:
    """What a file holds, by what stands in it: a suffix says nothing about what its reader would run.

    Raises:
        ModelFileError: a file that is missing, or of none of these kinds.
    """
    try:
        with path.open("rb") as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # Each archive has one folder of its own name at the top.
                names = {name.partition("/")[2] for name in archive.namelist()}
            if {"archive_format", "models/model.json"} & names or "serialized_exported_program.json" in names:
                return "torch.export"
            if "constants.pkl" in names:
                return "TorchScript"
            if "data.pkl" in names:
                return "pickle"
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    # The header's length in eight bytes, then its JSON. Looked at first: such a length may begin like a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
        return "safetensors"
    if start[:1] == b"\x80":
        return "pickle"
    raise ModelFileError(
        f"{path} is no model: it must hold safetensors, what torch.save or torch.export.save wrote, or a description "
        "(.json)"
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whether files that could run code may be read: none, one by its hash, or all."""

    everything: bool = False
    sha256: str | None = None
    """Of the one file that may be read; with `everything` it must agree too."""

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            raise UsageError(f"sha256 must be 64 hexadecimal digits, got {self.sha256!r}; sha256sum FILE prints them")

    def require_hash(self, path: Path, digest: str) -> None:
        """
        Raises:
            ModelFileError: a hash was given, and it is another file's.
        """
        if self.sha256 is not None and digest != self.sha256.lower():
            raise ModelFileError(f"{path} is not the file that was meant: its sha256 is {digest}, given {self.sha256}")

    def require(self, path: Path, digest: str, reason: str) -> None:
        """
        Raises:
            ModelFileError: a file that could run code, without leave to; says why and how to go on.
        """
        self.require_hash(path, digest)
        if not self.everything and self.sha256 is None:
            raise ModelFileError(
                f"{path} could run code when it is loaded: {reason}; if you trust where it comes from, "
                f"--trust-model, or --sha256 {digest} (from Python: trust=True, or sha256=)"
            )


@contextmanager
def open_trusted(path: Path, trust: Trust, reason: str) -> Iterator[BinaryIO]:
    """The file open at its start, if it may be read; what is read is what was hashed.

    Raises:
        ModelFileError: as `Trust.require`.
    """
    with path.open("rb") as file:
        trust.require(path, hashlib.file_digest(file, "sha256").hexdigest(), reason)
        file.seek(0)
        yield file
