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

    def __init__(self, seed: int, step: int, most: int) -> None:
        """`most`: words that a block reads at once."""
        generator = torch.Generator().manual_seed(_mix(seed, step) >> 1)
        # 16 bits are as many as any type drops.
        self._pool = torch.randint(0, 1 << 16, (POOL + most,), generator=generator, dtype=torch.int32)
        self._seed, self._step = seed, step

    def block(self, tablet: int, block: int, count: int) -> Tensor:
        """`count` words below 2^16; a view that must not be written to."""
        start = _mix(self._seed, self._step, tablet, block) % POOL
        return self._pool[start : start + count]


def round_stochastic(values: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """float32 values as `dtype`: one of the two neighbours, the nearer with the higher probability, so that the
    expectation is the value itself.

    Args:
        values: finite float32, contiguous.
        words: as many random int32 below 2^16.
    """
    dropped = _DROPPED[dtype]
    words = words.view_as(values)
    if dropped < 16:
        words = words >> (16 - dropped)
    # Adding to the fraction's dropped bits carries into the kept ones with the right probability.
    rounded = ((values.view(torch.int32) + words) & -(1 << dropped)).view(torch.float32)
    result = rounded.to(dtype)
    # Below the smallest normal number the type's steps do not shrink any further.
    tiny = (values.abs() < _SMALLEST_NORMAL[dtype]).nonzero(as_tuple=True)
    if len(tiny[0]):
        step = _SUBNORMAL_STEP[dtype]
        chance = words[tiny].to(torch.float32) / (1 << dropped)
        result[tiny] = (torch.floor(values[tiny] / step + chance) * step).to(dtype)
    return result
