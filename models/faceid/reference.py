"""The dense, obvious margin softmax: all logits at once, gradients by autograd. What the streamed passes must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .margins import EPSILON, Margin


def compute_dense_loss(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    margin: Margin,
    scale: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean over valid labels of cross-entropy(scale * cosines with the margin at the target).

    Args:
        features: (batch, dim).
        labels: (batch,); -1 is padding.
        weight: (classes, dim).
        class_weights: (classes,): what each class's exponential is multiplied by; None: 1.
    """
    cosines = F.normalize(features, dim=1) @ F.normalize(weight, dim=1).T
    valid = labels >= 0
    logits, targets = cosines[valid], labels[valid]
    if not len(targets):
        return features.sum() * 0
    rows = torch.arange(len(targets))
    own = _phi(logits[rows, targets], margin)
    logits = logits.index_put((rows, targets), own)
    logits = scale * logits
    if class_weights is not None:
        logits = logits + class_weights.log()
    return F.cross_entropy(logits, targets)


def _phi(t: Tensor, margin: Margin) -> Tensor:
    """The margin's formula, left to autograd."""
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
