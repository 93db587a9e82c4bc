"""Rows of classes that a rank owns: their memory, their state, and what moves them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..base.collectives import Ranks
from ..base.errors import HeadError
from .margins import margin_from
from .row_rules import RowRule
from .sampling import STRIP_ROWS, Sampling
from .tablets import BLOCK_ROWS, ROWS, Tablet, TabletLayout

STORAGE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ClassRows(nn.Module):
    """The rows of a sharded layer on this rank, tablet after tablet: what a pass reads, and its backward moves.

    `ShardedMarginHead` says what the arguments are.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        margin: str | tuple[float, float, float] = "arcface",
        margin_value: float | None = None,
        scale: float = 64.0,
        exact_margin_gradient: bool = True,
        storage: torch.dtype = torch.float16,
        rule: RowRule | None = None,
        sample: float = 1.0,
        denominator: str = "corrected",
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        ddp_scale: bool = False,
        keep_cosines: bool = False,
        tablet_rows: int = ROWS,
        block_rows: int = BLOCK_ROWS,
        strip_rows: int = STRIP_ROWS,
    ) -> None:
        super().__init__()
        if dim < 1 or not 0 < scale < math.inf:
            raise HeadError(f"dim must be >= 1 and scale > 0, got {dim} and {scale}")
        if storage not in STORAGE:
            raise HeadError(f"storage must be one of {', '.join(map(str, STORAGE))}, got {storage}")
        if rule is None and storage not in (torch.float32, torch.float64):
            raise HeadError(
                f"rows in {storage} need a rule, since gradients of 1e-8 vanish in it; give rule=, or storage float32"
            )
        self.dim, self.scale, self.seed, self.storage = dim, float(scale), seed, storage
        self.margin = margin_from(margin, margin_value, exact_gradient=exact_margin_gradient)
        self.rule, self.ddp_scale, self.keep_cosines = rule, ddp_scale, keep_cosines
        self.sampling = Sampling(share=sample, denominator=denominator, strip_rows=strip_rows)
        self.ranks = Ranks.of(group)
        self.layout = TabletLayout(
            classes=classes, ranks=self.ranks.size, tablet_rows=tablet_rows, block_rows=block_rows
        )
        self.tablets = self.layout.owned(self.ranks.rank)
        self.compute_dtype = torch.float64 if storage == torch.float64 else torch.float32
        padded = sum(self.layout.padded_rows(tablet) for tablet in self.tablets)
        rows = torch.zeros((padded, dim), dtype=storage)
        if rule is None:
            self.rows = nn.Parameter(rows)
        else:
            self.register_buffer("rows", rows)
        width = rule.state_width(dim) if rule is not None else 0
        state = torch.zeros((padded, width), dtype=rule.state_dtype(storage) if rule is not None else storage)
        self.register_buffer("state", state)
        self.step = 0
        """Backward passes so far: a part of the seeds of rounding and sampling."""
        self.skipped = False
        """The last backward met something that is not finite, and moved nothing, on any rank."""
        self.is_torn = False
        """A backward or a load ended early, by an error or Ctrl-C: some rows have become others, and some not."""
        self._moves = 0
        self.seconds: dict[str, float] = {}
        """Of the last step: "exchange" of batch and sums, "first" and "second" pass, updates included."""
        self._initialise()

    rows: Tensor
    """(own padded rows, dim), tablet after tablet."""
    state: Tensor

    @property
    def classes(self) -> int:
        return self.layout.classes

    def extra_repr(self) -> str:
        sampled = f", {self.sampling}" if self.sampling.share < 1 else ""
        place = f"rank {self.ranks.rank} of {self.ranks.size}"
        return f"{self.classes} x {self.dim}, {self.storage}, {self.margin}{sampled}, {place}"

    @torch.no_grad()
    def _initialise(self) -> None:
        """Random rows of length about 1: each tablet from a stream of its own, whoever owns it."""
        for tablet, rows in self.own_rows():
            generator = torch.Generator().manual_seed((self.seed << 32) + tablet.index)
            for start in range(0, tablet.rows, self.layout.block_rows):
                part = rows[start : min(start + self.layout.block_rows, tablet.rows)]
                numbers = torch.randn(part.shape, generator=generator, dtype=torch.float32)
                part.copy_(numbers / self.dim**0.5)

    def starts(self) -> list[int]:
        """Where each of this rank's tablets begins in `rows` and `state`."""
        starts, at = [], 0
        for tablet in self.tablets:
            starts.append(at)
            at += self.layout.padded_rows(tablet)
        return starts

    def own_rows(self) -> list[tuple[Tablet, Tensor]]:
        """This rank's tablets with their (padded rows, dim), which are memory of the layer."""
        return [
            (tablet, self.rows.data[start : start + self.layout.padded_rows(tablet)])
            for tablet, start in zip(self.tablets, self.starts(), strict=True)
        ]

    def own_state(self) -> list[tuple[Tablet, Tensor]]:
        """The same of the rule's state."""
        return [
            (tablet, self.state[start : start + self.layout.padded_rows(tablet)])
            for tablet, start in zip(self.tablets, self.starts(), strict=True)
        ]

    def count_move(self) -> None:
        """Say that rows have become others: the forwards before have no backward any more."""
        self._moves += 1

    def rows_version(self) -> tuple[int, int, int]:
        """Another one after each change of the rows, whoever makes it."""
        version = 0 if self.rows.is_inference() else self.rows._version
        return self._moves, version, self.rows.data_ptr()

    def require_whole(self) -> None:
        """Refuse rows some of which are of another step.

        Raises:
            HeadError: a backward or a load ended early.
        """
        if self.is_torn:
            raise HeadError(
                f"a backward or a load ended early after step {self.step}, and has changed some rows and not others; "
                "load a checkpoint, or set is_torn = False to go on with them as they are"
            )
