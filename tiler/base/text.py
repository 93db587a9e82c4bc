"""Texts of one line: sizes and durations as people write them, and what an error says."""

from __future__ import annotations

import re

from .errors import UsageError

MB = 1_000_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str | int) -> int:
    """A size such as "2GB", "1.5 GiB" or 2000000000, in bytes.

    Raises:
        UsageError: not a size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * _UNITS[match[2].upper()])
    except (ValueError, KeyError):
        raise UsageError(f"a memory size must look like 2GB or 1.5GiB, got {text!r}") from None


def format_bytes(count: float) -> str:
    """A size for people: 1.72 GB, 431 MB."""
    if count >= 1e12:
        return f"{count / 1e12:.2f} TB"
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def format_seconds(seconds: float) -> str:
    """A duration for people: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def first_line(said: object, otherwise: str | None = None) -> str:
    """The first line of what an error, or another object, says of itself.

    Args:
        otherwise: what to say of an object that says nothing; None: the name of its type.
    """
    text = str(said).strip()
    if text:
        return text.splitlines()[0]
    return type(said).__name__ if otherwise is None else otherwise


def last_line(said: str | bytes, otherwise: str) -> str:
    """The last line that a process has printed, in which Python names the error that ended it.

    Args:
        otherwise: what to say of a process that printed nothing.
    """
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    return (text.strip().splitlines() or [otherwise])[-1]


def reason_of(error: BaseException) -> str:
    """What was wrong, in words and one line: of the system's errors without their number and path."""
    return first_line(getattr(error, "strerror", None) or error)


def one_line(text: object) -> str:
    """A text that is one line of a terminal or a log, moves no cursor and paints nothing: names of files, of bands and
    of items may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
