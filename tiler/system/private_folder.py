"""Folders for temporary files that nobody but this user, and root, can change or replace."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..base.errors import TilerError
from ..base.text import reason_of
from .logs import log


class TemporaryFolderError(TilerError):
    """A place for temporary files where none can be written, or where other users could replace them."""


PREFIX = "outsize-dask-"


@contextmanager
def private_folder(place: str | Path | None, remedy: str) -> Iterator[Path]:
    """A new folder, mode 0700, removed at the end; a process that was killed leaves it to the next one's call.

    Args:
        place: where it is made; None: where Python makes temporary files.
        remedy: of a place that will not do, ends the error.

    Raises:
        TemporaryFolderError: nothing can be written there, or other users could put a folder of theirs in its place.
    """
    path = _find_place(place, remedy)
    _sweep(path)
    folder, lock = _make(path, remedy)
    process = os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == process:  # not in a fork of it
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _find_place(place: str | Path | None, remedy: str) -> Path:
    try:
        path = Path(tempfile.gettempdir() if place is None else place).absolute()
        if place is not None:
            make_private(path)
        path = path.resolve(strict=True)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except (OSError, TypeError, ValueError) as error:
        said = reason_of(error)
        raise TemporaryFolderError(
            f"no temporary files in {'any folder' if place is None else place}: {said}; {remedy}"
        ) from error
    if why := why_others_can_write(path):
        raise TemporaryFolderError(f"temporary files are not safe in {path}, {why}; {remedy}")
    return path


def make_private(path: Path) -> None:
    """Make a folder and those above it that are not there, for this user alone, whatever his umask is."""
    for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def why_others_can_write(path: Path) -> str:
    """How other users could take away what this user has put in a folder that is there, or put another folder in its
    place; empty: in no way. A sticky folder such as /tmp is safe for new names of ours, not for ones that others can
    foresee."""
    path = path.resolve(strict=True)
    for folder in (path, *path.parents):
        if why := _find_others(folder):
            return f"{'which' if folder == path else f'as {folder}'} {why}: others could have you run their code"
    return ""


def _find_others(folder: Path) -> str:
    """Who else can rename and remove what lies in a folder; empty: nobody."""
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid(), Path("/").stat().st_uid):  # in containers "/" can belong to nobody
        return f"belongs to {_name_user(found.st_uid)}"
    if found.st_mode & stat.S_ISVTX:  # each removes only his own
        return ""
    if found.st_mode & stat.S_IWOTH:
        return "can be changed by all users"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid):
        return f"can be changed by the group {found.st_gid}"
    return ""


def _name_user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _is_own_group(number: int) -> bool:
    """Root's, or the user's group of one, which many systems give each user under his own name."""
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return number == 0
    return number == 0 or (number == user.pw_gid and group.gr_name == user.pw_name and not group.gr_mem)


def _make(place: Path, remedy: str) -> tuple[Path, int]:
    """The folder, and a handle that holds its lock."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise TemporaryFolderError(f"no temporary files in {place}: {reason_of(error)}; {remedy}") from error
        with contextlib.suppress(OSError):  # a file system without locks: nothing is swept there
            fcntl.flock(lock, fcntl.LOCK_SH)
        # Another process may just have taken it for one that was left.
        if os.fstat(lock).st_nlink and folder.is_dir():
            return folder, lock
        os.close(lock)


def _sweep(place: Path) -> None:
    """Remove folders whose processes were killed: the kernel has let go of their locks."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid != os.geteuid():
                    continue
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                log.info("removed %s, which a run that was killed had left", folder)
            finally:
                os.close(handle)
