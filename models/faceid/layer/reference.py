"""The dense, obvious margin softmax: all logits at once, gradients by autograd. What the streamed passes must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .margin_registry import MarginLike
from .margins import EPSILON, Margin
from .streamed_softmax import SHORTEST


def compute_dense_loss(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    margin: MarginLike,
    scale: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean over valid labels of cross-entropy(scale * cosines with the margin at the target).

    Args:
        features: (batch, dim). What is shorter than 1e-12, of features or of rows, has no direction: its cosines are 0,
            and it has no gradient.
        labels: (batch,); -1 is padding, whose features may hold anything.
        weight: (classes, dim).
        class_weights: (classes,): what each class's exponential is multiplied by; None: 1.
    """
    valid = labels >= 0
    features, targets = features[valid], labels[valid]
    if not len(targets):
        return features.sum() * 0
    logits = _unit(features) @ _unit(weight).T
    rows = torch.arange(len(targets))
    own = _phi(logits[rows, targets], margin)
    logits = logits.index_put((rows, targets), own)
    logits = scale * logits
    if class_weights is not None:
        logits = logits + class_weights.log()
    return F.cross_entropy(logits, targets)


def _unit(vectors: Tensor) -> Tensor:
    short = vectors.detach().norm(dim=1, keepdim=True) < SHORTEST
    # Chosen before the division: what is left out of a product by a mask alone gives NaN to its gradient.
    return F.normalize(torch.where(short, 1.0, vectors), dim=1).masked_fill(short, 0)


def _phi(t: Tensor, margin: MarginLike) -> Tensor:
    """The margin's formula, left to autograd; of an added margin its own phi."""
    if not isinstance(margin, Margin):
        return margin.apply(t)[0]
    if margin.m1 != 1:
        angle = margin.m1 * torch.acos(t) + margin.m2
        turns = torch.floor(angle.detach() / math.pi)
        return (1 - 2 * (turns % 2)) * torch.cos(angle) - 2 * turns - margin.m3
    if margin.m2 == 0:
        return t - margin.m3
    sine = (1 - t * t).clamp_min(EPSILON).sqrt()
    rotated = t * math.cos(margin.m2) - sine * math.sin(margin.m2)
    beyond = t - margin.m2 * math.sin(margin.m2)
    return torch.where(t > math.cos(math.pi - margin.m2), rotated, beyond) - margin.m3
