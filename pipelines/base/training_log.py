"""train.jsonl: one line a step, one a validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tiler.system.files import write_durably


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a kill cut off is left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class TrainingLog:
    """A log that is added to; lines of steps after `step`, which will be made again, are taken out first.

    Args:
        validated: likewise of validations; None: `step`.
    """

    def __init__(self, path: Path, step: int, validated: int | None = None) -> None:
        self._path = path
        last = step if validated is None else validated
        kept = [
            line
            for line in read_log(path)
            if (line["validation"]["step"] <= last if "validation" in line else line["step"] <= step)
        ]
        write_durably(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def has_validation(self, step: int) -> bool:
        """Whether one after that step is in the log."""
        return any("validation" in line and line["validation"]["step"] == step for line in read_log(self._path))

    def add(self, values: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
