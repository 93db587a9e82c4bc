"""A limit on what Python code may compute that has no end of its own."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator

LOOK_S = 0.5
"""How often the clock is looked at; then the exception is raised as often, for in a finaliser it is lost."""


class TimeIsUpError(BaseException):
    """Not an Exception, so that code which tries this and that does not take it for a failed try."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise in this thread once the time is up, at its next step of Python.

    Args:
        seconds: of this process's computing, so that a busy machine changes nothing.

    Raises:
        TimeoutError: the block took longer.
    """
    thread, ended = ctypes.c_ulong(threading.get_ident()), threading.Event()
    lock, end, raised = threading.Lock(), time.process_time() + seconds, False

    def watch() -> None:
        nonlocal raised
        while not ended.wait(LOOK_S):
            with lock:
                if time.process_time() > end and not ended.is_set():
                    raised = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeIsUpError))

    watcher = threading.Thread(target=watch, name="time limit", daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            ended.set()
            with lock:
                pass
            # What is under way to this thread arrives in this loop, or never. Taken back by the interpreter's own call
            # for that, CPython would look for an exception at every step of Python from then on: slow, and an endless
            # loop under cProfile.
            for _ in range(100 if raised else 0):
                pass
    except TimeIsUpError:
        ended.set()
        raise TimeoutError(f"more than {seconds:g} s") from None
