"""Dask that cannot be imported: with settings that it cannot read, which it says in its own ways."""

from __future__ import annotations

import os
import traceback

from ..base.errors import UsageError
from ..base.text import reason_of


def find_dask_trouble(error: Exception) -> UsageError | None:
    """The error in words where Dask failed at its settings as it was imported; None: it is another one."""
    if isinstance(error, ImportError):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and package in ("dask", "distributed"):
            names = sorted(name for name in os.environ if name.startswith("DASK_"))
            where = f"variables {', '.join(names)} and files in ~/.config/dask" if names else "files in ~/.config/dask"
            said = f"{type(error).__name__}: {reason_of(error)}"
            return UsageError(f"Dask does not start with its settings ({said}); mend or remove them: {where}")
    return None
