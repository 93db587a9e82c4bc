"""Lists of pictures: CSV or Parquet with the columns path and label, one picture a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....tiler.base.errors import UsageError
from ....tiler.base.text import reason_of
from ....tiler.system.plain_file import open_plain
from ..base.name_list import compose

SUFFIXES = (".csv", ".parquet")
_COLUMNS = ("path", "label")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageList:
    """Pictures in the order of the list."""

    paths: list[str]
    labels: npt.NDArray[np.int64]
    """Numbers of `names`."""
    names: list[str]
    """Labels as they stand in the list, without spaces around them, composed (`name_list.compose`), sorted as texts."""
    repeated: int
    """Lines left out, since the same picture of the same identity came before."""


def read_image_list(path: Path) -> ImageList:
    """Read NAME.csv or NAME.parquet; paths in it are relative to its folder. The same lines give the same list.

    Raises:
        UsageError: no such list, a line without path or label, one picture with two labels, labels that are numbers but
            for some; Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"a list of pictures must be NAME.csv or NAME.parquet with the columns path,label, got {path.name}"
        )
    if suffix == ".csv":
        return _gather(path, "line", _read_csv(path))
    return _gather(path, "row", _read_parquet(path))


def _gather(path: Path, what: str, rows: Iterable[tuple[int, str | None, str | None]]) -> ImageList:
    """Args:
    what: of which (number, path, label) each is.
    """
    seen: dict[str, tuple[str, int]] = {}
    repeated = 0
    for number, name, given in rows:
        label = compose((given or "").strip())
        if not name or not label:
            raise UsageError(f"{what} {number} of {path} must have a path and a label, got {name!r}, {given!r}")
        other, first = seen.setdefault(str(path.parent / name), (label, number))
        if other != label:
            raise UsageError(
                f"{what} {number} of {path} gives {name} the label {label}, {what} {first} {other}; a picture shows "
                "one identity"
            )
        repeated += first != number
    if not seen:
        raise UsageError(f"{path} must list pictures, got none")
    _require_one_kind(path, what, list(seen.values()))
    names, labels = np.unique([label for label, _ in seen.values()], return_inverse=True)
    return ImageList(
        paths=list(seen), labels=labels.astype(np.int64), names=[str(name) for name in names], repeated=repeated
    )


def _require_one_kind(path: Path, what: str, lines: list[tuple[str, int]]) -> None:
    """Refuse names among numbers, most often -1, 1.5 or a slip: each would be an identity of its own.

    Args:
        lines: (label, line) of each picture.
    """
    numbers = [line for line in lines if line[0].isdecimal()]
    others = [line for line in lines if not line[0].isdecimal()]
    if numbers and others:
        rare, usual = sorted((numbers, others), key=len)
        raise UsageError(
            f"labels must all be whole numbers from 0, or all names, but {what} {rare[0][1]} of {path} has "
            f"{rare[0][0]!r}, {what} {usual[0][1]} {usual[0][0]!r}; mend or delete it"
        )


def _read_csv(path: Path) -> Iterator[tuple[int, str | None, str | None]]:
    try:
        with open_plain(path) as binary, io.TextIOWrapper(binary, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not set(_COLUMNS) <= set(rows.fieldnames or ()):
                raise UsageError(f"{path} must begin with the line path,label, got {','.join(rows.fieldnames or ())!r}")
            for row in rows:
                if None in row:
                    raise UsageError(
                        f"line {rows.line_num} of {path} must have {len(rows.fieldnames or ())} fields, as the first "
                        f"line has, got more; put paths with commas between quotes"
                    )
                yield rows.line_num, row["path"], row["label"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} must be a list of pictures that can be read: {reason_of(error)}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, str | None, str | None]]:
    """Rows are counted from 1. Labels may be whole numbers, which count as their decimal texts, as in CSV."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: lists in Parquet need the extra parquet: pip install 'outsize[parquet]', or write them as CSV"
        ) from error

    def require(field: pa.Field, kinds: str, *, is_good: bool) -> None:
        if not is_good:
            raise UsageError(f"{kinds}, the column {field.name} of {path} has {field.type}")

    number = 0
    try:
        with open_plain(path) as binary, parquet.ParquetFile(binary) as file:
            schema = file.schema_arrow
            if not set(_COLUMNS) <= set(schema.names):
                raise UsageError(
                    f"{path} must have the columns path and label, got {', '.join(schema.names) or 'none'}"
                )
            place, label = (schema.field(name) for name in _COLUMNS)
            require(place, "paths must be texts", is_good=_is_text(place.type))
            require(
                label,
                "labels must be texts or whole numbers",
                is_good=_is_text(label.type) or pa.types.is_integer(label.type),
            )
            for batch in file.iter_batches(columns=list(_COLUMNS)):
                pairs = zip(*(batch.column(name).to_pylist() for name in _COLUMNS), strict=True)
                for name, value in pairs:
                    number += 1
                    yield number, name, None if value is None else str(value)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{path} must be a list of pictures that can be read: {reason_of(error)}") from error


def _is_text(kind: object) -> bool:
    """Whether an Arrow type is text, or a dictionary of texts."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type  # pyright: ignore[reportAttributeAccessIssue] - what a dictionary has
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
