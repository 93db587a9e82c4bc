"""Trust: what a model file holds, whether reading it could run code, and whether the user allows that."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ....tiler.base.errors import UsageError
from ....tiler.base.text import reason_of
from ....tiler.system.files import read_regular

Content = Literal["safetensors", "pickle", "torch.export", "TorchScript"]


class ModelFileError(UsageError):
    """A model file that is missing, damaged, of another kind, or that could run code without leave to."""


def _content_of(path: Path, data: bytes) -> Content:
    """By what stands in a file: a suffix says nothing about what its reader would run.

    Raises:
        ModelFileError: none of these kinds.
    """
    archive = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                # Each archive has one folder of its own name at the top.
                names = {name.partition("/")[2] for name in opened.namelist()}
            if {"archive_format", "models/model.json"} & names or "serialized_exported_program.json" in names:
                return "torch.export"
            if "constants.pkl" in names:
                return "TorchScript"
            if "data.pkl" in names:
                return "pickle"
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{path} cannot be read: {reason_of(error)}") from error
    # The header's length in eight bytes, then its JSON. Looked at first: such a length may begin like a pickle.
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        return "safetensors"
    if data[:1] == b"\x80":
        return "pickle"
    raise ModelFileError(
        f"{path} is no model: it must hold safetensors, what torch.save or torch.export.save wrote, or a description "
        "(.json)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A file as it was read, once: what is hashed and looked at is what is loaded, whoever writes to it meanwhile."""

    path: Path
    data: bytes = field(repr=False)
    sha256: str

    @property
    def content(self) -> Content:
        """
        Raises:
            ModelFileError: it is of no kind that is known.
        """
        return _content_of(self.path, self.data)

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return str(self.path)


def read_model_file(path: Path) -> ModelFile:
    """Read a file that holds weights or a whole network.

    Raises:
        ModelFileError: it is missing, or no file.
    """
    try:
        data = read_regular(path)
    except (OSError, MemoryError) as error:
        raise ModelFileError(f"{path} cannot be read: {reason_of(error)}") from error
    return ModelFile(path=path, data=data, sha256=hashlib.sha256(data).hexdigest())


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

    def require_file(self, file: ModelFile, reason: str) -> None:
        """`require` of a file that was read."""
        self.require(file.path, file.sha256, reason)

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
