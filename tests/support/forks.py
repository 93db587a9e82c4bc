"""Work in a process forked from the test's."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import cloudpickle
from outsize.tiler.base.errors import TilerError

LIMIT_S = 60


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What that gives, or the refusal that it raises; an error where it does not end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(LIMIT_S)
            try:
                answer: Any = work()
            except TilerError as error:
                answer = error
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(cloudpickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    assert data, "the forked process hung or died"
    return pickle.loads(data)
