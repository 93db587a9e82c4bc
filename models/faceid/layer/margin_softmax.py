"""The loss as one node of an autograd graph: what a forward leaves to its backward, which moves the rows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..base.errors import HeadError
from .class_rows import ClassRows
from .rounding import RandomBits, round_stochastic
from .row_rules import RowRule
from .sampling import Sampling
from .streamed_softmax import SHORTEST, Batch, Block, Kept, Seen, Streamer, TabletSums
from .tablets import Tablet
from .threads import exact_products, run_tablets

FIXED_POINT_BITS = 60
"""Of a gradient's sum in fixed point: whole numbers add to the same in any order, so that no rank waits for another."""
_WAITING: WeakKeyDictionary[ClassRows, WeakSet[Any]] = WeakKeyDictionary()
"""Nodes of forwards that have not had their backward."""
LARGEST_SQUARED = 1e100
"""Numbers of a feature up to which their squares are added as they are."""


def compute_loss(head: ClassRows, features: Tensor, labels: Tensor) -> Tensor:
    """The loss of what `head` sees in its next step, whose backward moves the rows."""
    loss: Tensor = _MarginSoftmax.apply(features, head.rows, head, labels)  # pyright: ignore[reportAssignmentType]
    return loss


def compute_full_loss(head: ClassRows, features: Tensor, labels: Tensor) -> Tensor:
    """The loss over all classes."""
    with exact_products():
        return FirstPass(head, features, labels).loss.to(_loss_dtype(features))


def _loss_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


class FirstPass:
    """What the first pass leaves to the second."""

    def __init__(
        self,
        head: ClassRows,
        features: Tensor,
        labels: Tensor,
        *,
        keep: bool = False,
        sampling: Sampling | None = None,
    ) -> None:
        """`sampling`: None: all rows are seen."""
        began = time.perf_counter()
        everything, self.labels, self.mine = head.ranks.gather_batch(features.detach(), labels)
        head.seconds = {"exchange": time.perf_counter() - began}
        self.scale, self.rows_at = head.scale, head.rows_version()
        self.valid = self.labels >= 0
        unit64, self.length = _unit(everything.double(), self.valid)
        self.batch = Batch(unit=unit64.to(head.compute_dtype), unit64=unit64, labels=self.labels)
        self.count = int(self.valid.sum())
        self.kept = Kept(seen={}, inverses={}, cosines={})
        # On an accelerator one thread keeps the queue of kernels full.
        threads = torch.get_num_threads() if everything.device.type == "cpu" else 1
        self.streamers = [
            Streamer(self.batch, head.margin, head.scale, head.layout.block_rows, self.kept)
            for _ in range(max(1, min(threads, len(head.tablets))))
        ]
        self.normaliser, self.loss = self._measure(head, keep, sampling)

    def _measure(self, head: ClassRows, keep: bool, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        classes = self.labels[self.valid].unique().cpu().numpy()

        def measure(streamer: Streamer, item: tuple[Tablet, Tensor]) -> TabletSums:
            tablet, rows = item
            if sampling is not None:
                drawn = sampling.draw(tablet, classes, seed=head.seed, step=head.step)
                self.kept.seen[tablet.index] = Seen(
                    places=torch.from_numpy(drawn.places).to(rows.device),
                    log_weights=torch.from_numpy(drawn.weights).log().to(self.batch.unit),
                )
            return streamer.measure(rows, tablet, keep=keep)

        sums = run_tablets(measure, head.own_rows(), self.streamers)
        shape = (0, 3, len(self.labels))
        mine = torch.stack([s.stacked() for s in sums]) if sums else self.batch.unit64.new_zeros(shape)
        measured = time.perf_counter()
        head.seconds["first"] = measured - began
        counts = [len(head.layout.owned(rank)) for rank in range(head.ranks.size)]
        highest, total, target = head.ranks.gather_tablets(mine, counts).unbind(1)
        head.seconds["exchange"] += time.perf_counter() - measured
        top = highest.max(dim=0).values
        # In tablet order, so that every number of ranks adds in the same order.
        merged = torch.zeros_like(top)
        for index in range(len(highest)):
            merged += total[index] * (highest[index] - top).exp()
        normaliser = merged.log() + top
        own = target.sum(dim=0)  # all but one are zero
        per_sample = torch.where(self.valid, normaliser - own, 0.0)
        return normaliser, per_sample.sum() / max(1, self.count)

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.normaliser[self.valid]).all() and torch.isfinite(self.loss))


def _unit(wide: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(features of length 1, their lengths (B, 1)). Zeros of what is padding, whatever it holds, and of what is too
    short to have a direction; `length` is 0 there."""
    wide = torch.where(valid[:, None], wide, 0.0)
    largest = wide.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > LARGEST_SQUARED, largest, 1.0)
    wide = wide / largest
    length = wide.norm(dim=1, keepdim=True)
    # What is not finite stays so.
    is_short = length < SHORTEST
    return torch.where(is_short, 0.0, wide / length), torch.where(is_short, 0.0, length * largest)


class _MarginSoftmax(torch.autograd.Function):
    """The loss; backward runs the second pass, and the rows' update with it.

    All that a backward needs of its forward is in the graph, so that others may come between them; but not of the
    rows, of which there is no second copy: a forward whose rows have moved since is refused.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor, head: ClassRows, labels: Tensor) -> Tensor:
        keep = head.keep_cosines and any(ctx.needs_input_grad)
        sampling = head.sampling if head.sampling.share < 1 else None
        with exact_products():
            first = FirstPass(head, features, labels, keep=keep, sampling=sampling)
        ctx.head, ctx.first = head, first
        _WAITING.setdefault(head, WeakSet()).add(ctx)
        ctx.needs_rows = rows.requires_grad
        ctx.feature_dtype = features.dtype
        return first.loss.to(_loss_dtype(features))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable takes ctx by position
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        with exact_products():
            head: ClassRows = ctx.head
            first = _take_first(ctx)
            unit = first.batch.unit64
            local = unit.new_zeros((first.mine.stop - first.mine.start, head.dim))
            incoming = float(grad_outputs[0])
            head.skipped = not (first.is_finite and math.isfinite(incoming))
            if head.skipped or first.count == 0:
                rows = torch.zeros_like(head.rows) if ctx.needs_rows else None
                return local.to(ctx.feature_dtype), rows, None, None
            hat, gradient = _descend(head, first)
            if gradient is not None:
                gradient = gradient.mul_(incoming)
            along = (hat * unit).sum(dim=1, keepdim=True)
            projected = torch.where(first.length > 0, (hat - along * unit) / first.length * incoming, 0.0)
            if head.ddp_scale:
                projected = projected * head.ranks.size
            return projected[first.mine].to(ctx.feature_dtype), gradient, None, None


_TOGETHER = (
    "nothing is moved by it; call backward before the next step of the head or of its optimiser, and for several "
    "batches in one step the head once with all of them, as head(torch.cat([a, b]), torch.cat([labels_a, labels_b]))"
)


def _comes_too(node: Any) -> bool:
    """Whether the backward that runs comes to a node; without torch's word for it, its turn will tell."""
    will_execute = getattr(torch._C, "_will_engine_execute_node", None)
    return will_execute is not None and will_execute(node)


def _take_first(ctx: Any) -> FirstPass:
    """What the forward left; a head with a rule lets it be taken once.

    Raises:
        HeadError: it was taken before; the rows have moved since; two forwards want to move them at once.
    """
    head: ClassRows = ctx.head
    first: FirstPass | None = ctx.first
    if first is None:
        raise HeadError(
            "the backward of a head with a rule runs once for each forward; to accumulate gradients, collect the "
            "features of the micro-batches and call the head once, which is exact"
        )
    if head.rows_version() != first.rows_at:
        raise HeadError(f"the rows have moved since this forward, whose gradient would be that of others; {_TOGETHER}")
    if head.rule is not None:
        waiting = _WAITING.get(head, WeakSet())
        if any(node is not ctx and node.first is not None and _comes_too(node) for node in list(waiting)):
            raise HeadError(f"rows move once in a backward, but two forwards of one head meet in this one; {_TOGETHER}")
        ctx.first = None  # the rows move now: the gradient of the old ones will be gone
    return first


def _descend(head: ClassRows, first: FirstPass) -> tuple[Tensor, Tensor | None]:
    """(gradient for all x^ of the batch in float64, gradient of own rows where there is no rule)."""
    normaliser = torch.where(first.valid, first.normaliser, torch.inf)
    weight = 1 / first.count
    # |sum of P w^| <= 1 for each sample: what is added is at most this.
    unit_of_sum = 2.0**FIXED_POINT_BITS / (first.scale * weight)
    gradient = torch.zeros_like(head.rows) if head.rule is None else None
    began = time.perf_counter()
    writer = None if head.rule is None else _Writer(head, head.rule)
    sums = [_GradientSums.like(first.batch.unit64) for _ in first.streamers]

    def descend(workspace: tuple[Streamer, _GradientSums], item: tuple[Tablet, Tensor, Tensor, int]) -> None:
        (streamer, sums), (tablet, rows, state, at) = workspace, item
        others = torch.zeros_like(first.batch.unit)
        for block, pull, coefficient in streamer.descend(rows, tablet, normaliser, weight, others, sums.owns):
            if gradient is not None:
                gradient[at:][block.at] = streamer.gradient_of(block, pull, coefficient)
            elif writer is not None:
                writer.write(streamer, tablet, block, pull, coefficient, rows, state)
        sums.fixed += (others.double() * unit_of_sum).round_().long()

    items = [
        (tablet, rows, state, at)
        for (tablet, rows), (_, state), at in zip(head.own_rows(), head.own_state(), head.starts(), strict=True)
    ]
    head.is_torn = head.rule is not None
    run_tablets(descend, items, list(zip(first.streamers, sums, strict=True)))
    head.is_torn = False
    head.step += 1
    if head.rule is not None:
        head.count_move()
    descended = time.perf_counter()
    head.seconds["second"] = descended - began
    fixed = head.ranks.add(sum(part.fixed for part in sums[1:]) + sums[0].fixed)
    total = fixed.double() / unit_of_sum + head.ranks.add(sum(part.owns for part in sums[1:]) + sums[0].owns)
    head.seconds["exchange"] += time.perf_counter() - descended
    return total, gradient


@dataclass(slots=True, kw_only=True)
class _GradientSums:
    """One thread's part of the gradient for x^, (B, D), which adds to the others' in any order."""

    fixed: Tensor
    """From rows of other classes, in fixed point."""
    owns: Tensor
    """From own rows: of each sample, all threads but one have zeros."""

    @classmethod
    def like(cls, unit64: Tensor) -> _GradientSums:
        return cls(fixed=torch.zeros_like(unit64, dtype=torch.int64), owns=torch.zeros_like(unit64))


class _Writer:
    """Moves blocks of rows by the rule, rounds them, stores them; any thread's."""

    def __init__(self, head: ClassRows, rule: RowRule) -> None:
        self._rule, self._storage = rule, head.storage
        half = head.storage in (torch.float16, torch.bfloat16)
        self._bits = RandomBits(head.seed, head.step, head.storage) if half else None

    def write(
        self,
        streamer: Streamer,
        tablet: Tablet,
        block: Block,
        pull: Tensor,
        coefficient: Tensor,
        rows: Tensor,
        state: Tensor,
    ) -> None:
        wide, kept = block.rows, state[block.at]
        moments = kept.to(wide.dtype) if state.shape[1] else kept
        made: Tensor | None = None

        def mean_square() -> Tensor:
            nonlocal made
            mean, made = streamer.mean_square_of(block, pull, coefficient)
            return mean

        rates = self._rule.rates(mean_square, moments)
        if rates is not None:
            streamer.move(block, pull, coefficient, rates, made)
        else:
            self._rule.update(wide, streamer.gradient_of(block, pull, coefficient), moments)
        if self._bits is None:
            block.stored.copy_(wide)
            kept.copy_(moments)
        else:
            round_stochastic(wide, block.stored, self._bits, tablet.index, block.index, 0)
            if state.dtype == self._storage and state.shape[1]:
                round_stochastic(moments, kept, self._bits, tablet.index, block.index, 1)
            else:
                kept.copy_(moments)
        if isinstance(block.at, Tensor):  # both are copies
            rows.index_copy_(0, block.at, block.stored)
            state.index_copy_(0, block.at, kept)
