"""Pictures that a training cannot use: each named once, on the terminal and in a file."""

from __future__ import annotations

import json
from pathlib import Path

from ...tiler.base.text import one_line
from ..base.console import MOST_SHOWN, Console


class UnusablePictures:
    """Lines {"path", "reason"} of a file that all ranks add to; what is in it already is known."""

    def __init__(self, console: Console, path: Path) -> None:
        self._console, self._path = console, path
        self._seen = set(read_unusable(path))

    def add(self, failed: list[tuple[str, str]]) -> None:
        for name, reason in failed:
            if name in self._seen:
                continue
            self._seen.add(name)
            with self._path.open("a") as file:  # a line at once: ranks do not cut each other's
                file.write(json.dumps({"path": name, "reason": reason}) + "\n")
            if len(self._seen) <= MOST_SHOWN:
                self._console.remark(one_line(f"{name}: {reason}"))
            elif len(self._seen) == MOST_SHOWN + 1:
                self._console.remark(f"more pictures that cannot be used are named in {self._path}")


def read_unusable(path: Path) -> dict[str, str]:
    """Reasons by picture; a line that a kill cut off is left out."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            found[entry["path"]] = entry["reason"]
        except (ValueError, KeyError, TypeError):
            continue
    return found
