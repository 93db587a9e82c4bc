"""The streamed head against the dense layer, one rank: loss, gradients, updates, rules of use."""

from __future__ import annotations

import math
import os
import signal
import time

import pytest
import torch
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.margins import Margin, margin_from
from outsize.models.faceid.layer.reference import compute_dense_loss
from outsize.models.faceid.layer.row_rules import SGD, Momentum, RowRMS, RowRule
from outsize.models.faceid.layer.threads import run_tablets
from torch import Tensor
from torch.nn import functional as F

MARGINS: dict[str, str | tuple[float, float, float]] = {
    "softmax": "softmax",
    "cosface": "cosface",
    "arcface": "arcface",
    "sphereface": (1.35, 0.0, 0.0),
    "combined": (1.0, 0.3, 0.2),
}
DIM = 16


def make_batch(classes: int, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn((samples, DIM), generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, classes, (samples,), generator=generator)
    if samples > 3:
        labels[1], labels[2] = labels[0], -1  # a repeated class, and padding
    return features, labels


def make_head(
    classes: int, margin: str = "arcface", rule: RowRule | None = None, **options: object
) -> ShardedMarginHead:
    given = {"storage": torch.float64, "tablet_rows": 24, "block_rows": 8, "scale": 16.0, **options}
    return ShardedMarginHead(classes, DIM, margin=MARGINS[margin], rule=rule, **given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("classes", [1, 5, 8, 24, 25, 101])
@pytest.mark.parametrize("keep", [False, True])
def test_loss_and_gradients_are_the_dense_layers(classes: int, margin: str, keep: bool) -> None:
    head = make_head(classes, margin, keep_cosines=keep)
    features, labels = make_batch(classes, 13)
    ours = features.clone().requires_grad_()
    loss = head(ours, labels)
    (3 * loss).backward()
    theirs, weight = features.clone().requires_grad_(), head.dense_weight().detach().clone().requires_grad_()
    expected = compute_dense_loss(theirs, labels, weight, head.margin, head.scale)
    (3 * expected).backward()
    assert abs(float((loss - expected).detach())) < 1e-10
    assert ours.grad is not None
    assert theirs.grad is not None
    assert weight.grad is not None
    assert isinstance(head.rows, torch.nn.Parameter)
    assert head.rows.grad is not None
    assert (ours.grad - theirs.grad).abs().max() < 1e-10
    gradient = torch.cat([head.rows.grad[s : s + t.rows] for t, s in zip(head.tablets, head.starts(), strict=True)])
    assert (gradient - weight.grad).abs().max() < 1e-10


def test_plain_softmax_is_torchs_cross_entropy_of_cosines() -> None:
    head = make_head(50, "softmax")
    features, labels = make_batch(50, 11)
    logits = head.scale * F.normalize(features) @ F.normalize(head.dense_weight().detach()).T
    assert abs(float(head(features, labels).detach() - F.cross_entropy(logits, labels, ignore_index=-1))) < 1e-12


@pytest.mark.parametrize("scale", [8.0, 100.0])
def test_large_scales_do_not_overflow(scale: float) -> None:
    """Above 72 the passes go by the largest logit."""
    head = make_head(40, "cosface", scale=scale, storage=torch.float32)
    features, labels = make_batch(40, 9)
    expected = compute_dense_loss(features, labels, head.dense_weight().detach().double(), head.margin, scale)
    assert abs(float(head(features.float(), labels).detach()) - float(expected)) < 1e-5 * float(expected)


@pytest.mark.parametrize("margin", MARGINS)
def test_gradcheck(margin: str) -> None:
    head = make_head(30, margin)
    features, labels = make_batch(30, 6)
    # One sample lies beyond pi - m from its class, where ArcFace goes on along a line.
    features[0] = -head.dense_weight().detach()[labels[0]] + 0.05 * features[0]
    assert torch.autograd.gradcheck(lambda x: head(x, labels), (features.requires_grad_(),))


@pytest.mark.parametrize("margin", ["cosface", "arcface", "sphereface"])
def test_cosines_of_one_give_finite_gradients(margin: str) -> None:
    head = make_head(10, margin)
    weight = head.dense_weight().detach()
    features = torch.stack([weight[3] * 5, -weight[4]]).requires_grad_()
    head(features, torch.tensor([3, 4])).backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(head.rows.grad).all()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "margin", [Margin(m2=0.5), Margin(m3=0.35), Margin(m1=1.35, m2=0.1, m3=0.05), Margin(m2=0.3, m3=0.2)]
)
def test_margins_fall_with_the_angle_and_their_slope_is_the_difference_quotient(margin: Margin) -> None:
    t = torch.linspace(-0.999, 0.999, 4001, dtype=torch.float64)
    phi, slope = margin.apply(t)
    assert (phi.diff() > -1e-3 * (margin.m2 > 0)).all()  # ArcFace jumps by a little at pi - m
    h = 1e-6
    quotient = (margin.apply(t + h)[0] - margin.apply(t - h)[0]) / (2 * h)
    near = (quotient - slope).abs() < 1e-4 * slope.abs().clamp_min(1)
    assert near.double().mean() > 0.998
    assert (phi <= t + 1e-12).all()


def test_without_the_exact_gradient_the_slope_is_one() -> None:
    phi, slope = margin_from("arcface", exact_gradient=False).apply(torch.tensor([0.3], dtype=torch.float64))
    assert float(slope) == 1
    assert abs(float(phi) - math.cos(math.acos(0.3) + 0.5)) < 1e-12


def oracle(rule: RowRule, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if isinstance(rule, SGD):
        return torch.optim.SGD(parameters, lr=rule.lr, weight_decay=rule.weight_decay)
    assert isinstance(rule, Momentum)
    return torch.optim.SGD(parameters, lr=rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay)


@pytest.mark.parametrize(
    "rule",
    [SGD(lr=0.3), SGD(lr=0.3, weight_decay=0.01), Momentum(lr=0.1), Momentum(lr=0.1, weight_decay=0.02)],
    ids=str,
)
def test_fused_steps_are_torchs_optimisers(rule: RowRule) -> None:
    head = make_head(61, rule=rule)
    weight = torch.nn.Parameter(head.dense_weight().clone())
    optimiser = oracle(rule, [weight])
    for step in range(4):
        features, labels = make_batch(61, 10, seed=step)
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        (1024 * head(ours, labels)).backward()  # loss scaling reaches features, not rows
        expected = compute_dense_loss(theirs, labels, weight, head.margin, head.scale)
        optimiser.zero_grad()
        expected.backward()
        optimiser.step()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad / 1024 - theirs.grad).abs().max() < 1e-10
        assert (head.dense_weight() - weight).abs().max() < 1e-10
    assert head.step == 4


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "rule", [SGD(lr=0.5), Momentum(lr=0.2), RowRMS(lr=0.01), SGD(lr=0.5, weight_decay=0.1)], ids=str
)
def test_low_precision_steps_follow_the_dense_layer(rule: RowRule, storage: torch.dtype) -> None:
    """The gradient is that of the stored rows; padding rows stay zero and touch nothing."""
    head = make_head(61, rule=rule, storage=storage)
    for step in range(4):
        features, labels = make_batch(61, 10, seed=step)
        weight = head.dense_weight().double().requires_grad_()
        ours, theirs = features.float().requires_grad_(), features.clone().requires_grad_()
        loss, expected = head(ours, labels), compute_dense_loss(theirs, labels, weight, head.margin, head.scale)
        loss.backward()
        expected.backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert weight.grad is not None
        assert abs(float(loss.detach()) - float(expected.detach())) < 1e-4
        assert (ours.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max()
        moved = head.dense_weight().double() - weight.detach()
        if isinstance(rule, SGD):
            wanted = -rule.lr * (weight.grad + rule.weight_decay * weight.detach())
            digits = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}[storage]
            assert ((moved - wanted).abs() <= digits * (weight.detach().abs() + moved.abs()) + 1e-6).all()
        for tablet, rows in head.own_rows():
            assert not rows[tablet.rows :].any()


def test_row_rms_keeps_one_number_a_row() -> None:
    rule = RowRMS(lr=0.01, decay=0.9)
    head = make_head(20, rule=rule)
    weight = head.dense_weight().clone()
    second = torch.zeros(20, 1, dtype=torch.float64)
    for step in range(3):
        features, labels = make_batch(20, 10, seed=step)
        copy = weight.clone().requires_grad_()
        compute_dense_loss(features, labels, copy, head.margin, head.scale).backward()
        assert copy.grad is not None
        square = copy.grad.square().mean(dim=1, keepdim=True)
        second = square if step == 0 else 0.9 * second + 0.1 * square
        weight = weight - 0.01 * copy.grad / (second.sqrt() + rule.eps)
        head(features.requires_grad_(), labels).backward()
        assert (head.dense_weight() - weight).abs().max() < 1e-10
    assert head.state.shape == (24, 1)


@pytest.mark.parametrize("rule", [SGD(lr=0.5), Momentum(lr=0.2), RowRMS(lr=0.01)], ids=str)
def test_threads_do_not_change_a_bit(rule: RowRule) -> None:
    found: list[tuple[float, Tensor, Tensor]] = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 20):
        torch.set_num_threads(count)
        try:
            head = make_head(101, rule=rule, storage=torch.float16)
            features, labels = make_batch(101, 13)
            features = features.float().requires_grad_()
            loss = head(features, labels)
            loss.backward()
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        assert features.grad is not None
        found.append((float(loss.detach()), features.grad, head.rows))
    for loss, gradient, rows in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(gradient, found[0][1])
        assert torch.equal(rows, found[0][2])


def test_an_error_in_one_thread_stops_all_and_is_raised() -> None:
    seen: list[int] = []

    def work(name: str, item: int) -> int:
        seen.append(item)
        if item == 3:
            raise HeadError(f"{name} fails")
        return item * item

    threads = torch.get_num_threads()
    with pytest.raises(HeadError, match="fails"):
        run_tablets(work, list(range(1000)), ["a", "b"])
    assert len(seen) < 1000
    assert torch.get_num_threads() == threads
    assert run_tablets(work, [5, 6, 7], ["a", "b"]) == [25, 36, 49]
    assert run_tablets(work, [], ["a"]) == []


def test_an_interruption_does_not_wait_for_all_tablets() -> None:
    """It comes to the main thread, which waits for the others."""
    done: list[int] = []

    def work(_: str, item: int) -> None:
        if item == 10:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append(item)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tablets(work, list(range(1000)), ["a", "b"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert 10 <= len(done) < 500


def test_rows_learn_from_a_frozen_backbone_too() -> None:
    head = make_head(33, rule=SGD(lr=1.0))
    before = head.dense_weight().clone()
    head(*make_batch(33, 5)).backward()
    assert head.step == 1
    assert not torch.equal(head.dense_weight(), before)


def test_no_gradient_means_no_update() -> None:
    head = make_head(33, rule=SGD(lr=1.0))
    before = head.dense_weight().clone()
    features, labels = make_batch(33, 5)
    with torch.no_grad():
        loss = head(features, labels)
    assert torch.isfinite(loss)
    assert torch.equal(head.dense_weight(), before)
    assert head.step == 0


@pytest.mark.parametrize("where", ["features", "rows"])
def test_what_is_not_finite_moves_nothing(where: str) -> None:
    head = make_head(33, rule=SGD(lr=1.0))
    features, labels = make_batch(33, 5)
    if where == "features":
        features[3, 2] = torch.nan
    else:
        head.rows[7] = torch.inf
    before = head.rows.clone()
    features.requires_grad_()
    head(features, labels).backward()
    assert head.skipped
    assert head.step == 0
    assert torch.equal(head.rows, before)
    assert features.grad is not None
    assert not features.grad.any()
    good, labels = make_batch(33, 5, seed=1)
    if where == "features":
        head(good.requires_grad_(), labels).backward()
        assert not head.skipped
        assert head.step == 1


def test_only_padding_is_no_loss() -> None:
    head = make_head(33, rule=SGD(lr=1.0))
    features = torch.randn(3, DIM, dtype=torch.float64, requires_grad=True)
    before = head.rows.clone()
    loss = head(features, torch.tensor([-1, -1, -1]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(head.rows, before)


def test_a_second_backward_is_refused_with_the_remedy() -> None:
    head = make_head(33, rule=SGD(lr=1.0))
    features, labels = make_batch(33, 5)
    loss = head(features.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(HeadError, match="collect the features of the micro-batches"):
        loss.backward()


def test_wrong_use_is_refused_in_one_line() -> None:
    head = make_head(33)
    features, labels = make_batch(33, 5)
    for bad_features, bad_labels, words in (
        (features[:, :3], labels, r"features must be \(samples, 16\)"),
        (features, labels[:2], r"labels \(samples,\)"),
        (features, labels.double(), "whole numbers"),
        (features, labels.clamp_min(0) + 40, r"labels must be -1 or in 0 \.\.\. 32"),
    ):
        with pytest.raises(HeadError, match=words):
            head(bad_features, bad_labels)
    for build, words in (
        (lambda: ShardedMarginHead(10, 4), "need a rule"),
        (lambda: ShardedMarginHead(10, 0, storage=torch.float32), "dim must be >= 1"),
        (lambda: ShardedMarginHead(0, 4, storage=torch.float32), "at least 1 class"),
        (lambda: ShardedMarginHead(10, 4, storage=torch.int8), "storage must be one of"),
        (lambda: ShardedMarginHead(10, 4, margin="magface", storage=torch.float32), "margin must be one of"),
        (lambda: Margin(m2=-0.5), "margins must be"),
        (lambda: SGD(lr=-1), "lr and weight_decay"),
        (lambda: Momentum(lr=1, momentum=1.0), "momentum must be"),
    ):
        with pytest.raises(HeadError, match=words):
            build()
