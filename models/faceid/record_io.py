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
import os
import struct
from collections.abc import Iterator
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
        HeadError: a file is missing, is not of this kind, or has no pictures; labels that are no numbers 0, 1, ...; an
            index inside of which a record is damaged.
        """
        self.path = path
        self.damaged: list[tuple[str, str]] = []
        """(record, reason) of those without a label that can be read, which are left out."""
        index = path.with_suffix(".idx")
        try:
            with path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise HeadError(f"{path} must be a RecordIO file, got an empty one")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._offsets = dict(_read_places(index))
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
            first = f" that can be read; {': '.join(self.damaged[0])}" if self.damaged else ""
            raise HeadError(f"{path} must hold pictures, got none{first}")
        if self.labels.min() < 0:
            key = int(self.keys[int(self.labels.argmin())])
            raise HeadError(f"labels must be whole numbers from 0, record {key} of {path} has another")

    def _list_pictures(self) -> tuple[Whole, Whole]:
        """(keys, labels) of all pictures; without an index inside, every record is looked at. -1: no whole number.

        Where record 0 is damaged, records of identities tell that it was the index. Their pictures may have gone
        wrong as well, which nothing would show without it.
        """
        lost = ""
        try:
            labels, picture = self._unpack(0)
        except ImageError as error:
            labels, picture, lost = [], b"", str(error)
        if len(labels) == 2 and not picture:
            end, last = (int(value) for value in labels)
            found = np.full(end, -1, np.int64)
            for identity, key in enumerate(range(end, last)):
                begin, stop = (int(value) for value in (*self._unpack_index(key)[0], 0)[:2])
                if not 1 <= begin <= stop <= end:
                    raise HeadError(
                        f"record {key} of {self.path} gives its identity the pictures {begin} ... {stop - 1}, there "
                        f"are 1 ... {end - 1}"
                    )
                found[begin:stop] = identity
            keys = np.flatnonzero(found >= 0)
            return keys.astype(np.int64), found[keys]
        known: dict[int, int] = {}
        for key in sorted(self._offsets):
            try:
                labels, picture = self._unpack(key)
            except ImageError as error:
                self.damaged.append((self.name_of(key), str(error)))
                continue
            if len(labels) == 2 and not picture and 1 <= labels[0] <= labels[1]:
                raise HeadError(
                    f"{self.path} cannot be read: record {key} lists the pictures of an identity, so record 0 must be "
                    f"the index, and {lost or 'it is none'}; copy the file and its .idx again"
                )
            known[key] = _whole(labels[0])
        return np.array(list(known), np.int64), np.array(list(known.values()), np.int64)

    def name_of(self, key: int) -> str:
        """What a record is called where it is named."""
        return f"{self.path}, record {key}"

    def read(self, place: int) -> bytes:
        """The encoded picture at a place of `keys`.

        Raises:
            ImageError: the record is damaged, or says another label than the file's index.
        """
        labels, picture = self._unpack(int(self.keys[place]))
        if _whole(labels[0]) != self.labels[place]:
            raise ImageError(f"its label is {labels[0]:g}, the file's index says {self.labels[place]}")
        return picture

    def _unpack_index(self, key: int) -> tuple[list[float], bytes]:
        """A record without which nothing is known of the pictures."""
        try:
            return self._unpack(key)
        except ImageError as error:
            raise HeadError(
                f"{self.path} cannot be read: record {key} says whose the pictures are, and {error}; copy the file and "
                "its .idx again"
            ) from error

    def _unpack(self, key: int) -> tuple[list[float], bytes]:
        """(labels, encoded picture) of a record.

        Raises:
            ImageError: it is damaged.
        """
        payload = self._payload(key)
        if len(payload) < _HEADER.size:
            raise ImageError(f"it is damaged: {len(payload)} bytes are no header")
        flag, label, _, _ = _HEADER.unpack_from(payload)
        end = _HEADER.size + 4 * flag
        if end > len(payload):
            raise ImageError(f"it is damaged: it claims {flag} labels")
        labels = list(struct.unpack_from(f"<{flag}f", payload, _HEADER.size)) if flag else [label]
        return labels, payload[end:]

    def _payload(self, key: int) -> bytes:
        if key not in self._offsets:
            raise ImageError(f"it is not in {self.path.with_suffix('.idx').name}")
        at, parts = self._offsets[key], list[bytes]()
        while True:
            if not 0 <= at <= len(self._bytes) - _WORDS.size:
                raise ImageError(
                    f"it would begin at byte {at:,}, where the file of {len(self._bytes):,} bytes has ended"
                )
            magic, word = _WORDS.unpack_from(self._bytes, at)
            kind, length = word >> 29, word & (1 << 29) - 1
            begin = at + _WORDS.size
            expected = (_WHOLE, _FIRST) if not parts else (2, _LAST)
            if magic != MAGIC or kind not in expected:
                raise ImageError(f"it is damaged: no record begins at byte {at:,}")
            if begin + length > len(self._bytes):
                raise ImageError(
                    f"it is cut off: it would end at byte {begin + length:,}, the file at {len(self._bytes):,}"
                )
            parts.append(self._bytes[begin : begin + length])
            if kind in (_WHOLE, _LAST):
                return struct.pack("<I", MAGIC).join(parts)
            at = begin + length + -length % 4

    def describe(self) -> dict[str, Any]:
        return {"bytes": len(self._bytes), "records": len(self._offsets)}


def _read_places(index: Path) -> Iterator[tuple[int, int]]:
    """(key, offset) of each line."""
    for number, line in enumerate(index.read_text().splitlines(), 1):
        fields = line.split("\t")
        if len(fields) == 2 and all(field.strip().isdecimal() for field in fields):
            yield int(fields[0]), int(fields[1])
        elif line.strip():
            raise HeadError(
                f"line {number} of {index} must be a record's number, tab, and its place, got {line[:60]!r}"
            )


def _whole(label: float) -> int:
    """-1 where it is no whole number of 0 or more."""
    return int(label) if np.isfinite(label) and label >= 0 and label == int(label) else -1
