"""Names by number, held as bytes: ten million of them in some 200 MB, found again without a table."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from .errors import HeadError

NAMES = 16_384
"""Of a chunk, which is what a file holds."""
LONGEST = 255
"""Of a name, in bytes of UTF-8."""
_FEW = 16
"""Names up to which each is looked for by itself."""


def compose(name: str) -> str:
    """A name in Unicode's normal form C: an accent that follows its letter, as in names of folders on macOS, becomes
    one character with it, so that what looks the same is the same."""
    return unicodedata.normalize("NFC", name)


def compose_all(names: Iterable[str]) -> list[str]:
    """Each name, composed.

    Raises:
        HeadError: one text in place of several, whose letters would be taken for names; what is no text.
    """
    if isinstance(names, (str, bytes)):
        raise HeadError(f"names must be a list of names, got the text {names!r} alone")
    listed = list(names)
    for name in listed:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance] - of who does not check types
            raise HeadError(f"names must be texts, got {name!r}")
    return [compose(name) for name in listed]


def require_name(name: str) -> None:
    """Refuse what is no name.

    Raises:
        HeadError: empty, too long, with spaces around it, or with what cannot be printed.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0  # parts of a character, which a file's name may hold
    if not 0 < size <= LONGEST or not name.isprintable() or name != name.strip():
        raise HeadError(
            f"a name must be 1 ... {LONGEST} bytes of printable characters without spaces around them, got {name!r}"
        )


class NameList:
    """Names by number; a removed one is empty, and its number stays so."""

    def __init__(self, chunks: Iterable[bytes] = ()) -> None:
        self._chunks: list[bytes] = []
        self._ends: list[npt.NDArray[np.int32]] = []
        self.is_composed = True
        """False: some were not composed, as those of galleries that are older than this rule."""
        for chunk in chunks:
            self.is_composed &= chunk.isascii() or unicodedata.is_normalized("NFC", chunk.decode())
            self._append_chunk(chunk)

    def _append_chunk(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._ends.append(_ends_of(chunk))

    def __len__(self) -> int:
        return sum(len(ends) for ends in self._ends[-1:]) + NAMES * max(0, len(self._ends) - 1)

    @property
    def chunks(self) -> list[bytes]:
        """Each a line for each of its names."""
        return self._chunks

    @property
    def held_bytes(self) -> int:
        return sum(map(len, self._chunks)) + sum(ends.nbytes for ends in self._ends)

    def name(self, number: int) -> str:
        """ "" where the name was removed."""
        at, place = divmod(number, NAMES)
        ends = self._ends[at]
        first = int(ends[place - 1]) + 1 if place else 0
        return self._chunks[at][first : int(ends[place])].decode()

    def __iter__(self) -> Iterator[str]:
        """All names, removed ones left out."""
        for chunk in self._chunks:
            yield from filter(None, chunk.decode().split("\n"))

    def find(self, names: Iterable[str]) -> dict[str, int]:
        """Numbers of those that are there; names are composed, and so are their keys."""
        wanted = {name.encode(errors="surrogatepass"): name for name in map(compose, names)}
        found: dict[str, int] = {}
        for at, (chunk, ends) in enumerate(zip(self._chunks, self._ends, strict=True)):
            if len(wanted) <= _FEW:
                lines = b"\n" + chunk
                for line, name in wanted.items():
                    place = lines.find(b"\n" + line + b"\n")  # which begins where the name does in the chunk
                    if place >= 0:
                        found[name] = at * NAMES + int(np.searchsorted(ends, place))
            else:
                for place, line in enumerate(chunk.split(b"\n")[:-1]):
                    if line in wanted:
                        found[wanted[line]] = at * NAMES + place
        return found

    def change(self, removed: Iterable[int], added: Iterable[str]) -> set[int]:
        """Empty some names, append others, which get the next numbers; the chunks that are others now."""
        by_chunk: dict[int, list[int]] = {}
        for number in removed:
            by_chunk.setdefault(number // NAMES, []).append(number % NAMES)
        for at, places in by_chunk.items():
            lines = self._chunks[at].split(b"\n")
            for place in places:
                lines[place] = b""
            self._set_chunk(at, b"\n".join(lines))
        touched = set(by_chunk)
        lines = [compose(name).encode() for name in added]
        while lines:
            if not self._chunks or len(self._ends[-1]) == NAMES:
                self._append_chunk(b"")
            room = NAMES - len(self._ends[-1])
            last = len(self._chunks) - 1
            self._set_chunk(last, self._chunks[last] + b"".join(line + b"\n" for line in lines[:room]))
            touched.add(last)
            lines = lines[room:]
        return touched

    def _set_chunk(self, at: int, chunk: bytes) -> None:
        self._chunks[at], self._ends[at] = chunk, _ends_of(chunk)

    def copy(self) -> NameList:
        """To be changed without changing this one."""
        other = NameList()
        other._chunks, other._ends, other.is_composed = list(self._chunks), list(self._ends), self.is_composed
        return other


def _ends_of(chunk: bytes) -> npt.NDArray[np.int32]:
    return np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")).astype(np.int32)
