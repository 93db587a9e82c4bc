"""Lists of picture pairs in the format of LFW's pairs.txt: folds of pairs of one person, then of two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ....tiler.base.errors import UsageError
from ....tiler.base.text import reason_of
from ....tiler.system.plain_file import open_plain
from ..base.name_list import compose

Shot = tuple[str, int]
"""A person's name and the number of her picture, from 1 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two pictures."""

    fold: int
    first: Shot
    second: Shot
    line: int
    """Where it stands in its list."""

    @property
    def is_same(self) -> bool:
        """Whether they show one person."""
        return self.first[0] == self.second[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairList:
    """Pairs in folds."""

    folds: int
    pairs: list[Pair]


def read_pairs(path: Path) -> PairList:
    """Read `FOLDS<tab>COUNT`, then for each fold COUNT lines `name n1 n2` and COUNT lines `name1 n1 name2 n2`.

    Raises:
        UsageError: it cannot be read, or breaks the format; says where.
    """
    try:
        with open_plain(path) as file:
            lines = compose(file.read().decode()).replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} must be a list of pairs as text: {reason_of(error)}") from error
    numbered = [(number, _fields(line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"{path} must begin with the numbers of folds and of pairs, got an empty file")
    head = numbered[0][1]
    if len(head) != 2 or not all(field.isdecimal() and int(field) for field in head):
        raise UsageError(
            f"{path}, line {numbered[0][0]}: must be FOLDS and COUNT, such as 10 and 300, got {lines[0]!r}"
        )
    folds, count = map(int, head)
    rest = numbered[1:]
    if len(rest) != 2 * folds * count:
        raise UsageError(
            f"{path} must have {2 * folds * count} pairs, {folds} folds of {count} pairs of one person and {count} of "
            f"two, got {len(rest)}"
        )
    pairs: list[Pair] = []
    for place, (number, fields) in enumerate(rest):
        same = place % (2 * count) < count
        shots = _shots(fields) if len(fields) == (3 if same else 4) else None
        if shots is None or (shots[0][0] == shots[1][0]) != same or shots[0] == shots[1]:
            wanted = "name n1 n2, two pictures of one person" if same else "name1 n1 name2 n2, of two persons"
            raise UsageError(f"{path}, line {number}: must be {wanted}, got {lines[number - 1]!r}")
        pairs.append(Pair(fold=place // (2 * count), first=shots[0], second=shots[1], line=number))
    return PairList(folds=folds, pairs=pairs)


def _fields(line: str) -> list[str]:
    """Between tabs, so that names may hold spaces; or between spaces."""
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def _shots(fields: list[str]) -> tuple[Shot, Shot] | None:
    """None where a number is none."""
    name, first, *other, second = fields
    if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
        return None
    return (name, int(first)), (other[0] if other else name, int(second))


def write_pairs(path: Path, pairs: PairList) -> None:
    """Write a list as `read_pairs` reads it."""
    count = len(pairs.pairs) // (2 * pairs.folds)
    lines = [f"{pairs.folds}\t{count}"]
    for pair in pairs.pairs:
        second = [str(pair.second[1])] if pair.is_same else [pair.second[0], str(pair.second[1])]
        lines.append("\t".join([pair.first[0], str(pair.first[1]), *second]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
