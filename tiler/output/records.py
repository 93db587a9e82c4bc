"""The run's folder beside an output: which tiles are done, who writes and wrote, what happened."""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil
from filelock import FileLock, Timeout

from ..base.errors import OutputError, TilerError
from ..base.text import first_line
from ..system.files import (
    MOST_TEXT,
    age_of,
    create_new,
    make_folder,
    read_place,
    remove_file,
    remove_tree,
    touch,
    write_whole,
)
from ..system.journal import Journal, find_journals, open_journal, read_journal
from ..system.logs import log
from ..system.places import is_remote


def run_folder(output: Path) -> Path:
    """OUT.zarr -> OUT.zarr.run"""
    return output.with_name(output.name + ".run")


def is_there(output: Path) -> bool:
    """Whether an output was made; one in an object store, where it cannot be made at once, not just begun."""
    return output.exists() and not (is_remote(output) and (run_folder(output) / MAKING).exists())


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn the refusals of a file system or an object store at the output into one line."""
    try:
        yield
    except TilerError:
        raise  # which says already what it is
    except OSError as error:
        if is_remote(out) and _is_of_store(out, error):
            raise _unwritable(out, error) from error
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
    except Exception as error:
        if is_remote(out) and _is_of_store(out, error):
            raise _unwritable(out, error) from error
        raise


def _is_of_store(out: Path, error: Exception) -> bool:
    """Whether an object store's library raised it, or it is about an object of the output."""
    made = {type(cause).__module__.partition(".")[0] for cause in (error, error.__cause__, error.__context__)}
    return bool(made & {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec"}) or str(out).split("://")[1] in str(
        error
    )


def _unwritable(out: Path, error: Exception) -> OutputError:
    reason = first_line(error)
    return OutputError(f"{out} cannot be written: {reason}; when it can, the same command goes on")


class Record(Protocol):
    """What is kept of a finished cell: at least its row and column."""

    def to_json(self) -> dict[str, Any]: ...


RECORDS, LOG = "records.jsonl", "run.log"
"""Journals in a run's folder, beside `run-GENERATION.json`."""
MAKING = "making"
"""There while an output in an object store is made, replaced or removed: what is there then is nothing yet."""
RECENT_TILES = 64
"""Of a run that died, whose chunks are read before they are believed."""
HEARTBEAT_S = 5.0
"""How often a run's owner shows that it lives."""
STALE_S = 60.0
"""Without a sign for so long, an owner on another machine is taken for dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who writes, or wrote last, into an output."""

    generation: int
    """Counts the calls that wrote into this output."""
    host: str = "an unknown machine"
    machine: str = ""
    """Where its process number means something: one start of one machine, seen from one container."""
    pid: int = 0
    user: str = "an unknown user"
    began: str = "at an unknown time"
    command: tuple[str, ...] = ()
    ended: str = ""
    """When it left; empty: it lives, or died."""
    how: str = ""
    """"finished", or what stopped it."""
    seen: float = 0.0
    """Seconds since its last sign of life."""

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, begun {self.began}, generation {self.generation}"

    @property
    def is_here(self) -> bool:
        """Whether it was another process of this machine, whose end can be seen from here."""
        return self.machine == _machine() and self.pid != os.getpid()

    @property
    def may_live(self) -> bool:
        """Whether it has not left, and is alive as far as can be told from here."""
        if self.ended or not self.is_here:
            return not self.ended and self.seen < STALE_S
        try:
            process = psutil.Process(self.pid)
            # Numbers of processes are used again; of some that are dead nobody has taken notice.
            begun = process.create_time() < datetime.fromisoformat(self.began).timestamp() + 1
            return begun and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError, TypeError, OverflowError):
            return False

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["seen"]
        return values


def find_runs(folder: Path) -> list[tuple[int, Path]]:
    """Generation and file of every run that wrote into an output, in order."""
    found: list[tuple[int, Path]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for place in folder.iterdir():
            match = re.fullmatch(r"run-(\d+)\.json", place.name)
            if match:
                found.append((int(match[1]), place))
    return sorted(found, key=lambda run: run[0])


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """What is known of every run that wrote into an output, in order; of damaged files the generation."""
    found: list[dict[str, Any]] = []
    for generation, place in find_runs(folder):
        values: Any = None
        with contextlib.suppress(ValueError, OSError, RecursionError):
            values = json.loads(read_place(place, MOST_TEXT))
        found.append({**Owner(generation=generation).to_json(), **(values if isinstance(values, dict) else {})})
    return found


def read_owner(folder: Path) -> Owner | None:
    """The last owner of an output's run folder; None where there was none. Of one whose file is damaged, only the
    generation is known."""
    runs = find_runs(folder)
    if not runs:
        return None
    generation, place = runs[-1]
    try:
        values = json.loads(read_place(place, MOST_TEXT))
        known = {name: values[name] for name in ("host", "machine", "pid", "user", "began", "ended", "how")}
        if not all(isinstance(known[name], int if name == "pid" else str) for name in known):
            raise TypeError("a value of another type")
        return Owner(generation=generation, command=tuple(map(str, values["command"])), seen=age_of(place), **known)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Owner(generation=generation, seen=age_of(place))


def require_owner(output: Path, generation: int) -> None:
    """What a worker asks before it writes: is its run still the last one?

    Raises:
        OutputError: another run owns the output by now, or its run's folder is gone.
    """
    folder = run_folder(output)
    # Generations have no gaps.
    if (folder / f"run-{generation + 1}.json").exists():
        raise OutputError(f"{output} belongs to a later run by now, this is a tile of run {generation}")
    if not (folder / f"run-{generation}.json").exists():
        raise OutputError(f"{output} or its run folder is gone; when it is back, the same command goes on")


class Records(Mapping[tuple[int, int], dict[str, Any]]):
    """The last record of each tile, in the order of what was done last. Held as the lines that they were read from, a
    tenth of what they take when parsed: there may be a million."""

    def __init__(self, lines: dict[tuple[int, int], bytes]) -> None:
        self._lines = lines

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        return json.loads(self._lines[at])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


def read_records(output: Path) -> Records:
    """The last record of each tile of an output, its chunks' sizes and hashes among it; lines that a crash cut short
    are passed over, and what is damaged otherwise is "lost", so that its tile is done again."""
    found: dict[tuple[int, int], bytes] = {}
    for line in read_journal(run_folder(output), RECORDS):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(line)
            at = record["row"], record["column"]
            if not all(type(number) is int for number in at):
                continue
            record = {"chunks": {}, **record}
            if not _is_sound(record):
                record = {
                    "row": at[0],
                    "column": at[1],
                    "state": "lost",
                    "error": "its record is damaged",
                    "chunks": {},
                }
            # In the order of what was done last: the records of a run that died end with those that need a look.
            found.pop(at, None)
            found[at] = json.dumps(record).encode()
    return Records(found)


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether a record has the types that those who write records give it."""
    chunks = record["chunks"]
    return (
        isinstance(record.get("state"), str)
        and isinstance(chunks, dict)
        and all(
            isinstance(value, list) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], str)
            for value in chunks.values()
        )
    )


class RunFolder:
    """Holds an output while open: its lock, its owner's sign of life, and one line for each tile.

    Of two calls that want one output one gets it: by the file system's lock, which dies with its process; where there
    are no locks, by the last owner's sign of life, and by the file of the next generation, which one call can make.
    """

    def __init__(self, output: Path) -> None:
        self.path = run_folder(output)
        self._output = output
        self._lock = FileLock(str(self.path / "lock"))
        self._records: Journal | None = None
        self._discarded = False
        self._log: _JournalHandler | None = None
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self.owner: Owner | None = None
        self.before: Owner | None = None
        """Who wrote last; with an empty `ended` it died."""
        self.result: dict[str, Any] = {}
        """What the run's file is to say of it, beside who and when."""

    def __enter__(self) -> RunFolder:
        if not is_remote(self.path) and self.path.is_symlink():
            raise OutputError(f"{self.path} is a link, and records of the run would be written elsewhere; remove it")
        make_folder(self.path)
        self._acquire()
        self._log = _JournalHandler(open_journal(self.path, LOG, self.generation))
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._log)
        self._heart = threading.Thread(target=self._beat, name="run owner", daemon=True)
        self._heart.start()
        log.info("generation %d begins", self.generation)
        if self.before is not None and not self.before.ended:
            log.warning("%s died", self.before)
        return self

    def _acquire(self) -> None:
        locked = self._lock_file()
        self.before = other = read_owner(self.path)
        try:
            # A lock that was got tells that nobody on this machine has it; others may not see it.
            unseen = other is not None and not (locked and other.host == socket.gethostname()) and other.may_live
            if locked is False or unseen:
                raise OutputError(self._refusal(other))
            self.owner = Owner(
                generation=(other.generation if other else 0) + 1,
                host=socket.gethostname(),
                machine=_machine(),
                pid=os.getpid(),
                user=_user(),
                began=_now(),
                command=tuple(sys.argv),
            )
            if not create_new(self._run_file, self._described(self.owner)):
                raise OutputError(f"{self._output} was taken by another run just now; one of them is enough")
        except BaseException:
            self._lock.release()
            raise

    def _refusal(self, other: Owner | None) -> str:
        if other is None or other.ended:
            return f"{self._output} is being written by another run (lock {self.path / 'lock'})"
        if other.host == socket.gethostname():
            return f"{self._output} is being written by another run: {other}, last sign of life {other.seen:.0f} s ago"
        return (
            f"{self._output} was being written {other.seen:.0f} s ago by {other}; if that is dead, try again in "
            f"{max(1.0, STALE_S - other.seen):.0f} s"
        )

    def _lock_file(self) -> bool | None:
        """Whether the lock was got; None where there are none."""
        if is_remote(self.path):
            return None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except NotImplementedError:
            log.warning("the file system of %s has no locks", self.path)
            return None
        return True

    @property
    def _run_file(self) -> Path:
        return self.path / f"run-{self.generation}.json"

    def _described(self, owner: Owner) -> bytes:
        return json.dumps({**owner.to_json(), **self.result}).encode()

    def _beat(self) -> None:
        assert self.owner is not None
        value = self._described(self.owner)
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(Exception):  # the next beat, or the run itself, will say what is wrong
                touch(self._run_file, value)
                self._sync_all()

    def _sync_all(self) -> None:
        """What objects hold is only what was synced."""
        if is_remote(self.path):
            for journal in (self._records, self._log and self._log.journal):
                if journal is not None:
                    journal.sync()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            log.error("stopped: %s: %s", type(error).__name__, error)
        self._stop.set()
        if self._heart is not None:
            self._heart.join(timeout=HEARTBEAT_S)  # a store may not answer it
        # A full or vanished disk, or a store that is out of reach, must not hide what stopped the run.
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            if self._records is not None:
                self._records.close()
        if self._log is not None:
            log.removeHandler(self._log)
            with contextlib.suppress(Exception):
                self._log.close()
        with contextlib.suppress(Exception):
            self.require()
            if self._discarded or not (self._output.exists() or find_journals(self.path, RECORDS)):
                # Nothing was begun, or nothing is worth keeping: leave nothing behind.
                remove_tree(self.path)
            else:
                how = "finished" if error is None else f"{type(error).__name__}: {error}".rstrip(": ")
                assert self.owner is not None
                write_whole(self._run_file, self._described(replace(self.owner, ended=_now(), how=how)))
        self._lock.release()

    def require(self) -> None:
        """Whether the output is still this run's: asked before what other calls may have changed is written.

        Raises:
            OutputError: a later run owns it.
        """
        require_owner(self._output, self.generation)

    @property
    def generation(self) -> int:
        """Of this run among those that wrote into the output."""
        assert self.owner is not None
        return self.owner.generation

    def read(self) -> Records:
        """The last record of each tile."""
        return read_records(self._output)

    def doubted(self, records: Records) -> set[tuple[int, int]]:
        """Those of the last records that are to be read before they are believed: their run died, or one since then
        did, and no call has looked at them."""
        journals = find_journals(self.path, RECORDS)
        last = max((int(re.findall(r"\d+", place.name)[0]) for place in journals), default=0)
        unended = any(
            not entry["ended"] for entry in read_runs(self.path) if last <= entry["generation"] < self.generation
        )
        return set(list(records)[-RECENT_TILES:]) if unended else set()

    def append(self, record: Record) -> None:
        """Add a record; in a file it survives the death of this process, in an object store when it is synced."""
        if self._records is None:
            self._records = open_journal(self.path, RECORDS, self.generation)
        self._records.add(json.dumps(record.to_json()))

    def sync(self) -> None:
        """Force what was appended to disk, or into its store."""
        if self._records is not None:
            self._records.sync()

    @contextmanager
    def making(self) -> Iterator[None]:
        """While the output is made, replaced or removed. In an object store this takes more than one step: what a call
        that died in between left there is nothing, and is removed by the next."""
        if is_remote(self.path):
            write_whole(self.path / MAKING, b"")
        yield
        if is_remote(self.path):
            remove_file(self.path / MAKING)

    def discard(self) -> None:
        """Remove the folder when it is left: the output says all that is worth keeping."""
        self._discarded = True

    def clear(self) -> None:
        """Forget all records."""
        if self._records is not None:
            self._records.close()
            self._records = None
        for place in find_journals(self.path, RECORDS):
            remove_file(place)


class _JournalHandler(logging.Handler):
    """Puts what is logged into a journal."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.journal.add(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler: what cannot be logged must not stop what is done
            self.handleError(record)

    def close(self) -> None:
        self.journal.close()
        super().close()


def _user() -> str:
    """The name, or the number where a container has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _machine() -> str:
    """Names of machines are shared by some, process numbers by containers of one."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
