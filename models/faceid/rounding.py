"""Rounding of float32 rows to the half precision that they are stored in, stochastic and reproducible.

A step moves most rows by about 1e-8, a thousandth of the distance between half-precision numbers there. Rounded to the
nearest, they would never move; rounded up or down with the right probabilities, they move right on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

POOL = 1 << 22
"""Random words that are drawn for a step; each block reads them from places of its own."""
_MASK = (1 << 64) - 1
_DROPPED = {torch.float16: 13, torch.bfloat16: 16}
"""Bits of float32's fraction that the type has not."""
_SUBNORMAL_STEP = {torch.float16: 2.0**-24, torch.bfloat16: 0.0}
"""The steps below the smallest normal number, 6e-5 in float16; bfloat16 has the range of float32, and no row is
at 1e-38."""


def _mix(*numbers: int) -> int:
    """64 bits that depend on all bits of the numbers (splitmix64)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + number * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class RandomBits:
    """The random words of one step: a function of (seed, step, tablet, block) alone, whatever the ranks."""

    def __init__(self, seed: int, step: int, most: int, dtype: torch.dtype) -> None:
        """`most`: words that a block reads at once; `dtype`: what values are rounded to."""
        generator = torch.Generator().manual_seed(_mix(seed, step) >> 1)
        states = 1 << _DROPPED[dtype]
        self._pool = torch.randint(0, states, (POOL + most,), generator=generator, dtype=torch.int32)
        self._seed, self._step = seed, step
        self._shifts: Tensor | None = None
        if _SUBNORMAL_STEP[dtype]:
            # A thousandth less than half a step, or float32's own rounding of the sum would make ties of some.
            self._shifts = self._pool.float().sub_(states / 2 - 0.5).mul_(0.999 * _SUBNORMAL_STEP[dtype] / states)

    def words(self, tablet: int, block: int, count: int) -> Tensor:
        """`count` words of as many bits as the type drops; a view that must not be written to."""
        start = _mix(self._seed, self._step, tablet, block, 0) % POOL
        return self._pool[start : start + count]

    def shifts(self, tablet: int, block: int, count: int) -> Tensor | None:
        """`count` numbers within half a step of the type's subnormals, from another place; None: it has none that
        matter."""
        start = _mix(self._seed, self._step, tablet, block, 1) % POOL
        return None if self._shifts is None else self._shifts[start : start + count]


PART = 1 << 18
"""Numbers that are rounded at a time, and stay in a core's cache."""


def round_stochastic(values: Tensor, words: Tensor, shifts: Tensor | None, out: Tensor) -> None:
    """Write values rounded to one of the two neighbours in out's type, the nearer with the higher probability, so that
    the expectation is the value itself; among float16's subnormals to one of the nearest three. What the type can hold
    is kept.

    Random bits are added to those of the fraction that the type has not, which are then cut off: they carry into the
    kept ones with the right probability. Subnormal numbers are further apart than that. They are shifted by up to half
    a step before the type's own rounding to the nearest; no normal number is moved by that, since those lie on their
    grid by then.

    Args:
        values: finite float32, contiguous; overwritten.
        words, shifts: as many of each from `RandomBits`.
        out: contiguous, float16 or bfloat16.
    """
    values, out = values.view(-1), out.view(-1)
    kept = -(1 << _DROPPED[out.dtype])
    for start in range(0, values.numel(), PART):
        part = slice(start, start + PART)
        values[part].view(torch.int32).add_(words[part]).bitwise_and_(kept)
        if shifts is not None:
            values[part].add_(shifts[part])
        out[part].copy_(values[part])
