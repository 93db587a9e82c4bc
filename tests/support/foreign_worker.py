"""A `dask worker` of one thread, on a machine where packages are missing or older.

    python -m outsize.tests.support.foreign_worker ADDRESS NAME=HOW...

HOW is "broken" (an import fails), "gone" (the package is not there at all) or another version than the true one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any


class _Blocked:
    """Finds no module of some packages."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def _hide(hidden: dict[str, str]) -> None:
    truth = importlib.metadata.version

    def version(name: str) -> str:
        how = hidden.get(name, "broken")
        if how == "gone":
            raise importlib.metadata.PackageNotFoundError(name)
        return truth(name) if how == "broken" else how

    importlib.metadata.version = version
    blocked = {name for name, how in hidden.items() if how in ("broken", "gone")}
    for name in [name for name in sys.modules if name.partition(".")[0] in blocked]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Blocked(blocked))  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Serve until the scheduler ends."""
    address, *words = sys.argv[1:]
    _hide(dict(word.split("=", 1) for word in words))
    from distributed.cli.dask_worker import main as serve

    settings = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0", "--death-timeout", "10"]
    serve([address, *settings])


if __name__ == "__main__":
    main()
