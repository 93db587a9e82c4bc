"""The plan of a layer: what each rank will hold, before anything is allocated; refused where it is too much."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ....tiler.base.dtypes import dtype_name
from ....tiler.base.text import MB, format_bytes
from ..base.errors import HeadMemoryError
from .rounding import PART, POOL
from .row_rules import RowRule
from .sampling import Sampling
from .streamed_softmax import EXACT_ROWS
from .tablets import TabletLayout

PROCESS_BYTES = 480 * MB
"""A process with torch and its threads' scratch, before the layer; measured, see docs/benchmarks.md."""


def _describe_count(number: float, noun: str) -> str:
    """Of many, for people: 5.12 billion parameters."""
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name} {noun}"
    return f"{number:,} {noun}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """Bytes and operations of a layer on some ranks of one machine."""

    classes: int
    dim: int
    batch: int
    """Of all ranks."""
    ranks: int
    seen: int
    """Classes that a step sees, of all ranks: all of them, or what is drawn and the batch's own."""
    storage: str
    rows_bytes: int
    """Of the rank that has most, as the two next."""
    state_bytes: int
    buffer_bytes: int
    """Of each thread a block, its logits and sums; random words, the batch, lengths of rows; kept cosines; which rows
    were drawn."""
    process_bytes: int
    flops: int
    """Of one step on all ranks: products of matrices only."""

    @property
    def rank_bytes(self) -> int:
        return self.rows_bytes + self.state_bytes + self.buffer_bytes + self.process_bytes

    @property
    def machine_bytes(self) -> int:
        """All ranks on one machine; at most, since ranks differ by a tablet."""
        return self.ranks * self.rank_bytes

    @property
    def bytes_per_class(self) -> float:
        return self.ranks * (self.rows_bytes + self.state_bytes) / self.classes

    def require(self, available_bytes: int) -> None:
        """Refuse what does not fit.

        Raises:
            HeadMemoryError: says what is needed, for what, and what would fit.
        """
        if self.machine_bytes > available_bytes:
            fixed = self.machine_bytes - self.ranks * (self.rows_bytes + self.state_bytes)
            fits = max(0, int((available_bytes - fixed) / self.bytes_per_class))
            raise HeadMemoryError(
                f"{self.classes:,} classes x {self.dim} in {self.storage} on {self.ranks} "
                f"rank{'s' * (self.ranks != 1)} need {format_bytes(self.machine_bytes)} (rows "
                f"{format_bytes(self.ranks * self.rows_bytes)}, state {format_bytes(self.ranks * self.state_bytes)}, "
                f"buffers {format_bytes(self.ranks * self.buffer_bytes)}, processes "
                f"{format_bytes(self.ranks * self.process_bytes)}), there are {format_bytes(available_bytes)}; "
                f"{fits:,} classes would fit, or more machines"
            )

    def explain(self) -> str:
        """The plan in words."""
        parts = " + ".join(
            f"{name} {format_bytes(value)}"
            for name, value in (
                ("rows", self.rows_bytes),
                ("state", self.state_bytes),
                ("buffers", self.buffer_bytes),
                ("process", self.process_bytes),
            )
        )
        lines = [
            (
                "layer",
                f"{self.classes:,} classes x {self.dim} = {_describe_count(self.classes * self.dim, 'parameters')}",
            ),
            ("storage", f"{self.storage}, {self.bytes_per_class:,.0f} bytes a class with its state"),
            ("ranks", f"{self.ranks}, batch {self.batch}"),
            *([("sample", f"{self.seen:,} classes a step")] if self.seen < self.classes else []),
            ("memory", f"{format_bytes(self.rank_bytes)} a rank ({parts}), {format_bytes(self.machine_bytes)} in all"),
            ("work", f"{_describe_count(self.flops, 'FLOP')} a step"),
        ]
        return "\n".join(f"{name:<9} {text}" for name, text in lines)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "rank_bytes": self.rank_bytes,
            "machine_bytes": self.machine_bytes,
            "bytes_per_class": self.bytes_per_class,
        }


def plan_head(
    classes: int,
    dim: int,
    *,
    batch: int,
    ranks: int = 1,
    threads: int = 1,
    storage: torch.dtype = torch.float16,
    rule: RowRule | None = None,
    sample: float = 1.0,
    keep_cosines: bool = False,
) -> HeadPlan:
    """What a `ShardedMarginHead` of these options takes.

    Args:
        batch: samples of all ranks in one step.
        threads: of each rank.
        rule: None: rows are a Parameter with a gradient, and its optimiser is not counted.
    """
    layout = TabletLayout(classes=classes, ranks=ranks)
    rows = most_seen = layout.most_owned_rows()
    seen = classes
    if sample < 1:
        sampling = Sampling(share=sample)
        of_ranks = [sampling.most_rows(layout, rank) for rank in range(ranks)]
        seen, most_seen = min(classes, sum(of_ranks) + batch), max(of_ranks) + batch
    item, wide = storage.itemsize, 8 if storage == torch.float64 else 4
    block = layout.block_rows * dim
    width = rule.state_width(dim) if rule is not None else 0
    state = rows * width * (rule.state_dtype(storage).itemsize if rule is not None else 0)
    thread = 2 * block * wide  # rows and gradient
    thread += 4 * batch * layout.block_rows * wide  # cosines, logits and what is made of them
    thread += batch * dim * (2 * wide + 3 * 8)  # the tablet's sums, in float64 and in fixed point
    thread += batch * batch * wide  # products of samples
    thread += layout.block_rows * width * wide
    thread += EXACT_ROWS * (batch + 3 * dim) * 8  # gradients that are made where their terms cancel
    buffers = threads * thread
    buffers += batch * dim * (2 * wide + 6 * 8)  # the batch, and the sums of all
    buffers += 3 * 8 * batch * (layout.count + max(1, layout.count // ranks))
    buffers += most_seen * wide  # lengths of rows, from pass to pass
    if sample < 1:
        buffers += most_seen * (8 + wide)  # their places and weights
        buffers += threads * block * item  # a copy of a block's rows, and of their state
        buffers += threads * layout.block_rows * width * (rule.state_dtype(storage).itemsize if rule else 0)
    if item == 2:
        buffers += 4 * (POOL + PART)
    if keep_cosines:
        buffers += batch * most_seen * wide
    passes = 6 if keep_cosines else 8
    return HeadPlan(
        classes=classes,
        dim=dim,
        batch=batch,
        ranks=ranks,
        seen=seen,
        storage=dtype_name(storage),
        rows_bytes=rows * dim * item * (2 if rule is None else 1),
        state_bytes=state,
        buffer_bytes=buffers,
        process_bytes=PROCESS_BYTES,
        flops=passes * batch * seen * dim,
    )
