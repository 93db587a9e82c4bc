"""Rounding of float32 rows to the half precision that they are stored in, stochastic and reproducible.

A step moves most rows by about 1e-8, a thousandth of the distance between half-precision numbers there. Rounded to the
nearest, they would never move; rounded up or down with the right probabilities, they move right on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

POOL = 1 << 22
"""Random words that are drawn for a step, and read by each block from a place of its own."""
_MASK = (1 << 64) - 1
_DROPPED = {torch.float16: 13, torch.bfloat16: 16}
"""Bits of float32's fraction that the type has not."""
_SMALLEST_NORMAL = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126}
_SUBNORMAL_STEP = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


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
        self._pool = torch.randint(0, 1 << _DROPPED[dtype], (POOL + most,), generator=generator, dtype=torch.int32)
        self._seed, self._step = seed, step

    def block(self, tablet: int, block: int, count: int) -> Tensor:
        """`count` words, as many bits as the type drops; a view that must not be written to."""
        start = _mix(self._seed, self._step, tablet, block) % POOL
        return self._pool[start : start + count]


class Rounder:
    """Rounds float32 values to one of the two neighbours in `dtype`, the nearer with the higher probability, so that
    the expectation is the value itself. Holds buffers for a part that stays in a core's cache."""

    PART = 1 << 18

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._dropped = dtype, _DROPPED[dtype]
        self._size = torch.empty(self.PART)
        self._tiny = torch.empty(self.PART, dtype=torch.bool)

    def round(self, values: Tensor, words: Tensor, out: Tensor) -> None:
        """Write rounded values to `out`.

        Args:
            values: finite float32, contiguous; overwritten.
            words: as many random words of `RandomBits`.
            out: contiguous, of the type.
        """
        values, out = values.view(-1), out.view(-1)
        for start in range(0, values.numel(), self.PART):
            part = slice(start, start + self.PART)
            self._round_part(values[part], words[part], out[part])

    def _round_part(self, values: Tensor, words: Tensor, out: Tensor) -> None:
        size, tiny = self._size[: values.numel()], self._tiny[: values.numel()]
        # Below the smallest normal number the type's steps do not shrink any further: those few go another way.
        torch.lt(torch.abs(values, out=size), _SMALLEST_NORMAL[self._dtype], out=tiny)
        places = tiny.nonzero()[:, 0]
        few, chances = values[places], words[places]
        # Adding to the fraction's dropped bits carries into the kept ones with the right probability.
        values.view(torch.int32).add_(words).bitwise_and_(-(1 << self._dropped))
        out.copy_(values)
        step = _SUBNORMAL_STEP[self._dtype]
        chance = chances.to(torch.float32) / (1 << self._dropped)
        out[places] = (torch.floor(few / step + chance) * step).to(self._dtype)
