"""What ranks tell each other. Without torch.distributed there is one rank, and nothing to tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import HeadError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ranks that share a layer."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The group's, torch.distributed's default group's, or one alone."""
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls(group=None, rank=0, size=1)
        return cls(group=group, rank=dist.get_rank(group), size=dist.get_world_size(group))

    def gather_batch(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, slice]:
        """Before: each rank has samples of its own, or none. After: all have all of them in the order of ranks, and
        know which are theirs.

        Raises:
            HeadError: another rank called `refuse_batch`.
        """
        if self.size == 1:
            return features, labels, slice(0, len(labels))
        counts = self._gather(torch.tensor([len(labels)], device=labels.device))
        sizes = [int(count) for count in counts]
        if min(sizes) < 0:
            raise HeadError(f"rank {sizes.index(-1)} of {self.size} has refused its batch, and says why")
        most = max(sizes)
        if most == 0:
            return features, labels, slice(0, 0)
        padded_features = features.new_zeros((most, features.shape[1]))
        padded_labels = labels.new_full((most,), -1)
        padded_features[: len(labels)], padded_labels[: len(labels)] = features, labels
        all_features, all_labels = self._gather(padded_features), self._gather(padded_labels)
        first = sum(sizes[: self.rank])
        return (
            torch.cat([part[:size] for part, size in zip(all_features, sizes, strict=True)]),
            torch.cat([part[:size] for part, size in zip(all_labels, sizes, strict=True)]),
            slice(first, first + sizes[self.rank]),
        )

    def refuse_batch(self, device: torch.device) -> None:
        """In place of `gather_batch`, so that the others do not wait for ever."""
        if self.size > 1:
            self._gather(torch.tensor([-1], device=device))

    def gather_tablets(self, mine: Tensor, counts: list[int]) -> Tensor:
        """Before: each rank has one row for each of its tablets. After: all have the rows of all, in tablet order."""
        if self.size == 1:
            return mine
        padded = mine.new_zeros((max(counts), *mine.shape[1:]))
        padded[: len(mine)] = mine
        return torch.cat([part[:count] for part, count in zip(self._gather(padded), counts, strict=True)])

    def add(self, mine: Tensor) -> Tensor:
        """Before: each rank has a tensor of one shape. After: all have their sum. Whole numbers, or numbers of which
        all but one rank's are zero: then the order of addition does not matter."""
        if self.size > 1:
            dist.all_reduce(mine, group=self.group)
        return mine

    def share_first(self, matrix: Tensor | None) -> Tensor | None:
        """Before: the first rank has a float32 matrix, or None; what others give is not looked at. After: all have what
        it has."""
        if self.size == 1:
            return matrix
        is_first = self.rank == 0
        shape = torch.tensor((-1, -1) if matrix is None or not is_first else matrix.shape)
        dist.broadcast(shape, group=self.group, group_src=0)
        if int(shape[0]) < 0:
            return None
        shared = matrix.contiguous() if is_first and matrix is not None else torch.empty(tuple(shape.tolist()))
        dist.broadcast(shared, group=self.group, group_src=0)
        return shared

    def _gather(self, mine: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine.contiguous(), group=self.group)
        return parts
