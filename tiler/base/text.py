"""Sizes and durations as people write them."""

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
