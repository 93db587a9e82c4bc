"""Rounding of float32 rows to the half precision that they are stored in, stochastic and reproducible.

A step moves most rows by about 1e-8, a thousandth of the distance between half-precision numbers there. Rounded to the
nearest, they would never move; rounded up or down with the right probabilities, they move right on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART = 1 << 18
"""Numbers that are rounded at a time, and stay in a core's cache."""
POOL = 1 << 18
"""Random words that are drawn for a step, besides a part's; each part reads a part from a place of its own."""
_MASK = (1 << 64) - 1
_DROPPED = {torch.float16: 13, torch.bfloat16: 16}
"""Bits of float32's fraction that the type has not."""
_SUBNORMAL_STEP = {torch.float16: 2.0**-24, torch.bfloat16: 0.0}
"""The steps below the smallest normal number, 6e-5 in float16; bfloat16 has the range of float32, and no row is
at 1e-38."""


def _mix(state: int, *numbers: int) -> int:
    """64 bits that depend on all bits of the state and the numbers (splitmix64)."""
    for number in numbers:
        state = (state + number * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class RandomBits:
    """The random words of one step: a function of (seed, step, place) alone, whatever the ranks and threads."""

    def __init__(self, seed: int, step: int, dtype: torch.dtype) -> None:
        """`dtype`: what values are rounded to."""
        self._state = _mix(0x9E3779B97F4A7C15, seed, step)
        generator = torch.Generator().manual_seed(self._state >> 1)
        self._pool = torch.randint(0, 1 << _DROPPED[dtype], (POOL + PART,), generator=generator, dtype=torch.int32)
        # A thousandth less than half a step, or float32's own rounding of the sum would make ties of some.
        self._step = 0.999 * _SUBNORMAL_STEP[dtype]

    def draw(self, *place: int) -> tuple[Tensor, float]:
        """PART words of as many bits as the type drops, a view that must not be written to; and a number within half
        a step of the type's subnormals, 0 where it has none that matter."""
        state = _mix(self._state, *place)
        start = (state >> 32) % POOL
        return self._pool[start : start + PART], ((state & 0xFFFFFFFF) / 0xFFFFFFFF - 0.5) * self._step


def round_stochastic(values: Tensor, out: Tensor, bits: RandomBits, *place: int) -> None:
    """Write values rounded to one of the two neighbours in out's type, the nearer with the higher probability, so that
    the expectation is the value itself; among float16's subnormals to one of the nearest three. What the type can hold
    is kept; what is beyond its range becomes its largest number.

    Random bits are added to those of the fraction that the type has not, which are then cut off: they carry into the
    kept ones with the right probability. Subnormal numbers are further apart than that. They are shifted by up to half
    a step, all of a part by the same, before the type's own rounding to the nearest; no normal number is moved by that,
    since those lie on their grid by then.

    Args:
        values: finite float32, contiguous; overwritten.
        out: contiguous, float16 or bfloat16.
        bits, place: where words come from: each place is to be used once a step.
    """
    values, out = values.view(-1), out.view(-1)
    whole = values.view(torch.int32)
    kept, largest = -(1 << _DROPPED[out.dtype]), torch.finfo(out.dtype).max
    for number, start in enumerate(range(0, values.numel(), PART)):
        part = slice(start, start + PART)
        words, shift = bits.draw(*place, number)
        values[part].clamp_(-largest, largest)
        whole[part].add_(words[: values.numel() - start]).bitwise_and_(kept)
        if shift:
            values[part].add_(shift)
        out[part].copy_(values[part])
