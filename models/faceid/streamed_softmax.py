"""Margin softmax streamed over the classes: two passes over a tablet, nothing of size batch x classes.

Shapes: B samples, D numbers each, R rows of a block. w is a row, w^ = w / |w|, x^ a sample of length 1;
z = scale * x^ . w^, for a sample's own class scale * phi(x^ . w^).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .margins import Margin
from .tablets import Tablet

LARGEST_PLAIN_SCALE = 72
"""Up to which exp(z) of float32 cannot overflow in a block, so that no maximum is needed."""
TINY = 1e-15
"""Of a row's length, whose inverse square float32 can still hold: rows of zeros, as those that pad a block, have cosine
0 with everything and stay zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The global batch, as every rank holds it."""

    unit: Tensor
    """(B, D): x^, in the precision of the products."""
    unit64: Tensor
    """The same in float64, for what goes to targets."""
    labels: Tensor
    """(B,); -1 is padding."""

    def targets_in(self, first: int, rows: int) -> tuple[Tensor, Tensor]:
        """(samples, rows of the block): the samples whose class is in a block."""
        samples = ((self.labels >= first) & (self.labels < first + rows)).nonzero()[:, 0]
        return samples, self.labels[samples] - first


@dataclass(frozen=True, slots=True, kw_only=True)
class TabletSums:
    """What one tablet adds to each sample's normaliser, in float64, each (B,): the sum is total * exp(highest)."""

    highest: Tensor
    total: Tensor
    target: Tensor
    """z of the sample's own class; 0 where that lies in another tablet."""

    def stacked(self) -> Tensor:
        return torch.stack((self.highest, self.total, self.target))


@dataclass(slots=True)
class Block:
    """A block of rows with its logits."""

    index: int
    first: int
    """Of the block, counted in its tablet."""
    rows: Tensor
    """(R, D) in the precision of the products; a buffer that the next block overwrites."""
    inverse: Tensor
    """(R,): 1 / |w|."""
    logits: Tensor
    """(B, R): z, -infinity where the tablet has no row."""
    cosines: Tensor
    """(B, R): x^ . w^, without margin; valid where the block was computed for the second pass."""
    samples: Tensor
    own: Tensor
    """Samples whose class is in the block, and its row."""
    own_cosine: Tensor
    own_slope: Tensor
    own_logit: Tensor
    """t, phi'(t) and z of those, in float64."""


class Streamer:
    """The passes over tablets of one precision and batch; holds buffers for one block."""

    def __init__(self, batch: Batch, margin: Margin, scale: float, block_rows: int) -> None:
        self._batch, self._margin, self._scale, self._size = batch, margin, scale, block_rows
        self._rows = batch.unit.new_empty((block_rows, batch.unit.shape[1]))
        self._gradient = torch.empty_like(self._rows)
        self._cached: dict[tuple[int, int], Tensor] = {}

    @property
    def unit(self) -> Tensor:
        """(B, D): x^."""
        return self._batch.unit

    def _blocks(self, rows: Tensor, tablet: Tablet) -> Iterator[Block]:
        """The tablet's blocks: (padded rows, D) in storage precision."""
        batch, scale = self._batch, self._scale
        for index, start in enumerate(range(0, tablet.rows, self._size)):
            wide = self._rows.copy_(rows[start : start + self._size])
            inverse = torch.linalg.vector_norm(wide, dim=1).clamp_min_(TINY).reciprocal_()
            cosines = self._cached.get((tablet.index, index))
            if cosines is None:
                cosines = (batch.unit @ wide.T).mul_(inverse)
            logits = cosines * scale
            samples, own = batch.targets_in(tablet.first + start, min(self._size, tablet.rows - start))
            row64 = wide[own].double()
            row64 /= row64.norm(dim=1, keepdim=True).clamp_min(TINY)
            cosine = (batch.unit64[samples] * row64).sum(dim=1)
            phi, slope = self._margin.apply(cosine)
            logits[samples, own] = (scale * phi).to(logits.dtype)
            if tablet.rows - start < self._size:
                logits[:, tablet.rows - start :] = -torch.inf
            yield Block(
                index=index,
                first=start,
                rows=wide,
                inverse=inverse,
                logits=logits,
                cosines=cosines,
                samples=samples,
                own=own,
                own_cosine=cosine,
                own_slope=slope,
                own_logit=scale * phi,
            )

    def measure(self, rows: Tensor, tablet: Tablet, *, keep: bool = False) -> TabletSums:
        """First pass. `keep`: hold the tablet's cosines, B x rows numbers, for the second."""
        count = len(self._batch.labels)
        highest = torch.full((count,), -torch.inf, dtype=torch.float64, device=rows.device)
        total, target = torch.zeros_like(highest), torch.zeros_like(highest)
        plain = self._scale <= LARGEST_PLAIN_SCALE
        if plain:
            highest.zero_()
        for block in self._blocks(rows, tablet):
            target[block.samples] = block.own_logit
            if keep:
                self._cached[tablet.index, block.index] = block.cosines
            if plain:
                total += block.logits.exp_().sum(dim=1).double()
                continue
            top = block.logits.max(dim=1).values.double()
            merged = torch.maximum(highest, top)
            part = (block.logits - top.to(block.logits.dtype)[:, None]).exp_().sum(dim=1).double()
            total = total * (highest - merged).exp() + part * (top - merged).exp()
            highest = merged
        return TabletSums(highest=highest, total=total, target=target)

    def descend(
        self, rows: Tensor, tablet: Tablet, normaliser: Tensor, weight: float, others: Tensor, owns: Tensor
    ) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Second pass: (block, pull (B, R), coefficient (R,)) for each block, whose rows may then be overwritten.

        The gradient of row r is sum_b pull[b, r] x^_b - coefficient[r] w_r. The tablet's share of the gradient for x^
        is added to `others` (B, D), from rows of other classes, and in float64 to `owns` (B, D), from own rows.

        Args:
            normaliser: (B,) float64, log of the sum over all classes; +infinity for samples that do not count.
            weight: of each sample's loss.
        """
        batch = self._batch
        shift = normaliser.to(batch.unit.dtype)[:, None]
        for block in self._blocks(rows, tablet):
            pull = block.logits.sub_(shift).exp_().mul_(self._scale * weight)
            # Targets apart, in float64: P - 1 loses digits where P is near 1.
            chance = (block.own_logit - normaliser[block.samples]).exp() - 1
            chance = torch.where(torch.isinf(normaliser[block.samples]), 0.0, chance)
            own_pull = chance * block.own_slope * (self._scale * weight)
            pull[block.samples, block.own] = 0
            row64 = block.rows[block.own].double() * block.inverse[block.own].double()[:, None]
            owns.index_add_(0, block.samples, own_pull[:, None] * row64)
            # Rows' gradient: (sum_b G x^ - (sum_b G cos) w^) / |w|
            along = (pull * block.cosines).sum(dim=0)
            pull.mul_(block.inverse)
            others.addmm_(pull, block.rows)
            own_along = torch.zeros_like(along, dtype=torch.float64)
            own_along.index_add_(0, block.own, own_pull * block.own_cosine)
            coefficient = (along + own_along.to(along.dtype)) * block.inverse.square()
            scaled = (own_pull * block.inverse[block.own].double()).to(pull.dtype)
            pull.index_put_((block.samples, block.own), scaled, accumulate=True)
            yield block, pull, coefficient

    def gradient_of(self, block: Block, pull: Tensor, coefficient: Tensor) -> Tensor:
        """(R, D): the rows' gradient, from what `descend` yields; valid until the next block."""
        torch.mul(block.rows, -coefficient[:, None], out=self._gradient)
        return self._gradient.addmm_(pull.T, self._batch.unit)
