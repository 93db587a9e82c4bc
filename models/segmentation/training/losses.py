"""Losses of whole images, as sums over pixels: exact over tiles, with torch's normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn import functional as F

from ....tiler.base.errors import LabelError, UsageError
from ....tiler.training.loss import Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """-sum w_y log softmax(z)_y / sum w_y over the pixels that count: torch's cross_entropy of the whole image.

    With label smoothing e the true class has 1 - e + e/C and every other e/C of a pixel's weight.
    Labels: one band of class numbers. A channel for each of two classes or more.
    """

    ignore_index: int | None = None
    """Pixels of this label do not count."""
    weight: tuple[float, ...] | None = None
    """Of each class; None: 1."""
    label_smoothing: float = 0.0
    separable: bool = True

    def __post_init__(self) -> None:
        if self.weight is not None and not all(isfinite(w) and w >= 0 for w in self.weight):
            raise UsageError(f"class weights must be finite and >= 0, got {self.weight}")
        if not 0 <= self.label_smoothing <= 1:
            raise UsageError(f"label smoothing must be in 0..1, got {self.label_smoothing}")

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return _select_classes(labels, valid, self.ignore_index)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        if logits.shape[0] == 1:
            raise UsageError(
                "a cross-entropy needs a channel for each class, and of one channel it is 0; take the binary loss, "
                "OneAgainstAll or BinaryCrossEntropy"
            )
        classes = _true_classes(labels, counted, logits.shape[0])
        weight = None
        if self.weight is not None:
            if len(self.weight) != logits.shape[0]:
                raise UsageError(
                    f"there must be a weight a class, got {len(self.weight)} for {logits.shape[0]} classes"
                )
            weight = torch.tensor(self.weight, dtype=logits.dtype, device=logits.device)
        # -1 stands for all that does not count.
        target = classes.masked_fill(~counted, -1)
        each = F.cross_entropy(
            logits[None], target[None], weight, ignore_index=-1, reduction="none", label_smoothing=self.label_smoothing
        )
        counts = counted if weight is None else weight[classes] * counted
        return torch.stack([each.sum(dtype=torch.float64), counts.sum(dtype=torch.float64)])

    def value(self, sums: Tensor) -> Tensor:
        if not sums[1] > 0:
            raise LabelError("no pixel counts: all labels are of weight 0; weigh another class, or leave the image out")
        return sums[0] / sums[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class BinaryCrossEntropy:
    """The mean over pixels and channels of -(p y log s(z) + (1 - y) log(1 - s(z))), s the sigmoid: torch's
    binary_cross_entropy_with_logits of the whole image.

    Labels: a band a channel, in 0..1; NaN does not count.
    """

    ignore_index: int | None = None
    """Pixels and channels of this label do not count."""
    pos_weight: tuple[float, ...] | None = None
    """p, of each channel; None: 1."""
    separable: bool = True

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return _known(labels, valid, self.ignore_index).any(dim=0)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        known, truth = _targets(logits, labels, counted, self.ignore_index)
        if not ((truth >= 0) & (truth <= 1)).all():
            raise LabelError("labels of a binary cross-entropy must lie in 0..1; scale them, or name an ignore_index")
        weight = None
        if self.pos_weight is not None:
            if len(self.pos_weight) != logits.shape[0]:
                raise UsageError(
                    f"there must be a pos_weight a channel, got {len(self.pos_weight)} for {logits.shape[0]}"
                )
            weight = torch.tensor(self.pos_weight, dtype=logits.dtype, device=logits.device)[:, None, None]
        each = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight, reduction="none")
        return _sum_and_count(each, known)

    def value(self, sums: Tensor) -> Tensor:
        return _mean(sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneAgainstAll:
    """BinaryCrossEntropy of every class against all others: the mean over pixels and classes c of that of z_c with
    y = 1 where the pixel is of c, else 0. Of one channel: of class 1 against class 0.

    Labels: one band of class numbers (0 and 1 for one channel).
    """

    ignore_index: int | None = None
    """Pixels of this label do not count."""
    separable: bool = True

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return _select_classes(labels, valid, self.ignore_index)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        is_binary = logits.shape[0] == 1
        classes = _true_classes(labels, counted, 2 if is_binary else logits.shape[0])
        number = torch.arange(1, 2) if is_binary else torch.arange(len(logits))
        truth = classes[None] == number.to(logits.device)[:, None, None]
        return BinaryCrossEntropy().sums(logits, truth, counted)

    def value(self, sums: Tensor) -> Tensor:
        return _mean(sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredLoss:
    """The mean over pixels and channels of (z - y)^2.

    Labels: a band a channel; NaN does not count.
    """

    separable: bool = True

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return _known(labels, valid, None).any(dim=0)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        known, truth = _targets(logits, labels, counted, None)
        return _sum_and_count(F.mse_loss(logits, truth, reduction="none"), known)

    def value(self, sums: Tensor) -> Tensor:
        return _mean(sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class HuberLoss:
    """The mean over pixels and channels of r^2 / 2 where r = |z - y| <= delta, and of delta (r - delta / 2) beyond.

    Labels: a band a channel; NaN does not count.
    """

    delta: float = 1.0
    separable: bool = True

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise UsageError(f"delta must be > 0, got {self.delta}")

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return _known(labels, valid, None).any(dim=0)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        known, truth = _targets(logits, labels, counted, None)
        return _sum_and_count(F.huber_loss(logits, truth, reduction="none", delta=self.delta), known)

    def value(self, sums: Tensor) -> Tensor:
        return _mean(sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dice:
    """1 - mean over classes of (2 I_c + s) / (P_c + Y_c + s), over the whole image.

    P_c is the sum over pixels of the probability of c (softmax; sigmoid for one channel), Y_c the number of pixels of
    class c, I_c the sum of the probability over those. Classes without a pixel are left out of the mean.
    Labels: one band of class numbers (0 and 1 for one channel).
    """

    ignore_index: int | None = None
    """Pixels of this label do not count."""
    smooth: float = 1.0
    """s."""
    separable: bool = False

    def __post_init__(self) -> None:
        if not self.smooth >= 0:
            raise UsageError(f"smooth must be >= 0, got {self.smooth}")

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return _select_classes(labels, valid, self.ignore_index)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        is_binary = logits.shape[0] == 1
        classes = _true_classes(labels, counted, 2 if is_binary else logits.shape[0])
        probability = logits.sigmoid() if is_binary else logits.softmax(dim=0)
        number = (
            torch.arange(1, 2, device=logits.device) if is_binary else torch.arange(len(logits), device=logits.device)
        )
        truth = (classes[None] == number[:, None, None]) & counted
        probability = probability * counted
        return torch.cat(
            [
                (probability * truth).sum((1, 2), dtype=torch.float64),
                probability.sum((1, 2), dtype=torch.float64),
                truth.sum((1, 2), dtype=torch.float64),
            ]
        )

    def value(self, sums: Tensor) -> Tensor:
        both, guessed, true = sums.reshape(3, -1)
        present = true > 0
        if not present.any():
            raise LabelError("no pixel counts for Dice: none is of a foreground class; leave the image out")
        scores = (2 * both + self.smooth) / (guessed + true + self.smooth)
        return 1 - scores[present].mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOfLosses:
    """sum_i weights[i] * losses[i], cross-entropy and Dice for example: two passes over the tiles, whatever they are.

    Each loss counts the pixels that it selects itself.
    """

    losses: tuple[Loss, ...]
    weights: tuple[float, ...]
    separable: bool = False

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.weights):
            raise UsageError(f"there must be a weight a loss, got {len(self.weights)} for {len(self.losses)} losses")
        if self.separable:
            raise UsageError("a sum of losses has sums of several kinds, so that separable must be False")

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return torch.stack([loss.select(labels, valid) for loss in self.losses]).any(dim=0)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        parts = [loss.sums(logits, labels, loss.select(labels, counted)) for loss in self.losses]
        # How many sums each loss has stands before them, beside a 1, since these are added over tiles too.
        header = torch.tensor([1, *map(len, parts)], dtype=torch.float64, device=logits.device)
        return torch.cat([header, *parts])

    def value(self, sums: Tensor) -> Tensor:
        header = sums[: 1 + len(self.losses)].detach()
        sizes = [round(float(size)) for size in header[1:] / header[0]]
        parts = sums[len(header) :].split(sizes)
        values = [w * loss.value(part) for w, loss, part in zip(self.weights, self.losses, parts, strict=True)]
        return torch.stack(values).sum()


def _select_classes(labels: Tensor, valid: Tensor, ignore_index: int | None) -> Tensor:
    if labels.shape[0] != 1:
        raise LabelError(f"class labels must be one band of class numbers, got {labels.shape[0]} bands; pick one")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise LabelError(f"class labels must be integers, got {labels.dtype}; convert them")
    return valid if ignore_index is None else valid & _differs(labels[0], ignore_index)


def _true_classes(labels: Tensor, counted: Tensor, classes: int) -> Tensor:
    """(height, width) in int64; 0 where a pixel does not count.

    Raises:
        LabelError: a counted label is no class.
    """
    found = labels[0].long().masked_fill(~counted, 0)
    wrong = found[(found < 0) | (found >= classes)]
    if wrong.numel():
        raise LabelError(
            f"labels must be classes 0..{classes - 1}, got {int(wrong[0])}; name it as ignore_index, or as the labels' "
            "nodata value"
        )
    return found


def _known(labels: Tensor, valid: Tensor, ignore_index: int | None) -> Tensor:
    """(bands, height, width), True where a label counts."""
    known = valid.expand(labels.shape)
    if labels.is_floating_point():
        known = known & ~labels.isnan()
    return known if ignore_index is None else known & _differs(labels, ignore_index)


def _differs(labels: Tensor, value: int) -> Tensor:
    """Where labels are not that value; torch itself takes -1 for 255 among labels of 8 bits."""
    if not labels.is_floating_point() and labels.dtype != torch.bool:
        held = torch.iinfo(labels.dtype)
        if not held.min <= value <= held.max:
            return torch.ones_like(labels, dtype=torch.bool)
    return labels != value


def _targets(logits: Tensor, labels: Tensor, counted: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """(which labels count, the labels in the logits' type, 0 where they do not), a band a channel."""
    if labels.shape[0] != logits.shape[0]:
        raise LabelError(
            f"labels must have a band for each of the {logits.shape[0]} channels, got {labels.shape[0]}; pick bands"
        )
    known = _known(labels, counted, ignore_index)
    # Converted first: torch fills no unsigned numbers of more than 8 bits. What is not known may be no number.
    return known, labels.to(logits.dtype).masked_fill(~known, 0)


def _sum_and_count(each: Tensor, known: Tensor) -> Tensor:
    return torch.stack([(each * known).sum(dtype=torch.float64), known.sum(dtype=torch.float64)])


def _mean(sums: Tensor) -> Tensor:
    if not sums[1] > 0:
        raise LabelError("no label counts: all are nodata, NaN or ignored; leave the image out")
    return sums[0] / sums[1]
