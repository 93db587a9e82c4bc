"""One step of an embedder through the margin head: micro-batches side by side, their gradients added exactly.

Each micro-batch goes through the network alone, in one thread, so that its numbers depend on nothing else. The
gradients of all are turned into whole multiples of a fixed unit, whose sum is the same in any order: weights after a
step have the same bits for any number of ranks and threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....tiler.system.machine import one_thread
from ..base.collectives import Ranks
from ..layer.head import ShardedMarginHead
from ..layer.threads import run_tablets
from ..pictures.batch_loader import MicroBatch
from .feature_norm import FeatureNorm, normalise_batch

LARGEST_BITS = 13
"""A gradient of 2^13 in one number counts as not finite; steps are of about 1."""


class MicroBatchSum:
    """The sum of micro-batches' gradients as whole numbers, in any order, over threads and ranks."""

    def __init__(self, parameters: Sequence[Tensor], micro_batches: int) -> None:
        self._parameters = list(parameters)
        self._bits = 62 - LARGEST_BITS - math.ceil(math.log2(micro_batches))
        # One more number counts the gradients that are not finite.
        self._fixed = torch.zeros(sum(p.numel() for p in parameters) + 1, dtype=torch.int64)
        self._parts = self._fixed[:-1].split([p.numel() for p in parameters])
        self._lock = threading.Lock()

    def add(self, gradients: Sequence[Tensor]) -> None:
        """One micro-batch's."""
        for part, gradient in zip(self._parts, gradients, strict=True):
            wide = gradient.detach().reshape(-1).double()
            is_good = bool(wide.isfinite().all() and wide.abs().max() < 2.0**LARGEST_BITS)
            with self._lock:
                if is_good:
                    part += wide.mul_(2.0**self._bits).round_().long()
                else:
                    self._fixed[-1] += 1

    def finish(self, ranks: Ranks) -> bool:
        """Add over the ranks and give each parameter its gradient; False where one was not finite on any of them."""
        ranks.add(self._fixed)
        if int(self._fixed[-1]):
            return False
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            parameter.grad = (part.double() * 2.0**-self._bits).reshape(parameter.shape).to(parameter.dtype)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Embed:
    """The work of one thread: a micro-batch through the network."""

    model: nn.Module
    mean: float
    scale: float
    precision: torch.dtype
    learns: bool

    def __call__(self, _: None, batch: MicroBatch) -> Tensor:
        scaled = (batch.images.permute(0, 3, 1, 2).float() - self.mean) / self.scale
        # Casts are not shared between threads, whose graphs are apart.
        with (
            torch.set_grad_enabled(self.learns),
            torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32, cache_enabled=False),
        ):
            return self.model(scaled).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step found."""

    loss: float
    samples: int
    """Of this rank that had a usable picture."""
    is_finite: bool
    """False: neither rows nor gradients can be used; parameters keep no gradient."""


def compute_step(
    model: nn.Module,
    norm: FeatureNorm,
    head: ShardedMarginHead,
    batches: Sequence[MicroBatch],
    *,
    micro_batches: int,
    mean: float,
    scale: float,
    precision: torch.dtype = torch.float32,
) -> StepResult:
    """Forward, the head with its rows' update, backward; leaves in each parameter the gradient of the global mean loss.

    Called by all ranks with their micro-batches of one step, in order.

    Args:
        norm: of the model, which normalises its features where it is evaluated.
        micro_batches: of all ranks.
        mean, scale: a pixel p becomes (p - mean) / scale.
        precision: bfloat16: products of the network in it, by autocast; weights and sums stay float32.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    workers: list[None] = [None] * torch.get_num_threads()

    embed = _Embed(model=model, mean=mean, scale=scale, precision=precision, learns=True)
    features = run_tablets(embed, list(batches), workers)
    labels = torch.cat([batch.labels for batch in batches])
    samples = int((labels >= 0).sum())
    for parameter in parameters:
        parameter.grad = None
    with one_thread():
        normalised = normalise_batch(norm, torch.cat([feature.detach() for feature in features]), labels, head.ranks)
    if normalised is None:
        return StepResult(loss=math.nan, samples=samples, is_finite=False)
    leaf = normalised.features.requires_grad_()
    loss = head(leaf, labels)
    loss.backward()
    if head.skipped:
        return StepResult(loss=float(loss.detach()), samples=samples, is_finite=False)
    assert leaf.grad is not None
    total = MicroBatchSum(parameters, micro_batches)
    with one_thread():
        gradient = normalised.backward(leaf.grad, head.ranks)
    incoming = gradient.split([len(batch.labels) for batch in batches])

    def descend(_: None, item: tuple[Tensor, Tensor]) -> None:
        with torch.enable_grad():
            total.add(torch.autograd.grad(item[0], parameters, item[1]))

    run_tablets(descend, list(zip(features, incoming, strict=True)), workers)
    return StepResult(loss=float(loss.detach()), samples=samples, is_finite=total.finish(head.ranks))


def compute_full_loss(
    model: nn.Module,
    head: ShardedMarginHead,
    batches: Sequence[MicroBatch],
    *,
    mean: float,
    scale: float,
    precision: torch.dtype = torch.float32,
) -> float | None:
    """The exact mean loss over all classes, whatever share of them a step sees; nothing moves.

    Called by all ranks with their micro-batches, in order; the same bits for any number of ranks and threads. None
    where no sample is usable, or the loss is not finite.

    Args:
        model: in the mode of evaluation, so that no sample depends on the others.
    """
    workers: list[None] = [None] * torch.get_num_threads()
    embed = _Embed(model=model, mean=mean, scale=scale, precision=precision, learns=False)
    features, labels = run_tablets(embed, list(batches), workers), torch.cat([batch.labels for batch in batches])
    usable = head.ranks.add((labels >= 0).sum())
    loss = float(head.full_loss(torch.cat(features), labels))
    return loss if int(usable) and math.isfinite(loss) else None
