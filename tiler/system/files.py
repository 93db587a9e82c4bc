"""Files: what a run does with those of this machine, or with the objects of a store, by the same calls."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from .places import is_remote, place_of, scheme_of
from .plain_file import NO_FILE, NoFileError, open_plain, require_at_most

MOST_TEXT = 64_000_000
"""Bytes of a file of texts or numbers that is read whole."""
REQUESTS = 16
"""To a store at once."""
DEADLINE_S = 60.0
"""For one request with all its retries; the wait before a body is sent has no limit of its own."""


def create_new(place: Path, value: bytes) -> bool:
    """Write what nobody else has written there; returns False where somebody has."""
    if is_remote(place):
        filesystem, name = _in_store(place)
        try:
            filesystem.pipe_file(name, value, mode="create", timeout=DEADLINE_S)
        except OSError:
            # Refused, in whatever words this store has for that; or ours, when the answer to a first try was lost.
            if not place.exists():
                raise
        return place.read_bytes() == value
    try:
        with place.open("xb") as file:
            file.write(value)
    except FileExistsError:
        return False
    except OSError:
        place.unlink(missing_ok=True)
        raise
    return True


def read_regular(path: Path, most: int | None = None) -> bytes:
    """What a file of this machine holds, read once: what is checked of it is what is used.

    Args:
        most: bytes; what is larger is no file of the kind that is meant.

    Raises:
        OSError: it is not there, larger, or no file: a pipe, a device or a socket, whose end might never come.
    """
    try:
        file = open_plain(path)
    except NoFileError as error:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from error
        raise OSError(errno.EINVAL, NO_FILE, str(path)) from error
    with file:
        require_at_most(path, os.fstat(file.fileno()).st_size, most)
        return file.read() if most is None else file.read(most)


def read_place(place: Path, most: int | None = None) -> bytes:
    """`read_regular`, or an object whole."""
    return place.read_bytes() if is_remote(place) else read_regular(place, most)


def put(place: Path, value: bytes) -> None:
    """Write an object, or fail in time."""
    filesystem, name = _in_store(place)
    filesystem.pipe_file(name, value, timeout=DEADLINE_S)


def write_whole(place: Path, value: bytes) -> None:
    """Write or replace a file; readers find the one or the other content."""
    if is_remote(place):
        put(place, value)
    else:
        fresh = place.with_name(f"{place.name}.new")
        try:
            fresh.write_bytes(value)
            fresh.replace(place)
        except OSError:  # of a full disk, where what was begun would stay
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise


def write_durably(path: Path, content: bytes) -> None:
    """Write or replace a file of this machine: after a power cut it holds the one content or the other."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def use_default_mode(path: Path) -> None:
    """Give a file of this machine the permissions of those that open() makes here: safetensors makes its files for
    their owner alone, whatever the umask, so that colleagues and servers could not read a model."""
    probe = path.with_name(f".{path.name}.mode")
    # Not of every file system.
    with suppress(OSError):
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
        probe.unlink()


def flush_file(place: Path) -> None:
    """Have a file and its name on the disk, so that it is there after a power cut; objects are, once written."""
    if not is_remote(place):
        _flush(place)
        sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder of this machine outlast a power cut."""
    _flush(folder)


def _flush(name: Path) -> None:
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def touch(place: Path, value: bytes) -> None:
    """Show that a file's owner lives; its content is known to be `value`."""
    if is_remote(place):
        put(place, value)
    else:
        os.utime(place)


def age_of(place: Path) -> float:
    """Seconds since a file was written or touched; in a store, by that store's clock."""
    return max(0.0, time.time() - place.stat().st_mtime)


def sizes_below(place: Path) -> Callable[[str], int | None]:
    """Sizes of files by their names below a place, None for those that are missing; of a store, from one listing."""
    if not is_remote(place):

        def look(name: str) -> int | None:
            try:
                return (place / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

        return look
    filesystem, root = _in_store(place)
    listed = filesystem.find(root, detail=True)
    return {name.removeprefix(f"{root}/"): int(entry["size"]) for name, entry in listed.items()}.get


def read_files(place: Path, names: list[str]) -> list[bytes]:
    """Contents of files below a place; those of a store are asked for at once."""
    if not is_remote(place):
        return [(place / name).read_bytes() for name in names]
    filesystem, root = _in_store(place)
    # Not `cat`, which takes brackets in a name for a pattern.
    none: list[None] = [None] * len(names)
    return filesystem.cat_ranges([f"{root}/{name}" for name in names], none, none, on_error="raise")


def append_line(place: Path, line: str) -> None:
    """Add a line to a small file; an object is written anew."""
    if is_remote(place):
        put(place, (place.read_bytes() if place.exists() else b"") + line.encode() + b"\n")
    else:
        with place.open("a") as file:
            file.write(line + "\n")


def find_matching(pattern: str) -> list[str]:
    """Files of a store that fit a pattern (* ? []), by name."""
    filesystem, name = _in_store(place_of(pattern))
    return sorted(f"{scheme_of(pattern)}://{found}" for found in filesystem.glob(name))


def upload_bytes(place: Path, value: bytes) -> None:
    """Write a file whole, with the folders above it."""
    make_folder(place.parent)
    write_whole(place, value)


def upload(file: Path, place: Path) -> None:
    """Put a file of this machine into a store."""
    filesystem, name = _in_store(place)
    filesystem.put_file(str(file), name)


def make_folder(place: Path) -> None:
    """Make a folder and those above it; a store has none, and no bucket is made."""
    if not is_remote(place):
        place.mkdir(parents=True, exist_ok=True)


def remove_file(place: Path) -> None:
    """Delete a file, if it is there."""
    if not is_remote(place):
        place.unlink(missing_ok=True)
        return
    filesystem, name = _in_store(place)
    with suppress(FileNotFoundError):
        filesystem.rm_file(name)


def remove_tree(place: Path) -> None:
    """Delete a folder with all that is in it, if it is there; of a bucket what lies at the top first, so that
    what a crash leaves is no store."""
    if not is_remote(place):
        if place.is_symlink():  # somebody's, who would have another folder written to
            place.unlink()
        elif place.exists():
            shutil.rmtree(place)
        return
    filesystem, root = _in_store(place)
    # Not `rm`, which takes brackets in a name for a pattern.
    names = filesystem.find(root)
    top = [name for name in names if "/" not in name.removeprefix(f"{root}/")]
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="remove") as pool:
        for chosen in (top, [name for name in names if name not in set(top)]):
            list(pool.map(filesystem.rm_file, chosen))


def remove_store(place: Path) -> None:
    """Delete a store so that a crash half-way leaves none that looks complete; in an object store its owner sees to
    that (`RunFolder.making`)."""
    if is_remote(place) or not place.exists():
        remove_tree(place)
        return
    doomed = _doomed(place)
    remove_tree(doomed)
    place.rename(doomed)
    remove_tree(doomed)


def replace_store(place: Path, made: Path) -> None:
    """Give a store the name of another, which is deleted, if it is there. An object store has no names of folders: the
    objects are copied, by the store itself, those of the top last; `made` is still there then, to be removed."""
    if not is_remote(place):
        doomed = _doomed(place)
        if place.exists():
            remove_tree(doomed)
            place.rename(doomed)
        made.rename(place)
        # Also what an earlier call was killed with, between the two names. Some file systems keep what is still read.
        with suppress(OSError):
            remove_tree(doomed)
        return
    remove_tree(place)
    filesystem, source = _in_store(made)
    _, target = _in_store(place)
    names = [name.removeprefix(f"{source}/") for name in filesystem.find(source)]
    for chosen in ([name for name in names if "/" in name], [name for name in names if "/" not in name]):
        if chosen:
            filesystem.copy([f"{source}/{name}" for name in chosen], [f"{target}/{name}" for name in chosen])


def _doomed(place: Path) -> Path:
    return place.with_name(place.name + ".deleting")


def _in_store(place: Path) -> tuple[Any, str]:
    """A store's file system, and the name that the place has there."""
    remote: Any = place
    return remote.fs, str(remote.path).rstrip("/")
