"""A journal: lines that are added one by one, in a file, or in objects, which cannot be added to and come in parts."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from .files import put
from .places import is_remote

PART_BYTES = 1 << 18
"""An object of a journal is written anew until it has so many."""


class Journal(Protocol):
    """Takes lines. A line in a file survives the death of this process; every line that was synced survives a power
    cut too. In an object store only synced lines are kept."""

    def add(self, line: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def open_journal(folder: Path, name: str, number: int) -> Journal:
    """A new journal: the folder has one of a name such as `records.jsonl` for each number, in `records-NUMBER.jsonl`
    or, of objects, in `records-NUMBER.PART.jsonl`."""
    stem, suffix = name.split(".")
    if is_remote(folder):
        return _ObjectJournal(folder, f"{stem}-{number}", suffix)
    return _FileJournal(folder / f"{stem}-{number}.{suffix}")


def read_journal(folder: Path, name: str) -> Iterator[str]:
    """The lines of all journals of that name, one by one, in the order of their numbers; a last may be cut short."""
    for place in find_journals(folder, name):
        if not is_remote(place) and not place.is_file():
            continue  # a pipe would be waited for
        with place.open(errors="replace") as lines:
            for line in lines:
                yield line.rstrip("\n")


def find_journals(folder: Path, name: str) -> list[Path]:
    """Files or objects of all journals of that name, in order."""
    stem, suffix = name.split(".")
    known = re.compile(rf"{stem}-(\d+)(?:\.(\d+))?\.{suffix}")
    found: list[tuple[tuple[int, int], Path]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for place in folder.iterdir():
            match = known.fullmatch(place.name)
            if match:
                found.append(((int(match[1]), int(match[2] or 0)), place))
    return [place for _, place in sorted(found, key=lambda entry: entry[0])]


class _FileJournal:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def add(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _ObjectJournal:
    def __init__(self, folder: Path, stem: str, suffix: str) -> None:
        self._folder, self._stem, self._suffix = folder, stem, suffix
        self._part, self._value = 1, bytearray()
        self._written = 0
        self._guard = threading.Lock()

    def add(self, line: str) -> None:
        with self._guard:
            self._value += line.encode() + b"\n"

    def sync(self) -> None:
        with self._guard:
            if len(self._value) == self._written:
                return
            value = bytes(self._value)
            put(self._folder / f"{self._stem}.{self._part}.{self._suffix}", value)
            self._written = len(value)
            if self._written >= PART_BYTES:
                self._part, self._written, self._value = self._part + 1, 0, bytearray()

    def close(self) -> None:
        self.sync()
