"""A training's folder: one training in it, worked on by one command at a time, with training.json to tell which."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ... import __version__
from ...tiler.base.differences import say_differences, shorten
from ...tiler.base.errors import OutputError
from ...tiler.base.text import reason_of
from ...tiler.system.files import write_durably
from ...tiler.system.machine import find_versions

TRAINING, LOCK = "training.json", ".lock"


@contextmanager
def owning_folder(out: Path, strange: str) -> Iterator[None]:
    """One training in one folder at a time; the folder is made where there is none, and goes if it stays empty.

    Args:
        strange: what is said of a folder that holds something else; `{name}` stands for that.

    Raises:
        OutputError: another training runs there, something else lies there, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder; choose another folder")
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        strangers = [path.name for path in out.iterdir() if path.name != LOCK]
        if strangers and not (out / TRAINING).exists():
            raise OutputError(f"{out} {strange.format(name=strangers[0])}")
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"another training runs in {out}; wait for it, or choose another folder") from None
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {reason_of(error)}; choose another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if made and [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


def describe_training(out: Path, fingerprint: dict[str, Any], data: dict[str, Any]) -> None:
    """Leave training.json, which makes the folder this training's; one that is there stays."""
    if not (out / TRAINING).exists():
        described = {
            "version": __version__,
            "fingerprint": fingerprint,
            "command": ["outsize", *sys.argv[1:]],
            "versions": find_versions(),
            "data": data,
        }
        write_durably(out / TRAINING, json.dumps(described, indent=1).encode() + b"\n")


def read_training(out: Path) -> dict[str, Any] | None:
    """What `describe_training` left; None: nothing yet."""
    path = out / TRAINING
    return json.loads(path.read_text()) if path.exists() else None


def require_same_training(out: Path, ours: dict[str, Any], remedy: str) -> None:
    """Go on only with what the folder's training was begun with.

    Raises:
        OutputError: names what differs, and the remedy.
    """
    try:
        found = read_training(out)
        theirs = ours if found is None else found["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{out / TRAINING} cannot be read: {reason_of(error)}; {remedy}") from error
    said = say_differences(theirs, ours, _say)
    if said:
        raise OutputError(f"{out} holds another training: {'; '.join(said[:4])}; {remedy}")


def _say(value: Any) -> str:
    return shorten("not given" if value is None else json.dumps(value), 60)
