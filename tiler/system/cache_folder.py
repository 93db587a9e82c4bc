"""This user's folder of what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

COMPILED_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""torch's own."""


def cache_folder() -> Path:
    """Where programs are kept: OUTSIZE_CACHE_DIR, else outsize in the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outsize"


def compiled_folder() -> Path:
    """Where torch.compile keeps what it has made."""
    return cache_folder() / "compiled"


def keep_compiled_here() -> None:
    """Have torch.compile keep its code in `compiled_folder`, unless the user has named another place.

    By itself it loads code from a folder for temporary files whose name anybody can foresee, and make before it; torch
    chooses that when its tracer is imported.
    """
    named = os.environ.get(COMPILED_VARIABLE)
    if not named or Path(named).name.startswith("torchinductor_"):
        os.environ[COMPILED_VARIABLE] = str(compiled_folder())


FOLDER_VARIABLE = "OUTSIZE_CACHE_DIR"
