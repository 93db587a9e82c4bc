"""Dask's log lines on this terminal: errors only, while any cluster of this process is open."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..system.process_locks import ProcessLock

_CHANGING = ProcessLock()
_before: dict[logging.Handler, int] = {}
"""Handlers that are quiet now, and their own levels."""
_open: list[object] = []


@contextmanager
def errors_only() -> Iterator[None]:
    """Keep what Dask and its pages say below errors off stderr.

    Guarantee: from the first to enter to the last to leave, in whatever order, from any threads; then as before. Dask's
    own way gives back the level that it has met, which of clusters that overlap is another one's.
    """
    mark = object()
    with _CHANGING:
        _open.append(mark)
        for name in ("distributed", "bokeh"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler not in _before:
                    _before[handler] = handler.level
                    handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _CHANGING:
            _open.remove(mark)
            if not _open:
                for handler, level in _before.items():
                    handler.setLevel(level)
                _before.clear()
