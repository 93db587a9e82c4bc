"""RecordIO files of face pictures, as InsightFace publishes its training sets: train.rec with train.idx.

A .rec file is records of: magic 0xced7230a; a word of 3 bits kind and 29 bits length; that many bytes; zeros up to a
multiple of 4; all little endian. Kind 0 is a whole record. Where its bytes hold the magic at a multiple of 4, a record
is cut there, the magic left out, into parts of kind 1 (first), 2 and 3 (last). The .idx file names the place of each
record: lines of key, tab, offset.

An image record is a header (flag, label as float32, two ids of 64 bits), `flag` more float32 labels, and an encoded
picture. Record 0 may be an index: its labels [a, b] say that records 1 ... a - 1 are pictures and a ... b - 1 are
identities, each of whose labels [first, end] are the pictures of one identity.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...tiler.errors import reason_of
from .errors import HeadError
from .images import ImageError

MAGIC = 0xCED7230A
_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _LAST = 0, 1, 3
Whole = npt.NDArray[np.int64]


class RecordFile:
    """Pictures of a .rec file with its .idx file beside it; read by any number of threads."""

    def __init__(self, path: Path) -> None:
        """Raises:
        HeadError: a file is missing, is not of this kind, or has no pictures; labels that are no numbers 0, 1, ....
        """
        self.path = path
        index = path.with_suffix(".idx")
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            table = [line.split("\t") for line in index.read_text().splitlines() if line.strip()]
            self._offsets = {int(key): int(offset) for key, offset in table}
        except FileNotFoundError as error:
            raise HeadError(
                f"{path} must be a RecordIO file with {index.name} beside it, got no {Path(error.filename).name}"
            ) from error
        except (OSError, ValueError) as error:
            raise HeadError(
                f"{path} and {index.name} must be a RecordIO file and its index: {reason_of(error)}"
            ) from error
        self.keys, self.labels = self._list_pictures()
        if not len(self.keys):
            raise HeadError(f"{path} must hold pictures, got none")
        if self.labels.min() < 0:
            key = int(self.keys[int(self.labels.argmin())])
            raise HeadError(f"labels must be whole numbers from 0, record {key} of {path} has another")

    def _list_pictures(self) -> tuple[Whole, Whole]:
        """(keys, labels) of all pictures; without an index inside, every record is looked at. -1: no whole number."""
        labels, picture = self._unpack(0) if 0 in self._offsets else ([], b"")
        if len(labels) == 2 and not picture:
            end, last = (int(value) for value in labels)
            found = np.full(end, -1, np.int64)
            for identity, key in enumerate(range(end, last)):
                begin, stop = (int(value) for value in (*self._unpack(key)[0], 0)[:2])
                if not 1 <= begin <= stop <= end:
                    raise HeadError(
                        f"record {key} of {self.path} gives its identity the pictures {begin} ... {stop - 1}, there "
                        f"are 1 ... {end - 1}"
                    )
                found[begin:stop] = identity
            keys = np.flatnonzero(found >= 0)
            return keys.astype(np.int64), found[keys]
        keys = np.array(sorted(self._offsets), np.int64)
        return keys, np.array([_whole(self._unpack(int(key))[0][0]) for key in keys], np.int64)

    def read(self, place: int) -> bytes:
        """The encoded picture at a place of `keys`.

        Raises:
            ImageError: the record is damaged, or says another label than the file's index.
        """
        key = int(self.keys[place])
        try:
            labels, picture = self._unpack(key)
        except HeadError as error:
            raise ImageError(str(error)) from error
        if _whole(labels[0]) != self.labels[place]:
            raise ImageError(f"its label is {labels[0]:g}, the file's index says {self.labels[place]}")
        return picture

    def _unpack(self, key: int) -> tuple[list[float], bytes]:
        """(labels, encoded picture) of a record."""
        payload = self._payload(key)
        if len(payload) < _HEADER.size:
            raise HeadError(f"record {key} of {self.path.name} is damaged: {len(payload)} bytes are no header")
        flag, label, _, _ = _HEADER.unpack_from(payload)
        end = _HEADER.size + 4 * flag
        if end > len(payload):
            raise HeadError(f"record {key} of {self.path.name} is damaged: it claims {flag} labels")
        labels = list(struct.unpack_from(f"<{flag}f", payload, _HEADER.size)) if flag else [label]
        return labels, payload[end:]

    def _payload(self, key: int) -> bytes:
        if key not in self._offsets:
            raise HeadError(f"record {key} is not in the index of {self.path.name}")
        at, parts = self._offsets[key], list[bytes]()
        while True:
            if not 0 <= at <= len(self._bytes) - _WORDS.size:
                raise HeadError(f"record {key} of {self.path.name} is damaged: its place lies beyond the file")
            magic, word = _WORDS.unpack_from(self._bytes, at)
            kind, length = word >> 29, word & (1 << 29) - 1
            begin = at + _WORDS.size
            expected = (_WHOLE, _FIRST) if not parts else (2, _LAST)
            if magic != MAGIC or kind not in expected or begin + length > len(self._bytes):
                raise HeadError(f"record {key} of {self.path.name} is damaged: no record is at byte {at}")
            parts.append(self._bytes[begin : begin + length])
            if kind in (_WHOLE, _LAST):
                return struct.pack("<I", MAGIC).join(parts)
            at = begin + length + -length % 4

    def describe(self) -> dict[str, Any]:
        return {"bytes": len(self._bytes), "records": len(self._offsets)}


def _whole(label: float) -> int:
    """-1 where it is no whole number of 0 or more."""
    return int(label) if np.isfinite(label) and label >= 0 and label == int(label) else -1
