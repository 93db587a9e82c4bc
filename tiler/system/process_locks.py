"""Locks that all threads of a process share, and what a forked process must forget."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path


class ProcessLock:
    """A re-entrant lock that a forked process finds free: the thread that held it did not come along.

    A fork may find what the lock guards half changed, so whoever guards a value by it forgets the value by
    `after_fork`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        after_fork(self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def after_fork(forget: Callable[[], None]) -> None:
    """Call that in every process that is forked from this one, before anything else of it."""
    os.register_at_fork(after_in_child=forget)


TRACING = ProcessLock()
"""Held while torch traces or exports, or OpenVINO converts: both keep what they do there for the whole process."""

_forks: list[int] = []
_threads: list[int] = [1]
"""Of this process's parent, as it forked."""


def is_forked() -> bool:
    """Whether this process was forked from one that had imported this: threads of its engines did not come along."""
    return bool(_forks)


def has_lost_threads() -> bool:
    """Whether this process was forked from one with more threads than the one that forked: whoever counts on one of
    them, as OpenMP does on those that it has started, waits for ever."""
    return is_forked() and _threads[0] > 1


def _count_threads() -> None:
    try:
        _threads[0] = len(list(Path("/proc/self/task").iterdir()))
    except OSError:  # not Linux
        _threads[0] = 2


after_fork(lambda: _forks.append(os.getppid()))
os.register_at_fork(before=_count_threads)
