"""The normalisation behind the last layer: mean zero and variance one of each number of a feature, over a step's batch.

Without it a new network soon gives all faces one feature: whatever moves the mean moves all cosines, and the margin's
gradient does. Only here does a sample depend on others, and there all ranks have the features of the whole batch
anyway, so that the statistics are those of the batch, in its order, whatever the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.collectives import Ranks

EPSILON = 1e-5
MOMENTUM = 0.1


class FeatureNorm(nn.Module):
    """(n, dim) -> (x - mean) / sqrt(variance + 1e-5), with running statistics of the batches; no weights.

    In training mode it leaves features as they are: `normalise_batch` sees the whole batch.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            return features
        return (features - self.mean) * (self.variance + EPSILON).rsqrt()


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalisedBatch:
    """This rank's features of a step, and what their gradient needs of all ranks'."""

    features: Tensor
    """(own samples, dim), normalised."""
    labels: Tensor
    inverse: Tensor
    """(dim,) 1 / sqrt(variance + 1e-5), float64."""
    wide: Tensor
    """(own samples, dim) as `features`, float64."""
    everyone: Tensor
    """(valid samples of all ranks, dim), float64."""
    valid: Tensor
    """(samples of all ranks,)."""

    def backward(self, gradient: Tensor, ranks: Ranks) -> Tensor:
        """The gradient for the features before normalisation: (g - mean(g) - x mean(g x)) / sqrt(variance + 1e-5).

        Before: each rank has its samples' gradient. After: each has theirs, of the sum over all ranks.
        """
        own = gradient.double()
        given = ranks.gather_batch(gradient, self.labels)[0].double()[self.valid]
        shift, slope = given.mean(dim=0), (given * self.everyone).mean(dim=0)
        found = (own - shift - self.wide * slope) * self.inverse
        return torch.where((self.labels >= 0)[:, None], found, 0.0).to(gradient.dtype)


def normalise_batch(norm: FeatureNorm, features: Tensor, labels: Tensor, ranks: Ranks) -> NormalisedBatch | None:
    """Normalise a step's features over the valid samples of all ranks, and follow their statistics.

    Called by all ranks, inside `one_thread`: sums by several threads have other last bits. None where fewer than two
    samples are valid, or one is not finite: there is nothing to normalise by.
    """
    gathered, all_labels, _ = ranks.gather_batch(features.detach(), labels)
    valid = all_labels >= 0
    known = gathered.double()[valid]
    if len(known) < 2 or not bool(known.isfinite().all()):
        return None
    mean, variance = known.mean(dim=0), known.var(dim=0, unbiased=False)
    inverse = (variance + EPSILON).rsqrt()
    norm.steps += 1
    share = max(MOMENTUM, 1 / int(norm.steps))  # the first batches alone tell more than the numbers before them
    norm.mean.lerp_(mean.to(norm.mean.dtype), share)
    norm.variance.lerp_(variance.to(norm.variance.dtype), share)
    wide = (features.detach().double() - mean) * inverse
    return NormalisedBatch(
        features=wide.to(features.dtype),
        labels=labels,
        inverse=inverse,
        wide=wide,
        everyone=(known - mean) * inverse,
        valid=valid,
    )
