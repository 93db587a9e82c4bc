"""RecordIO files of face pictures, as InsightFace publishes its training sets: train.rec with train.idx.

A .rec file is records of: magic 0xced7230a; a word of 3 bits kind and 29 bits length; that many bytes; zeros up to a
multiple of 4; all little endian. Kind 0 is a whole record. Where its bytes hold the magic at a multiple of 4, a record
is cut there, the magic left out, into parts of kind 1 (first), 2 and 3 (last). The .idx file names the place of each
record: lines of key, tab, offset.

An image record is a header (flag, label as float32, two ids of 64 bits), `flag` more float32 labels, and an encoded
picture. Record 0 may be an index: its labels [a, b] say that records 1 ... a - 1 are pictures and a ... b - 1 are
identities, each of whose labels [first, end] are the pictures of one identity.

What a picture shows is its own label, as for arcface_torch. Records of identities are not gone by: their numbers are
float32, which from 2^24 on hold every other whole number alone, and in merged or cut sets neither their order nor their
number is that of the labels.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....tiler.base.text import reason_of
from ....tiler.system.plain_file import open_plain
from ..base.errors import HeadError
from .images import ImageError

MAGIC = 0xCED7230A
_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _LAST = 0, 1, 3
LABELS = 1 << 24
"""From which on float32 gives different labels one number."""
_SCANNED = 1 << 20
"""Records whose headers are looked at together."""
_NAMED = 10_000
"""Missing records up to which each is named."""
_PICTURE, _RANGE, _DAMAGED = 0, 1, 2
_PLACES = re.compile(rb"(?:[ \r]*(?:[0-9]{1,18}[ ]*\t[ ]*[0-9]{1,18}[ ]*\r?)?(?:\n|\Z))*+")
"""What an .idx file is, and each of its lines."""
Whole = npt.NDArray[np.int64]


class RecordFile:
    """Pictures of a .rec file with its .idx file beside it; read by any number of threads."""

    def __init__(self, path: Path) -> None:
        """Raises:
        HeadError: a file is missing, is not of this kind, or has no pictures; labels that are no numbers 0, 1, ... that
            float32 tells apart.
        """
        self.path = path
        self.damaged: list[tuple[str, str]] = []
        """(record, reason) of those without a label that can be read, which are left out."""
        self.identity_records = self.mixed = 0
        """Records of identities, and those among them that list pictures of several labels."""
        index = path.with_suffix(".idx")
        try:
            with open_plain(path) as file:
                if not file.seek(0, 2):
                    raise HeadError(f"{path} must be a RecordIO file, got an empty one")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._known, self._offsets = _read_places(index)
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
        if self.labels.max() >= LABELS:
            key = int(self.keys[int(self.labels.argmax())])
            raise HeadError(
                f"labels must be below 2^24, where float32 tells them apart, record {key} of {path} has "
                f"{self.labels.max()}"
            )

    def _list_pictures(self) -> tuple[Whole, Whole]:
        """(keys, labels) of all pictures, from their own headers. -1: no whole number."""
        parts = [self._scan(slice(at, at + _SCANNED)) for at in range(0, len(self._known), _SCANNED)]
        found = np.concatenate(parts) if parts else np.empty((0, 4))
        keys, first, second, kind = found[:, 0].astype(np.int64), *found.T[1:]
        listed = kind == _RANGE
        plausible = listed & (first >= 1) & (first <= second) & (second < 2**40)
        is_indexed = len(keys) > 0 and keys[0] == 0 and plausible[0]
        # Identities behind the last picture are not needed: no loss, where they are cut off or damaged.
        last = first[0] if is_indexed else np.inf
        if not is_indexed:
            kind[listed & ~plausible] = _PICTURE
        for key in keys[(kind == _DAMAGED) & (keys < last)].tolist():
            self.damaged.append((self.name_of(key), self._reason_of(key)))
        named = plausible & (keys > 0) & (second <= last + _slack_at(second))
        for place in np.flatnonzero(listed & ~named & (keys > 0) & (kind == _RANGE)).tolist():
            reason = f"its identity has the pictures {first[place]:.0f} ... {second[place] - 1:.0f}"
            self.damaged.append((self.name_of(int(keys[place])), f"{reason}, there are 1 ... {last - 1:.0f}"))
        is_picture = kind == _PICTURE
        labels = first[is_picture]
        whole = np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))
        keys, labels = keys[is_picture], np.where(whole, labels, -1).astype(np.int64)
        self._compare(keys, labels, first[named].astype(np.int64), second[named].astype(np.int64))
        return keys, labels

    def _scan(self, part: slice) -> npt.NDArray[np.float64]:
        """(key, first label, second label, kind) of each record; most are looked at together."""
        size, words = len(self._bytes), np.frombuffer(self._bytes, "<u4", len(self._bytes) // 4)
        keys, offsets = self._known[part], self._offsets[part]
        plain = (offsets % 4 == 0) & (offsets <= size - _WORDS.size - _HEADER.size)
        at = offsets // 4
        found = np.zeros((len(keys), 4))
        found[:, 0] = keys
        if plain.any():
            at[~plain] = at[plain][0]
            magic, word, flag = words[at], words[at + 1], words[at + 2].astype(np.int64)
            length = (word & (1 << 29) - 1).astype(np.int64)
            content = length - _HEADER.size - 4 * flag
            plain &= (magic == MAGIC) & (word >> 29 == _WHOLE) & (content >= 0) & (4 * at + 8 + length <= size)
            # Labels lie behind the header where there are several; else these words are looked at in vain.
            behind = [words[np.minimum(at + 8 + place, len(words) - 1)].view("<f4") for place in (0, 1)]
            found[:, 1] = np.where(flag > 0, behind[0], words[at + 3].view("<f4"))
            found[:, 2] = behind[1]
            found[:, 3] = _kind_of(flag, content)
        for place in np.flatnonzero(~plain).tolist():
            try:
                labels, picture = self._unpack(int(keys[place]))
            except ImageError:
                found[place, 1:] = 0, 0, _DAMAGED
            else:
                first, second = (*labels, 0.0, 0.0)[:2]
                found[place, 1:] = first, second, _kind_of(len(labels), len(picture))
        return found

    def _compare(self, keys: Whole, labels: Whole, first: Whole, end: Whole) -> None:
        """What records of identities say, of pictures `first` ... `end` - 1 each, beside the pictures: name those that
        are not there, count the records whose pictures have several labels."""
        self.identity_records = len(first)
        slack = _slack_at(end)
        first, end = first + slack, np.maximum(first + slack, end - slack)
        begins, ends = np.searchsorted(keys, first), np.searchsorted(keys, end)
        full = ends > begins
        if full.any():
            pairs = np.stack((begins[full], ends[full]), axis=1).ravel()
            padded = np.append(labels, labels[-1:])
            lowest, highest = (of.reduceat(padded, pairs)[::2] for of in (np.minimum, np.maximum))
            self.mixed = int(np.count_nonzero(lowest != highest))
        lacking = np.flatnonzero(end - first > ends - begins)
        count = int((end - first)[lacking].sum() - (ends - begins)[lacking].sum())
        if count > _NAMED:
            self.damaged.append((str(self.path), f"{count:,} pictures that its identities list are not there"))
            return
        known = {name for name, _ in self.damaged}
        for place in lacking.tolist():
            there = set(keys[begins[place] : ends[place]].tolist())
            for key in range(int(first[place]), int(end[place])):
                if key not in there and (name := self.name_of(key)) not in known:
                    known.add(name)
                    self.damaged.append((name, self._reason_of(key)))

    def name_of(self, key: int) -> str:
        """What a record is called where it is named."""
        return f"{self.path}, record {key}"

    def read(self, place: int) -> bytes:
        """The encoded picture at a place of `keys`.

        Raises:
            ImageError: the record is damaged, or has another label than it had when the file was opened.
        """
        labels, picture = self._unpack(int(self.keys[place]))
        if _whole(labels[0]) != self.labels[place]:
            raise ImageError(f"its label is {labels[0]:g}, and was {self.labels[place]} when the file was opened")
        return picture

    def _reason_of(self, key: int) -> str:
        """Why a record is no picture."""
        try:
            self._unpack(key)
        except ImageError as error:
            return str(error)
        return "it is no picture"

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
        place = int(np.searchsorted(self._known, key))
        if place == len(self._known) or self._known[place] != key:
            raise ImageError(f"it is not in {self.path.with_suffix('.idx').name}")
        at, parts = int(self._offsets[place]), list[bytes]()
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
        labels = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        return {"bytes": len(self._bytes), "records": len(self._known), "labels_sha256": labels}


def _read_places(index: Path) -> tuple[Whole, Whole]:
    """(keys, ascending; offset of each); of a key that comes again, the last."""
    with open_plain(index) as file:
        text = file.read()
    if not _PLACES.fullmatch(text):
        for number, line in enumerate(text.decode().splitlines(), 1):
            if line.strip() and not _PLACES.fullmatch(line.encode()):
                raise HeadError(
                    f"line {number} of {index} must be a record's number, tab, and its place, got {line[:60]!r}"
                )
    keys, offsets = np.fromstring(text, np.int64, sep=" ").reshape(-1, 2).T
    order = np.argsort(keys, kind="stable")
    keys, offsets = keys[order], offsets[order]
    last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
    return keys[last], offsets[last]


def _whole(label: float) -> int:
    """-1 where it is no whole number of 0 or more."""
    return int(label) if np.isfinite(label) and label >= 0 and label == int(label) else -1


def _kind_of(flag: Any, content: Any) -> Any:
    """_RANGE of records with two labels [first, end] and no picture, which list others; else _PICTURE."""
    return np.where((flag == 2) & (content == 0), _RANGE, _PICTURE)


def _slack_at(ends: npt.NDArray[Any]) -> Whole:
    """By how much float32 may have moved such numbers."""
    return np.spacing(np.clip(ends, 1, 2.0**40).astype(np.float32)).astype(np.int64) * (ends >= LABELS)
