"""What tells that a file was written to or replaced, even where its size and time of change were put back."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil


def state_of(status: os.stat_result, *, numbered: bool) -> str:
    """The time at which anything of a file changed last, which the system alone sets, and the file's number.

    Args:
        numbered: whether numbers mean something there (`keeps_numbers`).
    """
    return f"{status.st_ctime_ns}:{status.st_ino if numbered else ''}"


def states_of(paths: Iterable[Path]) -> list[str]:
    """`state_of` each file."""
    kinds = _file_systems()
    return [state_of(path.stat(), numbered=_is_numbered(path, kinds)) for path in paths]


def keeps_numbers(path: Path) -> bool:
    """Whether a file there has one number as long as it lives; FUSE's file systems (sshfs, rclone, s3fs) may make
    numbers up as files are looked at."""
    return _is_numbered(path, _file_systems())


def _file_systems() -> dict[str, str]:
    """Their kinds, by the places where they begin."""
    return {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}


def _is_numbered(path: Path, kinds: dict[str, str]) -> bool:
    place = path.resolve()
    kind = next((kinds[str(folder)] for folder in (place, *place.parents) if str(folder) in kinds), "")
    return not kind.startswith("fuse")
