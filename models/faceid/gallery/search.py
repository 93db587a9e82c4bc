"""The best k owners among rows of any number: blocks after blocks, on any threads and ranks, the same answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base.collectives import Ranks
from ..layer.tablets import Tablet, TabletLayout
from ..layer.threads import run_tablets
from .top_k import NOBODY, Best, Floats, TopK, merge_best

QUERIES = 1024
"""That are compared with all rows at once; more go through the rows again."""
Tell = Callable[[int, int], None]
"""(rows gone through by now, in all): how far this rank is, all passes together; from one thread at a time."""


class RowReader(Protocol):
    """Reads the blocks of one thread."""

    def read(self, tablet: Tablet, start: int) -> Tensor:
        """(block rows, D) float32 from a tablet's row `start` on, what is beyond its end finite; until the next."""
        ...


class RowSource(Protocol):
    """Rows to be searched."""

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        ...

    @property
    def owners(self) -> npt.NDArray[np.integer]:
        """(rows,): whose each row is; NOBODY: not to be found."""
        ...

    @property
    def most_rows(self) -> int:
        """That any owner has."""
        ...

    def open_reader(self, block_rows: int) -> RowReader:
        """For one thread."""
        ...

    def name_of(self, tablet: Tablet) -> str:
        """For errors."""
        ...


class ArrayRows:
    """Rows in memory: (rows, D) float32, of length 1."""

    def __init__(self, rows: Floats, owners: npt.NDArray[np.integer]) -> None:
        self._rows, self._owners = rows, owners
        self._most_rows = count_most(owners)

    @property
    def dim(self) -> int:
        return self._rows.shape[1]

    @property
    def owners(self) -> npt.NDArray[np.integer]:
        return self._owners

    @property
    def most_rows(self) -> int:
        return self._most_rows

    def open_reader(self, block_rows: int) -> RowReader:
        return _ArrayReader(self._rows, block_rows)

    def name_of(self, tablet: Tablet) -> str:
        return f"the array at row {tablet.first}"


class _ArrayReader:
    def __init__(self, rows: Floats, block_rows: int) -> None:
        self._rows, self._buffer = rows, torch.zeros((block_rows, rows.shape[1]))

    def read(self, tablet: Tablet, start: int) -> Tensor:
        count = min(len(self._buffer), tablet.rows - start)
        first = tablet.first + start
        self._buffer[:count] = torch.from_numpy(self._rows[first : first + count])
        return self._buffer


def count_most(owners: npt.NDArray[np.integer]) -> int:
    """Rows of the owner that has most; 1 where there is nobody."""
    known = owners[owners != NOBODY]
    return int(np.bincount(known).max()) if len(known) else 1


def count_passes(queries: int, query_part: int = QUERIES) -> int:
    """How often a search goes through the rows."""
    return -(-queries // query_part)


def search_rows(
    source: RowSource,
    queries: Floats,
    k: int,
    layout: TabletLayout,
    *,
    ranks: Ranks,
    threads: int,
    query_part: int = QUERIES,
    tell: Tell | None = None,
) -> Best:
    """The best k owners of each query; called by all ranks with the same queries, all get the answer.

    Guarantee: equal to sorting all exact scores (`top_k.exact_scores`) by (score descending, owner ascending) with each
    owner's best row alone, whatever the layout, ranks and threads, to the last bit.

    Args:
        queries: (Q, D) of length 1.
        layout: of the source's rows; its ranks are the ranks.
        tell: told of progress.
    """
    starts = range(0, len(queries), query_part)
    progress = _Progress(
        tell, count_passes(len(queries), query_part) * sum(tablet.rows for tablet in layout.owned(ranks.rank))
    )
    parts = [
        _search_part(source, queries[start : start + query_part], k, layout, ranks, threads, progress)
        for start in starts
    ]
    if not parts:
        return Best.none(0, k)
    return Best(
        scores=np.concatenate([part.scores for part in parts]), owners=np.concatenate([part.owners for part in parts])
    )


class _Progress:
    """Adds up what the threads of a rank have gone through, and tells it."""

    def __init__(self, tell: Tell | None, rows: int) -> None:
        self._tell, self._rows, self._done = tell, rows, 0
        self._telling = threading.Lock()

    def advance(self, rows: int) -> None:
        with self._telling:
            self._done += rows
            if self._tell is not None:
                self._tell(self._done, self._rows)


def _search_part(
    source: RowSource,
    queries: Floats,
    k: int,
    layout: TabletLayout,
    ranks: Ranks,
    threads: int,
    progress: _Progress,
) -> Best:
    tablets = layout.owned(ranks.rank)
    # Few tablets are cut for the threads; of many, each is one thread's.
    whole = len(tablets) >= 4 * threads
    mine = [
        (tablet, range(start, min(tablet.rows, start + length), layout.block_rows))
        for tablet in tablets
        for length in (tablet.rows if whole else layout.block_rows,)
        for start in range(0, tablet.rows, length)
    ]
    crew = [
        (TopK(queries, k, source.most_rows, layout.block_rows), source.open_reader(layout.block_rows))
        for _ in range(max(1, min(threads, len(mine))))
    ]

    def look(worker: tuple[TopK, RowReader], item: tuple[Tablet, range]) -> None:
        (top, reader), (tablet, starts) = worker, item
        for start in starts:
            owners = _owners_of(source, tablet, start, layout.block_rows)
            top.look(reader.read(tablet, start), owners, source.name_of(tablet))
            progress.advance(min(layout.block_rows, tablet.rows - start))

    run_tablets(look, mine, crew)
    return gather_best(merge_best([top.best for top, _ in crew]), ranks)


def _owners_of(source: RowSource, tablet: Tablet, start: int, block_rows: int) -> npt.NDArray[np.integer]:
    """(block rows,): of a block, NOBODY beyond the tablet's end."""
    owners = source.owners[tablet.first + start : min(tablet.first + start + block_rows, tablet.stop)]
    if len(owners) < block_rows:
        owners = np.concatenate([owners, np.full(block_rows - len(owners), NOBODY, owners.dtype)])
    return owners


def gather_best(mine: Best, ranks: Ranks) -> Best:
    """Before: each rank has the best of its rows. After: all have the best of all."""
    if ranks.size == 1:
        return mine
    one_each = [1] * ranks.size
    scores = ranks.gather_tablets(torch.from_numpy(mine.scores)[None], one_each).numpy()
    owners = ranks.gather_tablets(torch.from_numpy(mine.owners)[None], one_each).numpy()
    return merge_best([Best(scores=s, owners=o) for s, o in zip(scores, owners, strict=True)])
