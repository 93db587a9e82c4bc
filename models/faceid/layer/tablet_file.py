"""One tablet on disk: a header of 128 bytes, the rows, their state. Little endian, no pickle."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import HeadError
from .tablets import Tablet

MAGIC = b"OUTSIZE\0"
VERSION = 1
HEADER_BYTES = 128
_HEADER = struct.Struct("<8sIIQQQQIIQ")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSum:
    """What a manifest knows of a file."""

    sha256: str
    size: int


def file_name(tablet: Tablet) -> str:
    return f"tablet-{tablet.index:06d}.rows"


def _header(tablet: Tablet, rows: Tensor, state: Tensor, step: int) -> bytes:
    packed = _HEADER.pack(
        MAGIC,
        VERSION,
        DTYPES.index(rows.dtype),
        tablet.index,
        tablet.first,
        tablet.rows,
        rows.shape[1],
        state.shape[1],
        DTYPES.index(state.dtype),
        step,
    )
    return packed.ljust(HEADER_BYTES, b"\0")


def write_tablet(folder: Path, tablet: Tablet, rows: Tensor, state: Tensor, step: int) -> FileSum:
    """Write a tablet's rows (padding left out) and state beside their place, flush them to the disk, rename.

    Raises:
        OSError: the disk is full or gone; the file's old content is still there.
    """
    parts = [_header(tablet, rows, state, step), as_bytes(rows[: tablet.rows])]
    if state.shape[1]:
        parts.append(as_bytes(state[: tablet.rows]))
    return write_file(folder / file_name(tablet), parts)


def write_file(path: Path, parts: list[bytes | memoryview]) -> FileSum:
    """Whole and on the disk, or not at all."""
    digest, size = hashlib.sha256(), 0
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return FileSum(sha256=digest.hexdigest(), size=size)


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")  # pyright: ignore[reportArgumentType]


def read_tablet(folder: Path, tablet: Tablet, rows: Tensor, state: Tensor, expected: FileSum) -> None:
    """Read a tablet into rows and state.

    Raises:
        HeadError: the file is not what the manifest says, or holds another layer's rows.
    """
    path = folder / file_name(tablet)
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        magic, version, dtype, index, first, count, dim, width, state_dtype, _ = _HEADER.unpack_from(
            head.ljust(HEADER_BYTES, b"\0")
        )
        if magic != MAGIC or version != VERSION:
            raise HeadError(f"{path} must be a tablet of version {VERSION}, got {magic!r} {version}")
        if max(dtype, state_dtype) >= len(DTYPES):
            raise HeadError(f"{path} is damaged: it names types {dtype} and {state_dtype}, of {len(DTYPES)}")
        found = (index, first, count, dim, width)
        wanted = (tablet.index, tablet.first, tablet.rows, rows.shape[1], state.shape[1])
        if found != wanted or DTYPES[dtype] != rows.dtype or (width and DTYPES[state_dtype] != state.dtype):
            raise HeadError(
                f"{path} must hold (index, first, rows, dim, state) {wanted} in {rows.dtype} and {state.dtype}, got "
                f"{found} in {DTYPES[dtype]} and {DTYPES[state_dtype]}"
            )
        digest = hashlib.sha256(head)
        for tensor in (rows, state):
            if tensor.shape[1]:
                part = tensor[: tablet.rows]
                view = as_bytes(part)  # memory of the layer, since rows lie contiguous
                if file.readinto(view) != view.nbytes:
                    raise HeadError(f"{path} ends too early")
                digest.update(view)
        if file.read(1) or digest.hexdigest() != expected.sha256:
            raise HeadError(f"{path} is damaged: its checksum is not the manifest's")
