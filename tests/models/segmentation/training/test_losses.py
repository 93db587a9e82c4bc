"""Losses as sums: however the pixels are cut, torch's own value and gradient on the whole image."""

from __future__ import annotations

import pytest
import torch
from outsize.models.segmentation.training.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    HuberLoss,
    OneAgainstAll,
    SquaredLoss,
    SumOfLosses,
)
from outsize.tiler.base.errors import LabelError, UsageError
from outsize.tiler.training.loss import Loss
from torch import Tensor
from torch.nn import functional as F

SHAPE = (13, 17)
WEIGHTS = (0.5, 2.0, 1.25, 3.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_classes(classes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    labels = torch.randint(0, classes, (1, *SHAPE), generator=torch.Generator().manual_seed(1))
    labels[0, 3:7, 2:9] = 255
    return labels.to(dtype)


def by_parts(loss: Loss, logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(value, gradient) from the sums of uneven stripes."""
    valid = torch.ones(SHAPE, dtype=torch.bool) if valid is None else valid
    given = logits.clone().requires_grad_()
    total = torch.zeros(1, dtype=torch.float64)
    for start, stop in ((0, 5), (5, 6), (6, 13)):
        rows = (slice(None), slice(start, stop))
        part = loss.sums(given[rows], labels[rows], loss.select(labels[rows], valid[start:stop]))
        assert part.dtype == torch.float64
        total = total + part
    value = loss.value(total)
    (gradient,) = torch.autograd.grad(value, given)
    return value.detach(), gradient


def require_same(loss: Loss, logits: Tensor, labels: Tensor, expected: Tensor, given: Tensor) -> None:
    value, gradient = by_parts(loss, logits, labels)
    (reference,) = torch.autograd.grad(expected, given)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert float((gradient - reference).abs().max()) < 1e-13 * float(reference.abs().max()) + 1e-16


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_cross_entropy_is_torchs(weight: tuple[float, ...] | None, smoothing: float) -> None:
    labels = draw_classes(4)
    logits = draw(4, *SHAPE).requires_grad_()
    tensor = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = F.cross_entropy(
        logits[None], labels.long(), tensor, ignore_index=255, label_smoothing=smoothing, reduction="mean"
    )
    loss = CrossEntropy(ignore_index=255, weight=weight, label_smoothing=smoothing)
    require_same(loss, logits.detach(), labels, expected, logits)


@pytest.mark.parametrize("pos_weight", [None, (0.5, 3.0)])
def test_binary_cross_entropy_is_torchs(pos_weight: tuple[float, ...] | None) -> None:
    labels = draw(2, *SHAPE, seed=2).sigmoid()
    labels[0, 3:7, 2:9] = float("nan")
    labels[1, 5:9, 3:4] = float("nan")
    logits = draw(2, *SHAPE).requires_grad_()
    weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)[:, None, None]
    each = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), pos_weight=weight, reduction="none")
    expected = each[~labels.isnan()].mean()
    require_same(BinaryCrossEntropy(pos_weight=pos_weight), logits.detach(), labels, expected, logits)
    classes = (draw_classes(2) != 0).to(torch.int16).masked_fill(draw_classes(2) == 255, -1)
    one = draw(1, *SHAPE).requires_grad_()
    each = F.binary_cross_entropy_with_logits(one, classes.double(), reduction="none")
    require_same(BinaryCrossEntropy(ignore_index=-1), one.detach(), classes, each[classes >= 0].mean(), one)


def test_one_against_all_is_torchs_binary_cross_entropy_of_one_hot_classes() -> None:
    labels, logits = draw_classes(4), draw(4, *SHAPE).requires_grad_()
    known = labels[0] != 255
    truth = F.one_hot(labels[0][known].long(), 4).T.double()
    expected = F.binary_cross_entropy_with_logits(logits[:, known], truth)
    require_same(OneAgainstAll(ignore_index=255), logits.detach(), labels, expected, logits)


@pytest.mark.parametrize("kind", ["squared", "huber"])
def test_losses_of_regression_are_torchs(kind: str) -> None:
    labels = 3 * draw(2, *SHAPE, seed=2)
    labels[0, 3:7, 2:9] = float("nan")
    known = ~labels.isnan()
    logits = draw(2, *SHAPE).requires_grad_()
    if kind == "squared":
        loss, expected = SquaredLoss(), F.mse_loss(logits[known], labels[known])
    else:
        loss, expected = HuberLoss(delta=0.7), F.huber_loss(logits[known], labels[known], delta=0.7)
    require_same(loss, logits.detach(), labels, expected, logits)


@pytest.mark.parametrize("channels", [1, 4])
def test_dice_is_that_of_the_whole_image(channels: int) -> None:
    labels = draw_classes(2 if channels == 1 else 3)  # of four classes the last has no pixel
    counted = labels[0] != 255
    logits = draw(channels, *SHAPE).requires_grad_()
    scores = []
    for number in (1,) if channels == 1 else (0, 1, 2):
        probability = logits[0].sigmoid() if channels == 1 else logits.softmax(0)[number]
        truth = (labels[0] == number).double()
        both = (probability * truth)[counted].sum()
        scores.append((2 * both + 0.5) / (probability[counted].sum() + truth[counted].sum() + 0.5))
    expected = 1 - torch.stack(scores).mean()
    require_same(Dice(ignore_index=255, smooth=0.5), logits.detach(), labels, expected, logits)


def test_a_sum_of_losses_is_the_sum_of_their_values() -> None:
    labels, logits = draw_classes(4), draw(4, *SHAPE)
    parts = (CrossEntropy(ignore_index=255, weight=WEIGHTS), Dice(ignore_index=255), CrossEntropy(ignore_index=255))
    both = SumOfLosses(losses=(parts[0], SumOfLosses(losses=parts[1:], weights=(2.0, 0.25))), weights=(1.0, 0.5))
    value, gradient = by_parts(both, logits, labels)
    each = [by_parts(part, logits, labels) for part in parts]
    weights = (1.0, 1.0, 0.125)
    assert float(value) == pytest.approx(sum(w * float(v) for w, (v, _) in zip(weights, each, strict=True)), rel=1e-14)
    expected = sum(w * g for w, (_, g) in zip(weights, each, strict=True))
    assert float((gradient - expected).abs().max()) < 1e-16


@pytest.mark.parametrize("loss", [CrossEntropy(), Dice(), SquaredLoss(), SumOfLosses(losses=(Dice(),), weights=(1.0,))])
def test_pixels_that_are_not_valid_do_not_count(loss: Loss) -> None:
    logits, valid = draw(1 if isinstance(loss, SquaredLoss) else 3, *SHAPE), draw(*SHAPE, seed=4) > 0
    labels = torch.randint(0, 3, (1, *SHAPE), generator=torch.Generator().manual_seed(1))
    value, gradient = by_parts(loss, logits, labels, valid)
    noise = torch.where(valid, 0, draw(*SHAPE, seed=5))
    other, _ = by_parts(loss, logits + noise, torch.where(valid, labels, 77), valid)
    assert float(other) == float(value)
    assert not gradient[:, ~valid].any()
    assert gradient[:, valid].all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.uint32])
@pytest.mark.parametrize("loss", [BinaryCrossEntropy, SquaredLoss, HuberLoss])
def test_labels_of_every_type_of_whole_numbers_are_those_numbers(loss: type, dtype: torch.dtype) -> None:
    logits, labels = draw(1, *SHAPE), draw_classes(2) % 2
    expected, gradient = by_parts(loss(), logits, labels.double())
    value, found = by_parts(loss(), logits, labels.to(dtype))
    assert float(value) == float(expected)
    assert torch.equal(found, gradient)


@pytest.mark.parametrize("ignored", [-1, 256, 2**40])
def test_an_ignored_label_that_the_labels_cannot_hold_ignores_none(ignored: int) -> None:
    """torch compares -1 with 8 bits as 255."""
    labels, logits = draw_classes(4).to(torch.uint8), draw(256, *SHAPE)
    assert (labels == 255).any()
    value, _ = by_parts(CrossEntropy(ignore_index=ignored), logits, labels)
    assert float(value) == pytest.approx(float(F.cross_entropy(logits[None], labels.long())), rel=1e-12)


def test_single_precision_sums_do_not_lose_pixels() -> None:
    """Ten million pixels of one value: a running sum in float32 would be off by a per mille and more."""
    shape = (4000, 2500)
    labels = torch.zeros((1, *shape), dtype=torch.uint8)
    sums = SquaredLoss().sums(torch.full((1, *shape), 0.1), labels, torch.ones(shape, dtype=torch.bool))
    assert float(SquaredLoss().value(sums)) == pytest.approx(float(torch.tensor(0.1) ** 2), rel=1e-9)


def test_labels_and_options_that_cannot_be_right_are_refused() -> None:
    logits, labels, valid = draw(4, *SHAPE), draw_classes(4), torch.ones(SHAPE, dtype=torch.bool)
    with pytest.raises(LabelError, match=r"labels must be classes 0\.\.3, got 255; name it as ignore_index"):
        by_parts(CrossEntropy(), logits, labels)
    with pytest.raises(LabelError, match="one band of class numbers, got 2 bands"):
        by_parts(Dice(), logits, torch.cat([labels, labels]))
    with pytest.raises(LabelError, match=r"class labels must be integers, got torch\.float64"):
        by_parts(CrossEntropy(), logits, labels.double())
    with pytest.raises(LabelError, match="a band for each of the 4 channels, got 1"):
        by_parts(HuberLoss(), logits, labels)
    with pytest.raises(LabelError, match=r"must lie in 0\.\.1"):
        by_parts(BinaryCrossEntropy(), logits[:1], labels)
    for loss, channels in ((CrossEntropy(), 4), (Dice(), 4), (BinaryCrossEntropy(), 1), (SquaredLoss(), 1)):
        none = loss.sums(logits[:channels], labels, ~valid)
        assert not none.any()
        with pytest.raises(LabelError, match=r"no (pixel|label) counts"):
            loss.value(none)
    with pytest.raises(LabelError, match="all labels are of weight 0"):
        by_parts(CrossEntropy(weight=(1, 1, 0, 0)), logits, torch.full((1, *SHAPE), 2))
    with pytest.raises(UsageError, match="a weight a class, got 2 for 4"):
        by_parts(CrossEntropy(weight=(1, 1), ignore_index=255), logits, labels)
    with pytest.raises(UsageError, match=r"label smoothing must be in 0\.\.1, got 2"):
        CrossEntropy(label_smoothing=2)
    with pytest.raises(UsageError, match="class weights must be finite and >= 0"):
        CrossEntropy(weight=(1, -1))
    with pytest.raises(UsageError, match="delta must be > 0, got 0"):
        HuberLoss(delta=0)
    with pytest.raises(UsageError, match="a weight a loss, got 2 for 1"):
        SumOfLosses(losses=(Dice(),), weights=(1, 2))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int64, torch.float32])
@pytest.mark.parametrize("kind", [BinaryCrossEntropy, SquaredLoss, HuberLoss])
def test_labels_of_any_type_are_taken(kind: type[Loss], dtype: torch.dtype) -> None:
    labels = draw_classes(2) % 2
    logits = draw(1, *SHAPE)
    expected, found = by_parts(kind(), logits, labels), by_parts(kind(), logits, labels.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
