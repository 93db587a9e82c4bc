"""Exact order statistics of any number of scores that are never held: counted by digits, in passes.

A score is a whole multiple of 2^-48. Numbers of 50 bits are counted by their first 18 bits, those of the bins that hold
a wanted place by the next 16, and by the last 16: three passes, and every wanted score is known to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..base.errors import HeadError

Keys = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]
FRACTION_BITS = 48
_OFFSET = 1 << 49
FIRST_BITS = 18
_DIGITS = ((32, FIRST_BITS), (16, 16), (0, 16))
"""Shift and bits of each digit."""


def keys_of(scores: npt.NDArray[np.float64]) -> Keys:
    """Scores of -1.9 ... 1.9 as whole numbers, rounded to multiples of 2^-48."""
    return np.rint(scores * 2.0**FRACTION_BITS).astype(np.int64) + _OFFSET


def score_of(key: int) -> float:
    """The score of a key, exactly."""
    return (key - _OFFSET) / 2**FRACTION_BITS


def first_edges() -> npt.NDArray[np.float64]:
    """The lower edges of the bins of the first digit."""
    return np.ldexp((np.arange(1 << FIRST_BITS, dtype=np.float64) * 2.0**32 - _OFFSET), -FRACTION_BITS)


def count_first(keys: Keys) -> Counts:
    """(2^18,): how many keys have each first digit."""
    return np.bincount(keys.ravel() >> _DIGITS[0][0], minlength=1 << FIRST_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The key at a place."""

    key: int
    above: int
    """Keys that are larger: less than or equal to the place, which counts from 0."""


def select_from_top(first: Counts, make_blocks: Callable[[], Iterator[Keys]], places: list[int]) -> list[Placed]:
    """The keys at places from the top, 0 being the largest.

    Args:
        first: of all keys, by `count_first`.
        make_blocks: begins another pass over the same keys.

    Raises:
        HeadError: a place that is not there; passes that do not show the same keys.
    """
    total = int(first.sum())
    if any(not 0 <= place < total for place in places):
        raise HeadError(f"places must be in 0 ... {total - 1}, got {places}")
    found = [_descend(first, place) for place in places]
    prefixes, above = [digit for digit, _ in found], [count for _, count in found]
    expected = {digit: int(first[digit]) for digit in prefixes}
    for shift, bits in _DIGITS[1:]:
        counts = {prefix: np.zeros(1 << bits, np.int64) for prefix in expected}
        for block in make_blocks():
            keys = block.ravel()
            heads = keys >> (shift + bits)
            for prefix, count in counts.items():
                digits = (keys[heads == prefix] >> shift) & ((1 << bits) - 1)
                count += np.bincount(digits, minlength=1 << bits)
        if any(int(count.sum()) != expected[prefix] for prefix, count in counts.items()):
            raise HeadError("two passes over the same pairs had different scores; run it again on one thread")
        expected = {}
        for index, place in enumerate(places):
            count = counts[prefixes[index]]
            digit, larger = _descend(count, place - above[index])
            above[index] += larger
            prefixes[index] = (prefixes[index] << bits) | digit
            expected[prefixes[index]] = int(count[digit])
    return [Placed(key=key, above=count) for key, count in zip(prefixes, above, strict=True)]


def _descend(counts: Counts, place: int) -> tuple[int, int]:
    """(the bin that holds a place from the top, how many lie in bins above)."""
    from_top = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_top, place, side="right"))
    return len(counts) - 1 - index, int(from_top[index - 1]) if index else 0
