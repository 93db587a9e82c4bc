"""The order in which a training shows its samples: a permutation of each epoch, computed where it is asked for.

Position p of the training is place p mod n of epoch p div n. Steps take their batches one after the other, over the
ends of epochs too, so that the number of the step is all that a resumed training has to know, for any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..base.errors import HeadError

Whole = npt.NDArray[np.int64]

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """Samples 0 ... samples - 1, each once an epoch, in an order that (seed, epoch) gives."""

    samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seed < 0:
            raise HeadError(f"an order needs a sample and a seed >= 0, got {self.samples} and {self.seed}")

    def at(self, positions: Whole) -> tuple[Whole, Whole]:
        """(epochs, samples) of positions of the training, in no time and no memory but theirs.

        A Feistel network permutes the numbers below 4^k >= samples; what falls beyond the samples is permuted again,
        until it does not (Black, Rogaway 2002).
        """
        epochs, places = np.divmod(positions.astype(np.int64), self.samples)
        bits = max(1, (self.samples - 1).bit_length())
        half = np.uint64((bits + 1) // 2)
        low = np.uint64((1 << int(half)) - 1)
        with np.errstate(over="ignore"):
            seeds = np.full(len(epochs), (self.seed * _GOLDEN) & (1 << 64) - 1, np.uint64)
            keys = mix(mix(seeds) + epochs.astype(np.uint64) * np.uint64(_GOLDEN))
            found = places.astype(np.uint64)
            outside = np.ones(len(found), np.bool_)
            while outside.any():
                left, right = found[outside] >> half, found[outside] & low
                for turn in range(1, _ROUNDS + 1):
                    step = mix(keys[outside] + np.uint64((turn * _GOLDEN) & (1 << 64) - 1) + right)
                    left, right = right, (left ^ step) & low
                found[outside] = (left << half) | right
                outside = found >= self.samples
        return epochs, found.astype(np.int64)


def share_of(rank: int, ranks: int, batches: int) -> range:
    """The micro-batches of a step that a rank computes: contiguous, so that all ranks' are in order."""
    return range(rank * batches // ranks, (rank + 1) * batches // ranks)
