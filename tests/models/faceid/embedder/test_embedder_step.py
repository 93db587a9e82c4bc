"""A step of the embedder: the dense layer's gradient, the same bits for any threads, what is not finite left out."""

from __future__ import annotations

import pytest
import torch
from outsize.models.faceid.base.collectives import Ranks
from outsize.models.faceid.embedder.feature_norm import normalise_batch
from outsize.models.faceid.embedder.network import SmallEmbedder
from outsize.models.faceid.embedder.step import MicroBatchSum, StepResult, compute_full_loss, compute_step
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.reference import compute_dense_loss
from outsize.models.faceid.layer.row_rules import SGD
from outsize.models.faceid.pictures.batch_loader import MicroBatch
from torch import Tensor

CLASSES, DIM = 21, 8


def make(labels: list[list[int]]) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(5)
    return [
        MicroBatch(
            images=torch.randint(0, 256, (len(part), 16, 16, 3), generator=generator, dtype=torch.uint8),
            labels=torch.tensor(part),
            failed=[],
        )
        for part in labels
    ]


BATCHES = make([[3, 20, 0], [7, -1, 3], [11, 2]])


def run(threads: int, precision: torch.dtype = torch.float32) -> tuple[StepResult, list[Tensor], Tensor]:
    torch.manual_seed(2)
    model = SmallEmbedder(DIM, width=8).train()
    head = ShardedMarginHead(
        CLASSES, DIM, scale=8, rule=SGD(lr=1.0), tablet_rows=8, block_rows=8, storage=torch.float32
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = compute_step(
            model, model.feature_norm, head, BATCHES, micro_batches=3, mean=127.5, scale=127.5, precision=precision
        )
    finally:
        torch.set_num_threads(before)
    return result, [p.grad.clone() for p in model.parameters() if p.grad is not None], head.dense_weight()


def test_gradients_are_those_of_the_dense_layer_in_float64() -> None:
    result, gradients, _ = run(1)
    torch.manual_seed(2)
    model = SmallEmbedder(DIM, width=8).double()
    model.load_state_dict({k: v.double() for k, v in _first_weights().items()})
    head = ShardedMarginHead(
        CLASSES, DIM, scale=8, rule=SGD(lr=1.0), tablet_rows=8, block_rows=8, storage=torch.float32
    )
    images = torch.cat([batch.images for batch in BATCHES]).permute(0, 3, 1, 2).double()
    labels = torch.cat([batch.labels for batch in BATCHES])
    features = model.train()((images - 127.5) / 127.5)[labels >= 0]
    features = torch.nn.functional.batch_norm(features, None, None, training=True, eps=1e-5)
    loss = compute_dense_loss(features, labels[labels >= 0], head.dense_weight().double(), head.margin, 8.0)
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert (result.samples, result.is_finite) == (7, True)
    assert len(gradients) == len(list(model.parameters()))
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert (found.double() - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-9


def _first_weights() -> dict[str, Tensor]:
    return _make_model().state_dict()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_and_rows_have_the_same_bits_for_any_threads(precision: torch.dtype) -> None:
    one, many = run(1, precision), run(3, precision)
    assert one[0] == many[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], many[1], strict=True))
    assert torch.equal(one[2], many[2])
    if precision == torch.bfloat16:
        exact = run(1)[1]
        error = [float((a - b).norm() / b.norm()) for a, b in zip(one[1], exact, strict=True)]
        assert 1e-4 < max(error) < 0.3


def test_the_full_loss_of_a_sampled_layer_is_the_dense_layer_s_and_moves_nothing() -> None:
    model = _make_model()
    model.feature_norm.mean.normal_()
    model.feature_norm.variance.uniform_(0.5, 2)
    head = ShardedMarginHead(CLASSES, DIM, scale=8, rule=SGD(lr=1.0), sample=0.1, tablet_rows=8, block_rows=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = head.dense_weight().clone()
    found = []
    for threads in (1, 3):
        kept = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(compute_full_loss(model.eval(), head, BATCHES, mean=127.5, scale=127.5))
        finally:
            torch.set_num_threads(kept)
    assert found[0] == found[1]
    assert head.step == 0
    assert torch.equal(head.dense_weight(), rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images = torch.cat([batch.images for batch in BATCHES]).permute(0, 3, 1, 2).double()
    labels = torch.cat([batch.labels for batch in BATCHES])
    with torch.no_grad():
        features = model.double()((images - 127.5) / 127.5)[labels >= 0]
        expected = compute_dense_loss(features, labels[labels >= 0], rows.double(), head.margin, 8.0)
    assert found[0] == pytest.approx(float(expected), rel=1e-5)
    nobody = make([[-1, -1], [-1]])
    assert compute_full_loss(model.float(), head, nobody, mean=127.5, scale=127.5) is None
    head.rows[0] = torch.nan
    assert compute_full_loss(model, head, BATCHES, mean=127.5, scale=127.5) is None


def test_features_are_normalised_by_the_batch_and_later_by_what_was_seen() -> None:
    model = _make_model()
    features = torch.randn((9, DIM), generator=torch.Generator().manual_seed(1)) * 3 + 5
    labels = torch.tensor([0, 1, -1, 2, 3, 4, 5, 6, 7])
    found = normalise_batch(model.feature_norm, features, labels, Ranks.of(None))
    assert found is not None
    known = found.features[labels >= 0].double()
    assert known.mean(dim=0).abs().max() < 1e-6
    assert (known.var(dim=0, unbiased=False) - 1).abs().max() < 1e-4
    assert torch.allclose(model.eval().feature_norm(features), found.features, atol=1e-5)  # of the first batch alone
    assert torch.equal(model.train().feature_norm(features), features)
    normalise_batch(model.feature_norm, features + 1, labels, Ranks.of(None))
    assert torch.allclose(model.feature_norm.mean, features[labels >= 0].mean(dim=0) + 0.5, atol=1e-5)
    assert normalise_batch(model.feature_norm, features, torch.full((9,), -1), Ranks.of(None)) is None
    features[0, 0] = torch.nan
    assert normalise_batch(model.feature_norm, features, labels, Ranks.of(None)) is None


def _make_model() -> SmallEmbedder:
    torch.manual_seed(2)
    return SmallEmbedder(DIM, width=8)


def test_a_sum_does_not_depend_on_the_order_of_its_parts() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1000, generator=generator) * 10.0**-power for power in range(7)]
    found: list[Tensor] = []
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        total = MicroBatchSum([parameter], len(parts))
        for part in order:
            total.add([part])
        assert total.finish(Ranks.of(None))
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    exact = torch.stack(parts).double().sum(dim=0)
    assert torch.equal(found[0], exact.float())  # rounded once


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 9000.0])
def test_what_is_not_finite_moves_nothing(bad: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    total = MicroBatchSum([parameter], 2)
    total.add([torch.ones(3)])
    total.add([torch.tensor([0.0, bad, 0.0])])
    assert not total.finish(Ranks.of(None))
    assert parameter.grad is None
