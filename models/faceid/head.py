"""The sharded margin classifier: millions of classes as rows, on any number of ranks, without batch x classes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from .collectives import Ranks
from .errors import HeadError
from .margins import margin_from
from .rounding import RandomBits, round_stochastic
from .row_rules import RowRule
from .sampling import STRIP_ROWS, Sampling
from .streamed_softmax import Batch, Block, Kept, Seen, Streamer, TabletSums
from .tablets import BLOCK_ROWS, ROWS, Tablet, TabletLayout
from .threads import run_tablets

STORAGE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FIXED_POINT_BITS = 60
"""Of a gradient's sum in fixed point: whole numbers add to the same in any order, so that no rank waits for another."""


class ShardedMarginHead(nn.Module):
    """Margin softmax over `classes` unit rows: forward(features, labels) -> the global mean loss over valid labels.

    With `sample` below 1 (Partial FC) a step sees the rows of the batch's own classes and a share of the others, costs
    as much as these, and touches no others: their rows and state keep their bits. `full_loss` is over all classes.

    Guarantee: loss, feature gradients and rows equal those of the dense layer of the classes that a step sees
    (`compute_dense_loss`) up to rounding, and are bitwise equal for any number of ranks and threads with the same
    global batch in the order of ranks, on one machine type. While it computes, torch's operations go on one thread
    each, in as many threads as torch had.

    Args:
        classes: of all ranks together.
        dim: numbers of a feature.
        margin: "arcface", "cosface", "softmax", or (m1, m2, m3).
        margin_value: of the named margin; None: 0.5 for arcface, 0.35 for cosface.
        scale: s, by which cosines are multiplied.
        exact_margin_gradient: False: as InsightFace, whose gradient leaves out the margin's own slope.
        storage: of rows. float16 and bfloat16 are computed in float32 and rounded stochastically.
        rule: how rows follow their gradient inside backward, once a forward. None: rows are an ordinary Parameter with
            an ordinary gradient, for any optimiser of torch.
        sample: share of the rows that a step sees, in strips of `strip_rows` neighbours drawn anew for each step, of
            each tablet as many as the share comes to, at least one. Own classes come in addition.
        denominator: "corrected": each row counts 1 / its probability of being seen, so that the sum of exponentials
            is an unbiased estimate of that over all classes. "pfc": the softmax over the rows that are seen, as
            InsightFace's Partial FC.
        seed: of the first rows, of rounding and of sampling.
        group: the ranks; None: torch.distributed's default group, or one rank without it.
        ddp_scale: multiply the features' gradient by the number of ranks, since DDP averages over them.
        keep_cosines: hold batch x own rows numbers between the passes, for a quarter less work.
        tablet_rows, block_rows, strip_rows: of the layout; other blocks give other last bits, other strips other rows.

    Raises:
        HeadError: a rule is broken.
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
        if dim < 1 or not scale > 0:
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
        """The last step met something that is not finite, and moved nothing, on any rank."""
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
                part.copy_(torch.randn(part.shape, generator=generator) / self.dim**0.5)

    def _starts(self) -> list[int]:
        starts, at = [], 0
        for tablet in self.tablets:
            starts.append(at)
            at += self.layout.padded_rows(tablet)
        return starts

    def own_rows(self) -> list[tuple[Tablet, Tensor]]:
        """This rank's tablets with their (padded rows, dim), which are memory of the layer."""
        return [
            (tablet, self.rows.data[start : start + self.layout.padded_rows(tablet)])
            for tablet, start in zip(self.tablets, self._starts(), strict=True)
        ]

    def own_state(self) -> list[tuple[Tablet, Tensor]]:
        """The same of the rule's state."""
        return [
            (tablet, self.state[start : start + self.layout.padded_rows(tablet)])
            for tablet, start in zip(self.tablets, self._starts(), strict=True)
        ]

    def dense_weight(self) -> Tensor:
        """(classes, dim) on every rank: for small layers. With rule=None and one rank, part of the graph."""
        parts = [
            self.rows[start : start + tablet.rows] for tablet, start in zip(self.tablets, self._starts(), strict=True)
        ]
        mine = torch.cat(parts) if parts else self.rows[:0]
        if self.ranks.size == 1:
            return mine
        counts = [sum(t.rows for t in self.layout.owned(rank)) for rank in range(self.ranks.size)]
        return self.ranks.gather_tablets(mine.detach(), counts)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean over the global batch's valid labels of cross-entropy over the classes that the step sees.

        All classes with sample=1; otherwise in eval mode and under no_grad too those of the next step: see `full_loss`.

        Args:
            features: (samples, dim) of this rank, of any length but 0; ranks may have different numbers, or none.
            labels: (samples,) whole numbers; -1 is padding.

        Raises:
            HeadError: wrong shapes or labels.
        """
        self._check(features, labels)
        if self.rule is not None and torch.is_grad_enabled() and not features.requires_grad:
            features = features.detach().requires_grad_()  # a frozen backbone: rows still learn, inside backward
        loss: Tensor = _MarginSoftmax.apply(features, self.rows, self, labels)  # pyright: ignore[reportAssignmentType]
        return loss

    @torch.no_grad()
    def full_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The exact loss over all classes, whatever `sample` is; nothing moves, and no step is counted.

        Called by all ranks, as forward is, at the cost of a first pass over all rows.

        Raises:
            HeadError: wrong shapes or labels.
        """
        self._check(features, labels)
        return _Pass(self, features, labels).loss.to(_loss_dtype(features))

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if features.ndim != 2 or features.shape[1] != self.dim or labels.shape != features.shape[:1]:
            raise HeadError(
                f"features must be (samples, {self.dim}) and labels (samples,), got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if labels.is_floating_point():
            raise HeadError(f"labels must be whole numbers, got {labels.dtype}")
        if len(labels) and (int(labels.max()) >= self.classes or int(labels.min()) < -1):
            raise HeadError(
                f"labels must be -1 or in 0 ... {self.classes - 1}, got {int(labels.min())} ... {int(labels.max())}"
            )


def _loss_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


class _Pass:
    """What the first pass leaves to the second."""

    def __init__(
        self,
        head: ShardedMarginHead,
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
        wide = everything.double()
        self.length = wide.norm(dim=1, keepdim=True)
        unit64 = wide / self.length.clamp_min(1e-30)
        self.batch = Batch(unit=unit64.to(head.compute_dtype), unit64=unit64, labels=self.labels)
        self.valid = self.labels >= 0
        self.count = int(self.valid.sum())
        self.kept = Kept(seen={}, inverses={}, cosines={})
        # On an accelerator one thread keeps the queue of kernels full.
        threads = torch.get_num_threads() if everything.device.type == "cpu" else 1
        self.streamers = [
            Streamer(self.batch, head.margin, head.scale, head.layout.block_rows, self.kept)
            for _ in range(max(1, min(threads, len(head.tablets))))
        ]
        self.normaliser, self.loss = self._measure(head, keep, sampling)

    def _measure(self, head: ShardedMarginHead, keep: bool, sampling: Sampling | None) -> tuple[Tensor, Tensor]:
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


class _MarginSoftmax(torch.autograd.Function):
    """The loss; backward runs the second pass, and the rows' update with it."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rows: Tensor, head: ShardedMarginHead, labels: Tensor) -> Tensor:
        keep = head.keep_cosines and any(ctx.needs_input_grad)
        sampling = head.sampling if head.sampling.share < 1 else None
        first = _Pass(head, features, labels, keep=keep, sampling=sampling)
        head.skipped = not first.is_finite
        ctx.head, ctx.first = head, first
        ctx.needs_rows = rows.requires_grad
        ctx.feature_dtype = features.dtype
        return first.loss.to(_loss_dtype(features))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable takes ctx by position
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        head: ShardedMarginHead = ctx.head
        first: _Pass | None = ctx.first
        if first is None:
            raise HeadError(
                "the backward of a head with a rule runs once for each forward; to accumulate gradients, collect the "
                "features of the micro-batches and call the head once, which is exact"
            )
        if head.rule is not None:
            ctx.first = None  # the rows have moved then: the gradient of the old ones is gone
        unit = first.batch.unit64
        local = unit.new_zeros((first.mine.stop - first.mine.start, head.dim))
        if head.skipped or first.count == 0:
            rows = torch.zeros_like(head.rows) if ctx.needs_rows else None
            return local.to(ctx.feature_dtype), rows, None, None
        incoming = float(grad_outputs[0])
        hat, gradient = _descend(head, first)
        if gradient is not None:
            gradient = gradient.mul_(incoming)
        along = (hat * unit).sum(dim=1, keepdim=True)
        projected = (hat - along * unit) / first.length.clamp_min(1e-30) * incoming
        if head.ddp_scale:
            projected = projected * head.ranks.size
        return projected[first.mine].to(ctx.feature_dtype), gradient, None, None


def _descend(head: ShardedMarginHead, first: _Pass) -> tuple[Tensor, Tensor | None]:
    """(gradient for all x^ of the batch in float64, gradient of own rows where there is no rule)."""
    normaliser = torch.where(first.valid, first.normaliser, torch.inf)
    weight = 1 / first.count
    # |sum of P w^| <= 1 for each sample: what is added is at most this.
    unit_of_sum = 2.0**FIXED_POINT_BITS / (head.scale * weight)
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
        for (tablet, rows), (_, state), at in zip(head.own_rows(), head.own_state(), head._starts(), strict=True)
    ]
    run_tablets(descend, items, list(zip(first.streamers, sums, strict=True)))
    head.step += 1
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

    def __init__(self, head: ShardedMarginHead, rule: RowRule) -> None:
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
        rates = self._rule.rates(lambda: streamer.mean_square_of(block, pull, coefficient), moments)
        if rates is not None:
            streamer.move(block, pull, coefficient, rates)
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
