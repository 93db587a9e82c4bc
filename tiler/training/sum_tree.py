"""The sum tree: a step's tiles cut into fixed groups, whose sums are added in a fixed order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

GROUPS = 16
"""Of a step, at most: each gives a gradient as large as the weights."""

T = TypeVar("T")


def cut_groups(tiles: Sequence[T], groups: int = GROUPS) -> list[tuple[T, ...]]:
    """At most that many runs of neighbouring tiles, of sizes that differ by one; a function of the tiles alone."""
    count = min(groups, len(tiles))
    bounds = [index * len(tiles) // count for index in range(count + 1)] if count else [0]
    return [tuple(tiles[start:stop]) for start, stop in itertools.pairwise(bounds)]


def fold_tree(leaves: Iterable[T], add: Callable[[T, T], T]) -> T:
    """All leaves added in pairs of neighbours, then those sums, and so on: an order that no timing changes.

    Each sum is made as soon as both its parts are there, so that of n leaves no more than log2(n) + 1 sums wait.
    """
    waiting: list[tuple[int, T]] = []
    """With how many leaves each holds: powers of two that fall, as the digits of a binary number."""
    for leaf in leaves:
        held, total = 1, leaf
        while waiting and waiting[-1][0] == held:
            total = add(waiting.pop()[1], total)
            held *= 2
        waiting.append((held, total))
    total = waiting.pop()[1]
    while waiting:
        total = add(waiting.pop()[1], total)
    return total
