"""Opening what is a file and nothing else: a pipe in its place would be waited for without end."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


NO_FILE = "it is no file, but a pipe, a device or a socket"


class NoFileError(OSError):
    """Something else than a file stands in a file's place."""


def require_at_most(path: Path | str, size: int, most: int | None) -> None:
    """Refuse to read more of a file than what is meant can have.

    Args:
        size: bytes that would be read.
        most: bytes; None: any number.

    Raises:
        OSError: it is more.
    """
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, at most {most:,} are read", str(path))


def open_plain(path: Path | str) -> BufferedReader:
    """Open a file, through links, and nothing else.

    Raises:
        NoFileError: it is a pipe, a socket, a device or a folder.
        OSError: it cannot be opened.
    """
    # A pipe without a writer opens at once, and is looked at before it is read.
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # of sockets, and of devices without a driver
            raise NoFileError(errno.ENXIO, "it is a socket or a device, not a file", str(path)) from error
        raise
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for test, name in _KINDS if test(mode)), "something else")
            raise NoFileError(errno.EINVAL, f"it is {kind}, not a file", str(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise
