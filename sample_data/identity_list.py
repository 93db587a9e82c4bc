"""Which identity each sample of an epoch shows: as often for all, or by Zipf's law; a share of the labels wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .identities import Whole, draw_uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityList:
    """Samples 0 ... len - 1 of each epoch. With even counts it holds no array, so that there may be ten million."""

    identities: int
    samples: int = 8
    """Of each identity in an epoch, on average."""
    zipf: float = 0.0
    """Identity k comes in proportion to (k + 1)^-zipf, at least once; 0: all as often."""
    label_noise: float = 0.0
    """Share of the samples whose label is some other identity's, the same in each epoch."""
    seed: int = 0
    _ends: Whole | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.identities < 2 or self.samples < 1:
            raise ValueError(
                f"there must be 2 identities with a sample each, got {self.identities} with {self.samples}"
            )
        if not 0 <= self.zipf <= 3 or not 0 <= self.label_noise < 1:
            raise ValueError(f"zipf must be in 0 ... 3 and label noise below 1, got {self.zipf}, {self.label_noise}")
        ends = None
        if self.zipf:
            shares = np.arange(1, self.identities + 1, dtype=np.float64) ** -self.zipf
            spare = self.identities * (self.samples - 1)
            ends = np.floor(np.cumsum(shares / shares.sum()) * spare + 0.5).astype(np.int64)
            ends += np.arange(1, self.identities + 1)
        object.__setattr__(self, "_ends", ends)

    def __len__(self) -> int:
        return self.identities * self.samples

    def look_up(self, indices: Whole, epoch: Whole) -> tuple[Whole, Whole, Whole]:
        """(identity, sample of it, label) of each: another epoch shows other samples of the same identities."""
        if self._ends is None:
            identity, number = np.divmod(indices, self.samples)
            count = np.full_like(indices, self.samples)
        else:
            identity = np.searchsorted(self._ends, indices, side="right")
            begin = np.where(identity > 0, self._ends[identity - 1], 0)
            number, count = indices - begin, self._ends[identity] - begin
        label = identity.copy()
        if self.label_noise:
            chance = draw_uniform(self.seed, 2, indices, np.zeros_like(indices), 2).astype(np.float64)
            other = (identity + 1 + np.floor(chance[:, 1] * (self.identities - 1)).astype(np.int64)) % self.identities
            label = np.where(chance[:, 0] < self.label_noise, other, identity)
        return identity, number + epoch * count, label
