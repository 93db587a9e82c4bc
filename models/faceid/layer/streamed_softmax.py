"""Margin softmax streamed over the classes: two passes over a tablet, nothing of size batch x classes.

Shapes: B samples, D numbers each, R rows of a block. w is a row, w^ = w / |w|, x^ a sample of length 1;
z = scale * x^ . w^, for a sample's own class scale * phi(x^ . w^). Where a step sees some rows of a tablet only, the
sums go over these, each exp(z) times the row's weight.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .margin_registry import MarginLike
from .tablets import Tablet

LARGEST_PLAIN_SCALE = 72
"""Up to which exp(z) of float32 cannot overflow in a block, so that no maximum is needed."""
SHORTEST = 1e-12
"""Length of a row or a feature that has a direction. What is shorter, as the zeros that pad a block, has cosine 0 with
everything, and no gradient."""
CANCELLED = 1024
"""Units in the last place of the sum of its terms, below which a row's squared gradient is made of rounding, and is
computed anew from the gradient itself."""
EXACT_ROWS = 256
"""Whose gradient is made at once then, in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The global batch, as every rank holds it."""

    unit: Tensor
    """(B, D): x^, in the precision of the products."""
    unit64: Tensor
    """The same in float64, for what goes to targets."""
    labels: Tensor
    """(B,); -1 is padding."""

    def targets_in(self, first: int, stop: int) -> Tensor:
        """The samples whose class is in a run of classes."""
        return ((self.labels >= first) & (self.labels < stop)).nonzero()[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The rows of a tablet that a step sees, where that is not all of them."""

    places: Tensor
    """(n,) whole numbers, ascending, counted in the tablet; the batch's own classes are among them."""
    log_weights: Tensor
    """(n,): log of each row's weight, in the precision of the products; 0 for the batch's own classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TabletSums:
    """What one tablet adds to each sample's normaliser, in float64, each (B,): the sum is total * exp(highest)."""

    highest: Tensor
    total: Tensor
    target: Tensor
    """z of the sample's own class; 0 where that lies in another tablet."""

    def stacked(self) -> Tensor:
        return torch.stack((self.highest, self.total, self.target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The samples whose class is in a block, in float64: few, and exact."""

    samples: Tensor
    own: Tensor
    """Of each the row in the block."""
    cosine: Tensor
    slope: Tensor
    """phi' there."""
    logit: Tensor


@dataclass(slots=True)
class Block:
    """A block of rows with its logits, in buffers that the next block overwrites."""

    index: int
    stored: Tensor
    """(R, D) as they lie in the layer, or of rows that were drawn a copy."""
    at: slice | Tensor
    """Where in the tablet these are: a copy is to be put back there."""
    rows: Tensor
    """(R, D) in the precision of the products."""
    inverse: Tensor
    """(R,): 1 / |w|."""
    logits: Tensor
    """(R, B): z less what was asked for, -infinity where the tablet has no row."""
    cosines: Tensor
    """(R, B): x^ . w^, without margin."""
    targets: Targets | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What the first pass keeps of each tablet for the second."""

    seen: dict[int, Seen]
    """Of a tablet that is not in here, all rows are seen."""
    inverses: dict[int, Tensor]
    """(padded rows, or those that are seen,): 1 / |w|."""
    cosines: dict[tuple[int, int], Tensor]
    """By tablet and block, where they are kept: B x rows numbers."""


class Streamer:
    """The passes over tablets of one precision and batch; holds buffers for one block, so is one thread's."""

    def __init__(self, batch: Batch, margin: MarginLike, scale: float, block_rows: int, kept: Kept) -> None:
        self._batch, self._margin, self._scale, self._size, self._kept = batch, margin, scale, block_rows, kept
        self._rows = batch.unit.new_empty((block_rows, batch.unit.shape[1]))
        self._gradient = torch.empty_like(self._rows)
        # Rows first: on this side of the product a block's rows are read as they lie, which is a tenth faster.
        self._columns = batch.unit.T.contiguous()
        self._gram = batch.unit @ self._columns
        self._cosines = batch.unit.new_empty((block_rows, len(batch.labels)))
        self._logits, self._weighted = torch.empty_like(self._cosines), torch.empty_like(self._cosines)
        self._labels = sorted(batch.labels.tolist())

    def _blocks(self, rows: Tensor, tablet: Tablet, offset: Tensor) -> Iterator[Block]:
        """The tablet's blocks, from its (padded rows, D) in storage precision; `offset` (B,) float64 is taken off
        each sample's logits."""
        minus = -offset.to(self._batch.unit.dtype)
        batch, inverses, seen = self._batch, self._kept.inverses.get(tablet.index), self._kept.seen.get(tablet.index)
        count = tablet.rows if seen is None else len(seen.places)
        is_first = inverses is None
        if inverses is None:
            inverses = self._kept.inverses[tablet.index] = batch.unit.new_empty(len(rows) if seen is None else count)
        for index, start in enumerate(range(0, count, self._size)):
            part = slice(start, start + self._size)
            if seen is None:
                at, stored = part, rows[part]
            else:
                at = seen.places[part]
                stored = rows.index_select(0, at)
            wide = self._rows[: len(stored)].copy_(stored)
            inverse = inverses[part]
            if is_first:
                _invert(torch.linalg.vector_norm(wide, dim=1, out=inverse))
            cosines = self._kept.cosines.get((tablet.index, index))
            if cosines is None:
                cosines = torch.mm(wide, self._columns, out=self._cosines[: len(wide)]).mul_(inverse[:, None])
            logits = torch.add(minus, cosines, alpha=self._scale, out=self._logits[: len(wide)])
            if seen is not None:
                logits.add_(seen.log_weights[part, None])
            targets = self._targets(tablet, at, min(self._size, count - start), wide)
            if targets is not None:
                logits[targets.own, targets.samples] = (targets.logit - offset[targets.samples]).to(logits.dtype)
            if count - start < len(wide):
                logits[count - start :] = -torch.inf
            yield Block(
                index=index,
                stored=stored,
                at=at,
                rows=wide,
                inverse=inverse,
                logits=logits,
                cosines=cosines,
                targets=targets,
            )

    def _targets(self, tablet: Tablet, at: slice | Tensor, rows: int, wide: Tensor) -> Targets | None:
        """The samples whose class is in a block of rows; None, as for most blocks: there are none."""
        if isinstance(at, slice):
            first = tablet.first + at.start
            stop = first + rows
        else:
            first, stop = tablet.first + int(at[0]), tablet.first + int(at[-1]) + 1
        place = bisect_left(self._labels, first)
        if place == len(self._labels) or self._labels[place] >= stop:
            return None
        samples = self._batch.targets_in(first, stop)
        own = self._batch.labels[samples] - tablet.first
        own = own - at.start if isinstance(at, slice) else torch.searchsorted(at, own)
        row64 = wide[own].double()
        cosine = (self._batch.unit64[samples] * row64).sum(dim=1) * _invert(row64.norm(dim=1))
        phi, slope = self._margin.apply(cosine)
        return Targets(samples=samples, own=own, cosine=cosine, slope=slope, logit=self._scale * phi)

    def measure(self, rows: Tensor, tablet: Tablet, *, keep: bool = False) -> TabletSums:
        """First pass. `keep`: hold the tablet's cosines, B x rows numbers, for the second."""
        count = len(self._batch.labels)
        highest = torch.full((count,), -torch.inf, dtype=torch.float64, device=rows.device)
        total, target = torch.zeros_like(highest), torch.zeros_like(highest)
        seen = self._kept.seen.get(tablet.index)
        heaviest = float(seen.log_weights.max()) if seen is not None else 0.0
        plain = self._scale + heaviest <= LARGEST_PLAIN_SCALE
        if plain:
            highest.zero_()
        for block in self._blocks(rows, tablet, torch.zeros_like(total)):
            if block.targets is not None:
                target[block.targets.samples] = block.targets.logit
            if keep:
                self._kept.cosines[tablet.index, block.index] = block.cosines.clone()
            if plain:
                total += block.logits.exp_().sum(dim=0).double()
                continue
            top = block.logits.max(dim=0).values.double()
            merged = torch.maximum(highest, top)
            part = (block.logits - top.to(block.logits.dtype)).exp_().sum(dim=0).double()
            total = total * (highest - merged).exp() + part * (top - merged).exp()
            highest = merged
        return TabletSums(highest=highest, total=total, target=target)

    def descend(
        self, rows: Tensor, tablet: Tablet, normaliser: Tensor, weight: float, others: Tensor, owns: Tensor
    ) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Second pass: (block, pull (R, B), coefficient (R,)) for each block, whose rows may then be overwritten.

        The gradient of row r is sum_b pull[r, b] x^_b - coefficient[r] w_r. The tablet's share of the gradient for x^
        is added to `others` (B, D), from rows of other classes, and in float64 to `owns` (B, D), from own rows.

        Args:
            normaliser: (B,) float64, log of the sum over all classes; +infinity for samples that do not count.
            weight: of each sample's loss.
        """
        # exp of what is left is scale * weight * P
        for block in self._blocks(rows, tablet, normaliser - math.log(self._scale * weight)):
            pull = block.logits.exp_()
            if block.targets is not None:
                pull[block.targets.own, block.targets.samples] = 0
            # Rows' gradient: (sum_b G x^ - (sum_b G cos) w^) / |w|
            along = torch.mul(pull, block.cosines, out=self._weighted[: len(pull)]).sum(dim=1)
            pull.mul_(block.inverse[:, None])
            others.addmm_(pull.T, block.rows)
            if block.targets is not None:
                self._pull_targets(block, block.targets, normaliser, weight, pull, along, owns)
            coefficient = along.mul_(block.inverse.square())
            yield block, pull, coefficient

    def _pull_targets(
        self,
        block: Block,
        targets: Targets,
        normaliser: Tensor,
        weight: float,
        pull: Tensor,
        along: Tensor,
        owns: Tensor,
    ) -> None:
        """Add what own classes do, in float64: P - 1 loses digits where P is near 1."""
        own_normaliser = normaliser[targets.samples]
        chance = (targets.logit - own_normaliser).exp() - 1
        chance = torch.where(torch.isinf(own_normaliser), 0.0, chance)
        own_pull = chance * targets.slope * (self._scale * weight)
        inverse64 = block.inverse[targets.own].double()
        owns.index_add_(0, targets.samples, own_pull[:, None] * block.rows[targets.own].double() * inverse64[:, None])
        own_along = torch.zeros_like(along, dtype=torch.float64)
        own_along.index_add_(0, targets.own, own_pull * targets.cosine)
        along.add_(own_along.to(along.dtype))
        scaled = (own_pull * inverse64).to(pull.dtype)
        pull.index_put_((targets.own, targets.samples), scaled, accumulate=True)

    def mean_square_of(self, block: Block, pull: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
        """(the mean of the rows' squared gradients (R, 1), rows whose gradient was made for that (n,)), to be given to
        `move`.

        A row's gradient is orthogonal to the row, so that |g|^2 = |sum_b pull x^_b|^2 - |coefficient w|^2, and the
        first is a form of pull with x^ x^T: no gradient is made. Where the terms cancel, nothing but their rounding
        would be left, and a step divides by it: there the gradient itself is made, to be the one that moves the row.
        """
        dim = self._rows.shape[1]
        terms = torch.linalg.vector_norm(pull, ord=1, dim=1).square_()
        square = torch.mm(pull, self._gram, out=self._weighted[: len(pull)]).mul_(pull).sum(dim=1)
        square.sub_((coefficient * _invert(block.inverse.clone())).square_())
        unsure = (square < terms * (CANCELLED * torch.finfo(pull.dtype).eps)).nonzero()[:, 0]
        square.clamp_min_(0)
        for start in range(0, len(unsure), EXACT_ROWS):
            part = unsure[start : start + EXACT_ROWS]
            row64 = block.rows[part].double()
            row64 *= _invert(row64.norm(dim=1, keepdim=True))
            exact = pull[part].double() @ self._batch.unit64
            exact -= (exact * row64).sum(dim=1, keepdim=True) * row64
            square[part] = exact.square().sum(dim=1).to(square.dtype)
            self._gradient[start : start + len(part)] = exact
        return square.div_(dim)[:, None], unsure

    def move(
        self, block: Block, pull: Tensor, coefficient: Tensor, rates: float | Tensor, made: Tensor | None = None
    ) -> None:
        """Move the block's rows against their gradient by `rates`, one number or (R, 1); pull is used up.

        w - r g at once: w (1 + r c) - r G^T x^. Most blocks have all r c below 1e-7: their factors round to 1.

        Args:
            made: rows whose gradient `mean_square_of` has made.
        """
        moved = self._gradient[: 0 if made is None else len(made)]
        if made is not None and len(made) and isinstance(rates, Tensor):
            for start in range(0, len(made), EXACT_ROWS):
                part, into = made[start : start + EXACT_ROWS], moved[start : start + EXACT_ROWS]
                into.mul_(rates[part].neg()).add_(block.rows[part])
        factors = 1 + rates * coefficient[:, None]
        if not (factors == 1).all():
            block.rows.mul_(factors)
        if isinstance(rates, Tensor):
            block.rows.addmm_(pull.mul_(rates), self._batch.unit, alpha=-1)
        else:
            block.rows.addmm_(pull, self._batch.unit, alpha=-rates)
        if made is not None and len(made):
            block.rows.index_copy_(0, made, moved)

    def gradient_of(self, block: Block, pull: Tensor, coefficient: Tensor) -> Tensor:
        """(R, D): the rows' gradient, from what `descend` yields; valid until the next block."""
        gradient = torch.mul(block.rows, -coefficient[:, None], out=self._gradient[: len(pull)])
        return gradient.addmm_(pull, self._batch.unit)


def _invert(lengths: Tensor) -> Tensor:
    """1 / length in place: 0 of what has no direction; NaN of what is not finite, or too long to be squared."""
    short = lengths < SHORTEST
    lengths.reciprocal_().masked_fill_(lengths == 0, torch.nan)
    return lengths.masked_fill_(short, 0)
