"""The run's folder beside an output: which tiles are done, who is writing, what happened."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
        if where not in (out, *out.parents) and run_folder(out) not in (where, *where.parents):
            raise
        if isinstance(error, PermissionError):
            raise OutputError(f"no permission to write {where}; choose another path") from error
        raise OutputError(f"{out} cannot be written: {where}: {error.strerror}; choose another path") from error


class Record(Protocol):
    """What is kept of a finished cell: at least its row and column."""

    def to_json(self) -> dict[str, Any]: ...


class RunFolder:
    """Holds the lock on an output while open, and appends one line a tile to `records.jsonl`."""

    def __init__(self, output: Path) -> None:
        self.path = run_folder(output)
        self._output = output
        self._lock = FileLock(str(self.path / "lock"))
        self._records: TextIO | None = None
        self._discarded = False
        self._log: logging.Handler | None = None

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(f"{self._output} is being written by another run (lock {self.path / 'lock'})") from None
        self._log = logging.FileHandler(self.path / "log", delay=True)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            log.error("stopped: %s: %s", type(error).__name__, error)
        if self._records is not None:
            self._records.close()
        if self._log is not None:
            log.removeHandler(self._log)
            self._log.close()
        if self._discarded or (not self._output.exists() and not self._file.exists()):
            # Nothing was begun, or nothing is worth keeping: leave nothing behind.
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    @property
    def _file(self) -> Path:
        return self.path / "records.jsonl"

    def read(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The last record of each tile; a last line that a crash cut short is passed over."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        if self._file.is_file():
            for line in self._file.read_text().splitlines():
                try:
                    record = json.loads(line)
                    found[record["row"], record["column"]] = record
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
        return found

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


log = logging.getLogger("outsize.run")
log.setLevel(logging.INFO)
log.propagate = False
