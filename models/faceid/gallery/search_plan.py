"""The plan of a search: what looking up faces among some rows takes in memory, before anything is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ....tiler.base.text import format_bytes
from ..base.errors import HeadMemoryError
from ..layer.head_plan import PROCESS_BYTES
from ..layer.tablets import TabletLayout
from .top_k import PART, SCORED

LEAST_QUERIES = 16
"""To which the queries of one pass are cut where memory is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """Bytes of one rank that looks up faces."""

    rows: int
    """Of the gallery."""
    dim: int
    storage: str
    ranks: int
    threads: int
    query_part: int
    """Queries that are compared with all rows at once."""
    names_bytes: int
    """Names, and the owners of rows."""
    buffer_bytes: int
    """Of each thread a block of rows, its scores, and candidates."""
    rows_bytes: int
    """Rows that are kept in memory: all of the rank's, or 0 where they are read from the disk for each pass."""
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.names_bytes + self.buffer_bytes + self.rows_bytes + self.process_bytes

    @property
    def reads_disk(self) -> bool:
        """Whether each pass reads the rows."""
        return self.rows > 0 and self.rows_bytes == 0

    def explain(self) -> str:
        """The plan in words."""
        where = "read from the disk for each pass" if self.reads_disk else "kept in memory"
        return (
            f"{self.rows:,} rows x {self.dim} in {self.storage}, {where}; faces a pass: {self.query_part:,}; memory "
            f"{format_bytes(self.total_bytes)} a rank (rows {format_bytes(self.rows_bytes)}, buffers "
            f"{format_bytes(self.buffer_bytes)}, names {format_bytes(self.names_bytes)}, process "
            f"{format_bytes(self.process_bytes)})"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}


def plan_search(
    layout: TabletLayout | None,
    dim: int,
    *,
    storage: str,
    item_bytes: int,
    queries: int,
    k: int,
    threads: int,
    names_bytes: int,
    budget: int,
) -> SearchPlan:
    """What a search takes: rows are kept in memory where they fit beside the rest, queries are cut where even that does
    not fit.

    Args:
        layout: of the rows; None: there are none.
        item_bytes: of a stored number.
        budget: of one rank, in bytes.

    Raises:
        HeadMemoryError: the least does not fit.
    """
    ranks = 1 if layout is None else layout.ranks
    own = 0 if layout is None else layout.most_owned_rows() * dim * item_bytes
    part = max(1, queries)
    while True:
        buffers = threads * _thread_bytes(layout, dim, item_bytes, part, k) + 5 * part * k * 16 * threads
        buffers += queries * (dim * 4 + k * 16)
        plan = SearchPlan(
            rows=0 if layout is None else layout.classes,
            dim=dim,
            storage=storage,
            ranks=ranks,
            threads=threads,
            query_part=part,
            names_bytes=names_bytes,
            buffer_bytes=buffers,
            rows_bytes=0,
            process_bytes=PROCESS_BYTES,
        )
        if plan.total_bytes <= budget:
            break
        if part <= LEAST_QUERIES:
            raise HeadMemoryError(
                f"looking up {part} faces among {plan.rows:,} rows needs {format_bytes(plan.total_bytes)} (buffers "
                f"{format_bytes(buffers)}, names {format_bytes(names_bytes)}, process {format_bytes(PROCESS_BYTES)}), "
                f"the budget is {format_bytes(budget)}; allow more memory, or fewer threads"
            )
        part = max(LEAST_QUERIES, part // 2)
    if plan.total_bytes + own <= budget:
        return SearchPlan(**{**asdict(plan), "rows_bytes": own})
    return plan


def _thread_bytes(layout: TabletLayout | None, dim: int, item_bytes: int, part: int, k: int) -> int:
    """A block as it is stored and as float32, queries, scores with a copy and two masks, candidates with their order,
    the numbers of those that are scored at once."""
    block = 0 if layout is None else layout.block_rows
    bytes_ = block * dim * (4 + (item_bytes if item_bytes != 4 else 0)) + part * dim * 4
    bytes_ += block * part * (4 + 4 + 1 + 1)
    bytes_ += (PART + block + part * k) * 160
    return bytes_ + SCORED * dim * (4 + 8 + 8 + 8)
