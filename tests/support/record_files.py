"""A writer of RecordIO files, which follows the format's description alone."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

MAGIC = bytes.fromhex("0a23d7ce")


def frame(payload: bytes) -> bytes:
    """One record: cut wherever the magic stands at a multiple of four bytes."""
    places = [at for at in range(0, len(payload) - 3, 4) if payload[at : at + 4] == MAGIC]
    begins, ends = [0, *(at + 4 for at in places)], [*places, len(payload)]
    parts = [payload[begin:end] for begin, end in zip(begins, ends, strict=True)]
    out = b""
    for number, part in enumerate(parts):
        kind = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        out += MAGIC + (kind * 2**29 + len(part)).to_bytes(4, "little") + part + bytes(-len(part) % 4)
    return out


def entry(label: float | list[float], content: bytes, number: int = 0) -> bytes:
    if isinstance(label, list):
        head = len(label).to_bytes(4, "little") + struct.pack("<f", 0) + number.to_bytes(8, "little") + bytes(8)
        return head + np.array(label, "<f4").tobytes() + content
    return bytes(4) + struct.pack("<f", label) + number.to_bytes(8, "little") + bytes(8) + content


def write(folder: Path, entries: dict[int, bytes]) -> Path:
    body, index = b"", ""
    for key, payload in entries.items():
        index += f"{key}\t{len(body)}\n"
        body += frame(payload)
    (folder / "train.rec").write_bytes(body)
    (folder / "train.idx").write_text(index)
    return folder / "train.rec"


def picture(seed: int, size: tuple[int, int] = (10, 12)) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return pixels, buffer.getvalue()


def indexed(
    folder: Path, labels: list[int], wrong: dict[int, float] | None = None, size: tuple[int, int] = (10, 12)
) -> Path:
    """Pictures 1 ... n in the order of their labels, identities behind them, as published sets have it."""
    end, identities = len(labels) + 1, sorted(set(labels))
    entries = {0: entry([end, end + len(identities)], b"")}
    for key, label in enumerate(labels, 1):
        entries[key] = entry([float((wrong or {}).get(key, label)), 0.0], picture(key, size)[1], key)
    for number, identity in enumerate(identities):
        first = labels.index(identity) + 1
        entries[end + number] = entry([first, first + labels.count(identity)], b"")
    return write(folder, entries)
