"""Lists of pictures: CSV with the columns path and label, one picture a line."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...tiler.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageList:
    """Pictures in the order of the list."""

    paths: list[str]
    labels: npt.NDArray[np.int64]
    """Numbers of `names`."""
    names: list[str]
    """Labels as they stand in the list, sorted."""
    repeated: int
    """Lines left out, since the same picture of the same identity came before."""


def read_image_list(path: Path) -> ImageList:
    """Read a list; paths in it are relative to its folder.

    Raises:
        UsageError: no such list, a line without path or label, one picture with two labels.
    """
    if path.suffix.lower() != ".csv":
        raise UsageError(f"a list of pictures must be CSV (NAME.csv with the columns path,label), got {path.name}")
    seen: dict[str, tuple[str, int]] = {}
    repeated = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"path", "label"} <= set(rows.fieldnames or ()):
                raise UsageError(f"{path} must begin with the line path,label, got {','.join(rows.fieldnames or ())!r}")
            for row in rows:
                name, label = row["path"], row["label"]
                if not name or not label:
                    raise UsageError(
                        f"line {rows.line_num} of {path} must have a path and a label, got {name!r}, {label!r}"
                    )
                place = str(path.parent / name)
                other, line = seen.setdefault(place, (label, rows.line_num))
                if other != label:
                    raise UsageError(
                        f"line {rows.line_num} of {path} gives {name} the label {label}, line {line} {other}; a "
                        "picture shows one identity"
                    )
                repeated += line != rows.line_num
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} must be a list of pictures that can be read: {error}") from error
    if not seen:
        raise UsageError(f"{path} must list pictures below its first line, got none")
    names, labels = np.unique([label for label, _ in seen.values()], return_inverse=True)
    return ImageList(
        paths=list(seen), labels=labels.astype(np.int64), names=[str(name) for name in names], repeated=repeated
    )
