"""Interrupts: Ctrl-C, SIGTERM and a lost terminal stop a command in one line, a second Ctrl-C at once."""

from __future__ import annotations

import logging
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


def heed_interrupts(end: Callable[[], None]) -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once, so that a run says how to go on; those that were
    ignored stay so, as `nohup` wants it. To be called in the main thread.

    Args:
        end: what a second SIGINT does, while the first one is still winding up; must not return. Other signals are
            often sent twice, and mean nothing more by that.
    """
    stopping = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal stopping
        if number == signal.SIGHUP:
            _leave_lost_terminal()
        if not stopping:
            stopping = True
            # What Dask's threads meet while their cluster is taken down in the midst of work is no news to anybody.
            logging.getLogger("tornado.application").disabled = True
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            end()

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def _leave_lost_terminal() -> None:
    """Writing to a terminal that is gone would fail, and that failure hide what it is about."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class StopAfterStep:
    """Whether somebody has asked for the end; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Signals end the training after a step, when there is something whole to save."""

        def handle(number: int, _: FrameType | None) -> None:
            if number == signal.SIGHUP:
                _leave_lost_terminal()
            if self.is_asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.is_asked = True

        before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
