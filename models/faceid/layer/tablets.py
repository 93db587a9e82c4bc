"""Tablets: the classes cut into runs of a fixed number of rows, and which rank owns which.

A tablet is the unit of ownership, of threads' work, of random streams, of partial sums and of checkpoint files. Its
size depends on neither the number of classes nor that of ranks, so that sums over tablets in their order are the same
for any ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base.errors import HeadError

ROWS = 16_384
"""Of a tablet: 17 MB at 512 half-precision numbers a row; enough of them to keep many threads busy."""
BLOCK_ROWS = 4096
"""Rows that are computed at once. Products of matrices are added in an order that depends on their shapes, so blocks
are fixed, and the last one of a tablet is padded to the full size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tablet:
    """A run of classes."""

    index: int
    first: int
    """The first class."""
    rows: int

    @property
    def stop(self) -> int:
        return self.first + self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TabletLayout:
    """All tablets of a layer, and their owners: each rank has a run of whole tablets, as equal as may be."""

    classes: int
    ranks: int = 1
    tablet_rows: int = ROWS
    block_rows: int = BLOCK_ROWS

    def __post_init__(self) -> None:
        if self.classes < 1 or self.ranks < 1:
            raise HeadError(f"a layer needs at least 1 class and 1 rank, got {self.classes} and {self.ranks}")
        if self.tablet_rows < 1 or self.tablet_rows % self.block_rows:
            raise HeadError(
                f"a tablet must hold whole blocks, got {self.tablet_rows} rows in blocks of {self.block_rows}"
            )

    @property
    def count(self) -> int:
        return -(-self.classes // self.tablet_rows)

    def tablet(self, index: int) -> Tablet:
        first = index * self.tablet_rows
        return Tablet(index=index, first=first, rows=min(self.tablet_rows, self.classes - first))

    def owned(self, rank: int) -> list[Tablet]:
        """The tablets of a rank, in order; none where there are more ranks than tablets."""
        return [self.tablet(index) for index in range(*self._bounds(rank))]

    def _bounds(self, rank: int) -> tuple[int, int]:
        if not 0 <= rank < self.ranks:
            raise HeadError(f"a rank must be in 0 ... {self.ranks - 1}, got {rank}")
        return (rank * self.count // self.ranks, (rank + 1) * self.count // self.ranks)

    def padded_rows(self, tablet: Tablet) -> int:
        """Rows of memory: whole blocks."""
        return -(-tablet.rows // self.block_rows) * self.block_rows

    def most_owned_rows(self) -> int:
        """Rows of memory of the rank that has most."""
        return max(sum(self.padded_rows(t) for t in self.owned(rank)) for rank in range(self.ranks))
