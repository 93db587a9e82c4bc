"""The run's folder beside an output: which tiles are done, who writes and wrote, what happened."""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from filelock import FileLock, Timeout

from .errors import OutputError


def run_folder(output: Path) -> Path:
    """OUT.zarr -> OUT.zarr.run"""
    return output.with_name(output.name + ".run")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn the file system's refusals at the output into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"no space left for {out}; free some and run the same command again") from error
        where = Path(str(error.filename or ""))
        if where not in (out, *out.parents) and not {out, run_folder(out)} & {where, *where.parents}:
            raise
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise OutputError(
                f"no permission to write {where}; choose another path, or allow it and run the same command again"
            ) from error
        raise OutputError(
            f"{out} cannot be written: {where}: {error.strerror}; when it can, the same command goes on"
        ) from error


class Record(Protocol):
    """What is kept of a finished cell: at least its row and column."""

    def to_json(self) -> dict[str, Any]: ...


OWNER, RUNS, RECORDS = "owner.json", "runs.jsonl", "records.jsonl"
HEARTBEAT_S = 5.0
"""How often a run's owner shows that it lives."""
STALE_S = 60.0
"""Without a sign for so long, an owner on another machine is taken for dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who writes, or wrote last, into an output."""

    generation: int
    """Counts the calls that wrote into this output."""
    host: str
    pid: int
    user: str
    began: str
    command: tuple[str, ...]
    ended: str = ""
    """When it left; empty: it lives, or died."""
    how: str = ""
    """"finished", or what stopped it."""
    seen: float = 0.0
    """Seconds since its last sign of life."""

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, begun {self.began}, generation {self.generation}"


def read_owner(folder: Path) -> Owner | None:
    """The last owner of an output's run folder; None where there was none, or its file is damaged."""
    path = folder / OWNER
    try:
        values = json.loads(path.read_text())
        return Owner(
            **{**values, "command": tuple(values["command"]), "seen": max(0.0, time.time() - path.stat().st_mtime)}
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_generation(output: str | Path) -> int:
    """Of the run that owns an output now; 0 where none does. A worker that finds another one than its own writes
    nothing."""
    owner = read_owner(run_folder(Path(output)))
    return owner.generation if owner is not None else 0


def read_records(output: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The last record of each tile of an output; a last line that a crash cut short is passed over."""
    file = run_folder(output) / RECORDS
    found: dict[tuple[int, int], dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
                found[record["row"], record["column"]] = record
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return found


class RunFolder:
    """Holds an output while open: its lock, its owner's sign of life, and one line a tile in `records.jsonl`."""

    def __init__(self, output: Path) -> None:
        self.path = run_folder(output)
        self._output = output
        self._lock = FileLock(str(self.path / "lock"))
        self._records: TextIO | None = None
        self._discarded = False
        self._log: logging.Handler | None = None
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self.owner: Owner | None = None
        self.before: Owner | None = None
        """Who wrote last; with an empty `ended` it died."""
        self.result: dict[str, Any] = {}
        """What the list of runs is to say of this one."""

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        self._log = logging.FileHandler(self.path / "log", delay=True)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._log)
        self.owner = Owner(
            generation=(self.before.generation if self.before else 0) + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            user=_user(),
            began=_now(),
            command=tuple(sys.argv),
        )
        self._write_owner(self.owner)
        self._heart = threading.Thread(target=self._beat, name="run owner", daemon=True)
        self._heart.start()
        log.info("generation %d begins", self.owner.generation)
        if self.before is not None and not self.before.ended:
            log.warning("%s died", self.before)
        return self

    def _acquire(self) -> None:
        """The file system's lock, which dies with its process; and, where another machine may not see that, the sign
        of life."""
        refusal = OutputError(f"{self._output} is being written by another run (lock {self.path / 'lock'})")
        held = True
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            held = False
        except NotImplementedError:
            log.warning("the file system of %s has no locks", self.path)
        self.before = read_owner(self.path)
        other = self.before
        if other is not None and not other.ended:
            if not held:
                refusal = OutputError(
                    f"{self._output} is being written by another run: {other}, last sign of life {other.seen:.0f} s ago"
                )
            elif other.host != socket.gethostname() and other.seen < STALE_S:
                self._lock.release()
                held = False
                refusal = OutputError(
                    f"{self._output} was being written {other.seen:.0f} s ago by {other}; if that is dead, try again "
                    f"in {STALE_S - other.seen:.0f} s"
                )
        if not held:
            raise refusal

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path / OWNER)

    def _write_owner(self, owner: Owner) -> None:
        values = asdict(owner)
        del values["seen"]
        fresh = self.path / f"{OWNER}.new"
        fresh.write_text(json.dumps(values))
        fresh.replace(self.path / OWNER)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            log.error("stopped: %s: %s", type(error).__name__, error)
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
        if self._records is not None:
            self._records.close()
        if self._log is not None:
            log.removeHandler(self._log)
            self._log.close()
        if self._discarded or (not self._output.exists() and not self._file.exists()):
            # Nothing was begun, or nothing is worth keeping: leave nothing behind.
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # a full or vanished disk must not hide what stopped the run
                self._sign_off("finished" if error is None else f"{type(error).__name__}: {error}".rstrip(": "))
        self._lock.release()

    def _sign_off(self, how: str) -> None:
        """Say that this run left, and keep what is known of it."""
        assert self.owner is not None
        owner = replace(self.owner, ended=_now(), how=how)
        values = asdict(owner)
        del values["seen"]
        with (self.path / RUNS).open("a") as runs:
            runs.write(json.dumps({**values, **self.result}) + "\n")
        self._write_owner(owner)

    @property
    def generation(self) -> int:
        """Of this run among those that wrote into the output."""
        assert self.owner is not None
        return self.owner.generation

    @property
    def _file(self) -> Path:
        return self.path / RECORDS

    def read(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The last record of each tile."""
        return read_records(self._output)

    def append(self, record: Record) -> None:
        """Add a record; it survives the death of this process."""
        if self._records is None:
            cut_short = self._file.is_file() and not self._file.read_bytes().endswith(b"\n")
            self._records = self._file.open("a")
            if cut_short:
                self._records.write("\n")
        self._records.write(json.dumps(record.to_json()) + "\n")
        self._records.flush()

    def sync(self) -> None:
        """Force what was appended to disk."""
        if self._records is not None:
            os.fsync(self._records.fileno())

    def discard(self) -> None:
        """Remove the folder when it is left: the output says all that is worth keeping."""
        self._discarded = True

    def clear(self) -> None:
        """Forget all records."""
        if self._records is not None:
            self._records.close()
            self._records = None
        self._file.unlink(missing_ok=True)


def remove_output(output: Path) -> None:
    """Delete an output store, for --overwrite."""
    if output.is_dir():
        # Renamed first: a crash half-way leaves no store that looks complete.
        doomed = output.with_name(output.name + ".deleting")
        if doomed.exists():
            shutil.rmtree(doomed)
        output.rename(doomed)
        shutil.rmtree(doomed)


def _user() -> str:
    """The name, or the number where a container has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


log = logging.getLogger("outsize.run")
log.setLevel(logging.INFO)
log.propagate = False
