"""Sampled steps: against the dense layer of the same classes, which rows they touch, what they expect on average."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.head_plan import plan_head
from outsize.models.faceid.layer.margin_softmax import FirstPass
from outsize.models.faceid.layer.reference import compute_dense_loss
from outsize.models.faceid.layer.row_rules import SGD, Momentum, RowRMS, RowRule
from outsize.models.faceid.layer.sampling import DENOMINATORS, Sampling
from outsize.models.faceid.layer.tablets import TabletLayout
from torch import Tensor

DIM, CLASSES, TABLET, STRIP = 12, 141, 32, 4
"""Four tablets of eight strips, and one of 13 rows, whose last strip has one."""
RULES = [SGD(lr=0.5), SGD(lr=0.5, weight_decay=0.01), Momentum(lr=0.2), RowRMS(lr=0.01)]


def make_head(rule: RowRule | None = None, sample: float = 0.25, **options: object) -> ShardedMarginHead:
    given = {"storage": torch.float64, "scale": 8.0, "block_rows": 8, "tablet_rows": TABLET, "strip_rows": STRIP}
    return ShardedMarginHead(CLASSES, DIM, rule=rule, sample=sample, **{**given, **options})  # pyright: ignore[reportArgumentType]


def make_batch(samples: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn((samples, DIM), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    if samples > 3:
        labels[1], labels[2], labels[3] = labels[0], -1, labels[0] ^ 1  # repeated, padding, two of one strip
    return features, labels


def weigh_by_hand(touched: Tensor, labels: Tensor, denominator: str) -> Tensor:
    """(classes,): the weight of each class, from which rows a step touched; 0 of those that it did not.

    Asserts that these are the batch's own classes, and of each tablet a quarter of its strips, whole.
    """
    own = torch.zeros(CLASSES, dtype=torch.bool)
    own[labels[labels >= 0]] = True
    assert touched[own].all()
    weights = own.double()
    for first in range(0, CLASSES, TABLET):
        strips = [
            range(s, min(s + STRIP, first + TABLET, CLASSES)) for s in range(first, min(first + TABLET, CLASSES), STRIP)
        ]
        # A strip of own classes alone may have been drawn or not; none of these batches has one.
        others = [[row for row in strip if not own[row]] for strip in strips]
        assert all(others)
        drawn = [rows for rows in others if touched[rows].all()]
        assert len(drawn) == max(1, round(0.25 * len(strips)))
        assert not any(touched[rows].any() for rows in others if rows not in drawn)
        for rows in drawn:
            weights[rows] = len(strips) / len(drawn) if denominator == "corrected" else 1.0
    return weights


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize(
    ("margin", "keep", "scale"), [("softmax", False, 8.0), ("cosface", True, 100.0), ("arcface", False, 16.0)]
)
def test_loss_and_gradients_are_the_dense_layers_of_the_same_rows(
    denominator: str, margin: str, keep: bool, scale: float
) -> None:
    head = make_head(denominator=denominator, margin=margin, keep_cosines=keep, scale=scale)
    seen: set[tuple[int, ...]] = set()
    for step in range(3):
        features, labels = make_batch(seed=step)
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        weight = head.dense_weight().detach().clone().requires_grad_()
        head.zero_grad()
        loss = head(ours, labels)
        (3 * loss).backward()
        assert isinstance(head.rows, torch.nn.Parameter)
        assert head.rows.grad is not None
        gradient = torch.cat([head.rows.grad[s : s + t.rows] for t, s in zip(head.tablets, head.starts(), strict=True)])
        touched = gradient.any(dim=1)
        seen.add(tuple(touched.tolist()))
        weights = weigh_by_hand(touched, labels, denominator)
        expected = compute_dense_loss(theirs, labels, weight, head.margin, scale, weights)
        (3 * expected).backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert weight.grad is not None
        assert abs(float((loss - expected).detach())) < 1e-10
        assert (ours.grad - theirs.grad).abs().max() < 1e-10
        assert (gradient - weight.grad).abs().max() < 1e-10
        full = compute_dense_loss(features, labels, weight.detach(), head.margin, scale)
        assert abs(float(head.full_loss(features, labels) - full)) < 1e-10
        assert abs(float(loss.detach() - full)) > 1e-6
    assert len(seen) == 3


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("storage", [torch.float16, torch.float64])
def test_what_is_not_seen_keeps_its_bits_and_the_rest_moves_as_the_dense_layer(
    rule: RowRule, storage: torch.dtype
) -> None:
    head = make_head(rule, storage=storage)
    features, labels = make_batch()
    for _ in range(4):  # state is not zero then
        head(features.clone().requires_grad_(), labels).backward()
    probe = make_head(None, storage=torch.float64)
    probe.rows.data.copy_(head.rows)
    probe.step = head.step
    probe(features, labels).backward()
    assert probe.rows.grad is not None
    touched = probe.rows.grad.any(dim=1)
    weigh_by_hand(
        torch.cat([touched[s : s + t.rows] for t, s in zip(head.tablets, head.starts(), strict=True)]), labels, "pfc"
    )
    rows, state = head.rows.clone(), head.state.clone()
    head(features.clone().requires_grad_(), labels).backward()
    assert torch.equal(head.rows[~touched], rows[~touched])
    assert torch.equal(head.state[~touched], state[~touched])
    assert (head.rows[touched] != rows[touched]).any(dim=1).all()
    if storage == torch.float64:
        wide, moments = rows[touched].clone(), state[touched].clone()
        rule.update(wide, probe.rows.grad[touched], moments)
        assert (head.rows[touched] - wide).abs().max() < 1e-10
        assert (head.state[touched] - moments).abs().max() < 1e-10 if moments.numel() else True


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_when_everything_is_drawn_the_bits_are_the_full_layers(rule: RowRule) -> None:
    """0.97 of eight strips is eight; tablets of whole blocks, since the last block is padded where all is seen."""
    found = []
    for sample in (1.0, 0.97):
        head = ShardedMarginHead(
            4 * TABLET, DIM, rule=rule, sample=sample, block_rows=8, tablet_rows=TABLET, strip_rows=STRIP, scale=16.0
        )
        for step in range(3):
            features, labels = make_batch(seed=step)
            features = features.float().requires_grad_()
            loss = head(features, labels.clamp_max(4 * TABLET - 1))
            loss.backward()
            assert features.grad is not None
            found.append((float(loss.detach()), features.grad, head.rows.clone(), head.state.clone()))
    for full, sampled in zip(found[:3], found[3:], strict=True):
        assert full[0] == sampled[0]
        assert all(torch.equal(a, b) for a, b in zip(full[1:], sampled[1:], strict=True))


@pytest.mark.system
def test_the_corrected_sum_of_exponentials_is_right_on_average_and_that_of_pfc_is_not() -> None:
    """Five standard errors, which are known: strips are drawn without replacement. The seed is fixed."""
    head, (features, labels) = make_head(None, margin="cosface", scale=4.0), make_batch()
    times, valid = 1500, labels >= 0
    exact = FirstPass(head, features, labels).normaliser.exp()
    own = labels[valid].unique()
    cosines = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(head.dense_weight().detach()).T
    terms = (4 * cosines).exp()
    terms[:, own] = 0
    variance, expected_pfc = torch.zeros(len(labels), dtype=torch.float64), exact - terms.sum(dim=1)
    for part in terms.split(TABLET, dim=1):
        strips = torch.stack([strip.sum(dim=1) for strip in part.split(STRIP, dim=1)])
        count = len(strips)
        drawn = max(1, round(0.25 * count))
        variance += count**2 * (1 - drawn / count) * strips.var(dim=0) / drawn
        expected_pfc += strips.sum(dim=0) * drawn / count
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for denominator, expected in (("corrected", exact), ("pfc", expected_pfc)):
            sampling = Sampling(share=0.25, denominator=denominator, strip_rows=STRIP)
            sums = []
            for head.step in range(times):
                sums.append(FirstPass(head, features, labels, sampling=sampling).normaliser.exp())
            drawn_sums = torch.stack(sums)[:, valid]
            spread = variance[valid] if denominator == "corrected" else drawn_sums.var(dim=0)
            bound = 5 * (spread / times).sqrt()
            assert ((drawn_sums.mean(dim=0) - expected[valid]).abs() < bound).all()
            if denominator == "corrected":
                assert ((drawn_sums.var(dim=0) / spread - 1).abs() < 0.2).all()
                # What own classes with the others' weight would add is more than that.
                assert (3 * (exact - terms.sum(dim=1))[valid] > 2 * bound).all()
            else:
                assert ((expected_pfc - exact).abs()[valid] > 10 * bound).all()
    finally:
        torch.set_num_threads(threads)


def test_strips_are_drawn_evenly_and_anew_for_each_step_tablet_and_seed() -> None:
    layout = TabletLayout(classes=10 * 1024, tablet_rows=1024, block_rows=1024)
    sampling, nobody = Sampling(share=0.1), np.zeros(0, dtype=np.int64)
    counts, sets = np.zeros(32), set()
    for step in range(300):
        for index in range(10):
            drawn = sampling.draw(layout.tablet(index), nobody, seed=step % 3 - 1, step=step)
            chosen = drawn.places[::32] // 32
            assert np.array_equal(drawn.places, (chosen[:, None] * 32 + np.arange(32)).ravel())
            assert (drawn.weights == 32 / 3).all()
            sets.add(tuple(chosen))
            counts[chosen] += 1
    assert len(sets) > 2000  # of 4,960 sets in 3,000 draws, 2,250 are expected
    assert np.abs(counts - 3000 * 3 / 32).max() < 5 * math.sqrt(3000 * 3 / 32)


@pytest.mark.parametrize("rule", [SGD(lr=0.5), Momentum(lr=0.2), RowRMS(lr=0.01)], ids=str)
def test_threads_do_not_change_a_bit(rule: RowRule) -> None:
    found: list[list[Tensor]] = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            head = make_head(rule, storage=torch.float16)
            results: list[Tensor] = []
            for step in range(2):
                features, labels = make_batch(seed=step)
                features = features.float().requires_grad_()
                loss = head(features, labels)
                loss.backward()
                assert features.grad is not None
                results += [loss.detach(), features.grad]
        finally:
            torch.set_num_threads(threads)
        found.append([*results, head.rows, head.state])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_a_step_without_gradient_or_over_all_classes_is_not_counted() -> None:
    head = make_head(SGD(lr=1.0))
    features, labels = make_batch()
    before = head.rows.clone()
    with torch.no_grad():
        sampled = head(features, labels)
    full = head.full_loss(features.requires_grad_(), labels)
    assert not full.requires_grad
    assert head.step == 0
    assert torch.equal(head.rows, before)
    loss = head(features, labels)  # the rows that were seen without gradient too
    assert float(loss.detach()) == float(sampled)
    loss.backward()
    assert head.step == 1
    with pytest.raises(HeadError, match="features must be"):
        head.full_loss(features[:, :3], labels)


def test_the_plan_falls_with_the_sample() -> None:
    full, tenth = (plan_head(1_000_000, 512, batch=64, rule=RowRMS(lr=1), sample=sample) for sample in (1.0, 0.1))
    assert full.seen == 1_000_000
    assert abs(tenth.seen - 100_064) < 1000
    assert tenth.flops == 8 * 64 * tenth.seen * 512
    assert (tenth.rows_bytes, tenth.state_bytes) == (full.rows_bytes, full.state_bytes)
    assert abs(tenth.buffer_bytes - full.buffer_bytes) < 10_000_000
    assert f"{tenth.seen:,} classes a step" in tenth.explain()


def test_wrong_use_is_refused_in_one_line() -> None:
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(HeadError, match="sample must be above 0 and at most 1"):
            make_head(sample=share)
    with pytest.raises(HeadError, match="denominator must be one of corrected, pfc, got 'full'"):
        make_head(denominator="full")
    with pytest.raises(HeadError, match="strip_rows must be >= 1, got 0"):
        make_head(strip_rows=0)
