"""The layer used in ways that its examples do not show: forwards before backwards, padding, twins, types, threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from outsize.models.faceid.base.collectives import Ranks
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.layer import margin_softmax
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.reference import compute_dense_loss
from outsize.models.faceid.layer.row_rules import SGD, Momentum, RowRMS, RowRule
from torch import Tensor

DIM, CLASSES = 8, 61


def make_head(rule: RowRule | None = None, **options: object) -> ShardedMarginHead:
    given = {"storage": torch.float64, "tablet_rows": 24, "block_rows": 8, "scale": 16.0, **options}
    return ShardedMarginHead(CLASSES, DIM, rule=rule, **given)  # pyright: ignore[reportArgumentType]


def make_batch(seed: int, samples: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn((samples, DIM), generator=generator, dtype=torch.float64)
    return features.requires_grad_(), torch.randint(0, CLASSES, (samples,), generator=generator)


def dense_gradients(head: ShardedMarginHead, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the features and of the rows."""
    x, weight = features.detach().double().requires_grad_(), head.dense_weight().detach().double().requires_grad_()
    compute_dense_loss(x, labels, weight, head.margin, head.scale).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return x.grad, weight.grad


@pytest.mark.parametrize("rule", [None, SGD(lr=0.1), Momentum(lr=0.1), RowRMS(lr=0.1)], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e300])
def test_padding_enters_nothing_whatever_it_holds(rule: RowRule | None, poison: float) -> None:
    """Loss, gradients and rows have the bits of a batch whose padding is zeros."""
    found = []
    for value in (0.0, poison):
        head = make_head(copy.deepcopy(rule))
        features, labels = make_batch(0)
        features = torch.cat(
            [features.detach()[:3], torch.full((2, DIM), value, dtype=torch.float64), features.detach()[3:]]
        )
        labels = torch.cat([labels[:3], torch.tensor([-1, -1]), labels[3:]])
        features.requires_grad_()
        loss = head(features, labels)
        loss.backward()
        assert features.grad is not None
        assert not features.grad[3:5].any()
        rows = head.rows.grad if rule is None else head.rows
        assert rows is not None
        found.append((loss.detach(), features.grad, rows.detach()))
        assert not head.skipped
        assert head.full_loss(features, labels).isfinite()
    for zeros, other in zip(*found, strict=True):
        assert torch.equal(zeros, other)


@pytest.mark.parametrize("order", ["sum", "first", "second", "grad"])
@pytest.mark.parametrize("rule", [SGD(lr=0.1), Momentum(lr=0.1), RowRMS(lr=0.1)], ids=str)
def test_forwards_before_a_backward_are_right_or_refused(rule: RowRule, order: str) -> None:
    """Gradients of the features and the move of the rows are the dense layer's, or nothing moves."""
    head = make_head(copy.deepcopy(rule))
    one, two = make_batch(1), make_batch(2)
    before = head.rows.clone()
    losses = [head(*one), head(*two)]
    with torch.no_grad():
        head(*make_batch(3))
    if order in ("sum", "grad"):
        both = losses[0] + losses[1]
        call = both.backward if order == "sum" else partial(torch.autograd.grad, both, [one[0], two[0]])
        with pytest.raises(HeadError, match=r"two forwards of one head meet .* head\(torch.cat\(\[a, b\]\)"):
            call()
        assert torch.equal(head.rows, before)
        assert head.step == 0
        return
    first, second = (0, 1) if order == "first" else (1, 0)
    batches = (one, two)
    wanted, weight = dense_gradients(head, *batches[first])
    losses[first].backward()
    gradient = batches[first][0].grad
    assert gradient is not None
    assert (gradient - wanted).abs().max() < 1e-10
    if not isinstance(rule, RowRMS):
        moved = torch.cat([rows[: tablet.rows] for tablet, rows in head.own_rows()])
        start = torch.cat([before[s : s + t.rows] for t, s in zip(head.tablets, head.starts(), strict=True)])
        assert (moved - (start - 0.1 * weight)).abs().max() < 1e-10
    after = head.rows.clone()
    with pytest.raises(HeadError, match="the rows have moved since this forward"):
        losses[second].backward()
    assert torch.equal(head.rows, after)
    assert head.step == 1
    # A forward of the rows as they are now is right again.
    fresh, labels = make_batch(4)
    wanted, _ = dense_gradients(head, fresh, labels)
    head(fresh, labels).backward()
    assert fresh.grad is not None
    assert (fresh.grad - wanted).abs().max() < 1e-10


def test_without_torchs_word_the_second_of_two_forwards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(margin_softmax, "_comes_too", lambda _: False)
    head = make_head(SGD(lr=0.1))
    with pytest.raises(HeadError, match="the rows have moved since this forward"):
        (head(*make_batch(1)) + head(*make_batch(2))).backward()
    assert head.step == 1


@pytest.mark.parametrize("sample", [1.0, 0.5])
@pytest.mark.parametrize("keep", [False, True])
def test_rows_that_are_a_parameter_take_any_number_of_forwards(sample: float, keep: bool) -> None:
    """Several forwards of one graph add up; their gradients are those of one after the other."""
    head, apart = (make_head(sample=sample, strip_rows=4, keep_cosines=keep, seed=3) for _ in range(2))
    one, two = make_batch(1), make_batch(2)
    (head(*one) + 3 * head(*two)).backward()
    expected = []
    for factor, (features, labels) in ((1, one), (3, two)):
        apart.step = 0  # which the drawing of both goes by
        x = features.detach().clone().requires_grad_()
        (factor * apart(x, labels)).backward()
        expected.append(x.grad)
    for (features, _), gradient in zip((one, two), expected, strict=True):
        assert features.grad is not None
        assert torch.equal(features.grad, gradient)
    assert head.rows.grad is not None
    assert apart.rows.grad is not None
    assert (head.rows.grad - apart.rows.grad).abs().max() < 1e-12


@pytest.mark.parametrize("change", ["optimiser", "in place", "load", "copy"])
def test_rows_that_others_change_are_noticed(change: str) -> None:
    head = make_head()
    head(*make_batch(0)).backward()
    loss = head(*make_batch(1))
    if change == "optimiser":
        torch.optim.SGD(head.parameters(), lr=0.1).step()
    elif change == "in place":
        with torch.no_grad():
            head.rows[3] += 1
    elif change == "load":
        head.load_state_dict(make_head(seed=1).state_dict())
    else:
        other = copy.deepcopy(head)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        loss.backward()  # a copy's rows are its own
        return
    with pytest.raises(HeadError, match="the rows have moved since this forward"):
        loss.backward()


def test_skipped_is_that_of_the_last_backward() -> None:
    head = make_head(SGD(lr=0.1))
    features, labels = make_batch(0)
    bad = features.detach().clone()
    bad[0, 0] = torch.nan
    before = head.rows.clone()
    poisoned, good = head(bad.requires_grad_(), labels), head(features, labels)
    with torch.no_grad():
        head(*make_batch(1))
    poisoned.backward()
    assert head.skipped
    assert torch.equal(head.rows, before)
    with torch.no_grad():
        head(*make_batch(1))
    assert head.skipped
    good.backward()  # the rows have not moved since
    assert not head.skipped
    assert not torch.equal(head.rows, before)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_gradient_that_comes_in_not_finite_moves_nothing(factor: float) -> None:
    head = make_head(SGD(lr=0.1))
    before = head.rows.clone()
    (factor * head(*make_batch(0))).backward()
    assert head.skipped
    assert torch.equal(head.rows, before)


@pytest.mark.parametrize("storage", [torch.float16, torch.float32, torch.float64])
def test_what_has_no_direction_is_left_where_it_is(storage: torch.dtype) -> None:
    """Zero features and zero rows: cosine 0 with everything, no gradient; the others' are the dense layer's."""
    head = make_head(SGD(lr=1.0), storage=storage)
    features, labels = make_batch(0)
    features = features.detach().clone()
    features[1] = 0
    features[2] = 1e-20
    head.rows[int(labels[4])] = 0
    head.rows[50] = 0
    features.requires_grad_()
    wanted, _ = dense_gradients(head, features, labels)
    loss = head(features, labels)
    expected = compute_dense_loss(features, labels, head.dense_weight().double(), head.margin, head.scale)
    assert float((loss - expected).detach()) == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert features.grad is not None
    assert not features.grad[1:3].any()
    assert (features.grad - wanted).abs().max() < 1e-5
    assert head.rows.isfinite().all()
    starts = dict(zip((tablet.first for tablet in head.tablets), head.starts(), strict=True))
    assert starts[0] == 0
    assert not head.rows[50].any()


def test_features_of_any_length_have_the_loss_of_their_direction() -> None:
    head = make_head(scale=64.0)
    features, labels = make_batch(0)
    expected = float(head(features, labels).detach())
    for factor in (1e-9, 1e9, 1e150, 1e200):
        x = (features.detach() * factor).requires_grad_()
        loss = head(x, labels)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
        loss.backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_rows_too_long_to_be_squared_are_no_silent_zero() -> None:
    head = make_head(SGD(lr=0.1), storage=torch.float32)
    head.rows[3] = 1e30
    loss = head(*make_batch(0))
    assert loss.isnan()
    loss.backward()
    assert head.skipped


def adversarial(head: ShardedMarginHead, generator: torch.Generator, samples: int) -> tuple[Tensor, Tensor]:
    """Features that are rows, opposites of rows, copies of each other, zeros, of any length; labels of any."""
    rows = head.dense_weight().float()
    labels = torch.randint(-1, len(rows), (samples,), generator=generator)
    picked = rows[torch.randint(0, len(rows), (samples,), generator=generator)]
    own = rows[labels.clamp_min(0)]
    choices = torch.stack(
        (picked, -picked, own, -own, torch.randn(own.shape, generator=generator), 0 * own, own[:1].expand_as(own))
    )
    kind = torch.randint(0, len(choices), (samples,), generator=generator)
    length = 10.0 ** torch.randint(-14, 15, (samples, 1), generator=generator)
    return choices[kind, torch.arange(samples)] * length, labels


@pytest.mark.parametrize(
    ("rule", "storage"),
    [
        (RowRMS(lr=0.1), torch.float16),
        (RowRMS(lr=1e4, decay=0.999), torch.bfloat16),
        (RowRMS(lr=1e4), torch.float16),
        (RowRMS(lr=0.1, decay=0.0), torch.float32),
        (RowRMS(lr=1, weight_decay=1e-3), torch.float16),
    ],
)
def test_row_rms_never_makes_a_row_that_is_not_finite(rule: RowRMS, storage: torch.dtype) -> None:
    """10,000 moves of rows among twins, opposites, zeros and rows far too short, in 17 steps of 600 rows."""
    generator = torch.Generator().manual_seed(5)
    head = ShardedMarginHead(600, 6, rule=copy.deepcopy(rule), storage=storage, tablet_rows=600, block_rows=600)
    for step in range(17):
        if step % 5 == 0:
            half = len(head.rows) // 8
            head.rows[half : 2 * half] = head.rows[:half]
            head.rows[2 * half : 3 * half] = -head.rows[:half]
            head.rows[3 * half : 4 * half] *= 1e-4
            head.rows[4 * half] = 0
        features, labels = adversarial(head, generator, 40)
        features.requires_grad_()
        head(features, labels).backward()
        assert not head.skipped
        assert head.rows.isfinite().all()
        assert head.state.isfinite().all()
        assert features.grad is not None
        assert features.grad.isfinite().all()


def test_row_rms_moves_a_twin_no_further_than_any_row() -> None:
    """One person under two labels: the squared gradient is the difference of two equal numbers."""
    for weight_decay in (0.0, 1e-12):  # the second makes the gradient itself
        head = ShardedMarginHead(
            300, 512, rule=RowRMS(lr=0.1, weight_decay=weight_decay), tablet_rows=512, block_rows=256
        )
        rows = torch.nn.functional.normalize(torch.randn(300, 512))
        rows[150:175] = rows[:25]
        head.rows[:300] = rows.half()
        before = head.rows[:300].float()
        head(rows[:32].clone().requires_grad_(), torch.arange(32)).backward()
        assert (head.rows[:300].float() - before).norm(dim=1).max() < 1.01 * 0.1 * 512**0.5


def test_the_mean_square_is_that_of_the_gradient_where_terms_cancel() -> None:
    """RowRMS by products against RowRMS of the gradient itself, in float64: rows near their features, and opposites."""
    moved = []
    for rule in (RowRMS(lr=0.01), RowRMS(lr=0.01, weight_decay=1e-300)):
        head = make_head(rule, margin="cosface")
        x = head.dense_weight()[:6] * (1 + 1e-9 * torch.arange(DIM))
        x = torch.cat([x, -x, x[:1], -x[:1]])
        head(x.requires_grad_(), torch.arange(14)).backward()
        moved.append(head.dense_weight().clone())
    assert (moved[0] - moved[1]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [torch.int16, torch.uint8, torch.int32, torch.int8, torch.uint16, torch.uint32])
def test_labels_of_any_whole_type_are_taken(kind: torch.dtype) -> None:
    results = []
    for dtype in (torch.int64, kind):
        head = make_head(SGD(lr=0.1))
        features, labels = make_batch(0)
        loss = head(features, labels.to(dtype))
        loss.backward()
        results.append((loss.detach(), features.grad, head.rows.clone(), head.full_loss(features, labels.to(dtype))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_no_batch_is_refused_by_name() -> None:
    head = make_head(SGD(lr=0.1), storage=torch.float32)
    features, labels = make_batch(0)
    features = features.detach().float()
    for x, y, words in (
        (features, labels.bool(), "whole numbers, -1 for padding, got torch.bool"),
        (features, labels.float(), "whole numbers, -1 for padding, got torch.float32"),
        (features, labels.to(torch.complex64), "got torch.complex64"),
        (features, labels.to(torch.uint64), "got torch.uint64"),
        (features.long(), labels, "floating point, got torch.int64"),
        (features.to(torch.complex64), labels, "floating point, got torch.complex64"),
        (features.numpy(), labels, "must be tensors, got ndarray"),
        (features, labels.tolist(), "must be tensors, got Tensor and list"),
        (features.to("meta"), labels, "on one device, got meta, cpu and cpu"),
    ):
        for call in (head, head.full_loss):
            with pytest.raises(HeadError, match=words):
                call(x, y)
    for convert in (ShardedMarginHead.half, ShardedMarginHead.double):
        other = convert(copy.deepcopy(head))
        with pytest.raises(HeadError, match=r"must stay torch.float32 .* give storage="):
            other(features, labels)
    for broken in ({"scale": torch.inf}, {"margin": (torch.inf, 0.0, 0.0)}, {"margin": (1.0, 0.0, torch.inf)}):
        with pytest.raises(HeadError):
            make_head(**broken)
    for lr in (torch.inf, torch.nan):
        with pytest.raises(HeadError):
            SGD(lr=lr)


def test_precision_and_autocast_of_the_process_change_no_bit() -> None:
    def run() -> tuple[Tensor, Tensor, Tensor]:
        head = make_head(RowRMS(lr=0.1), storage=torch.float32)
        features, labels = make_batch(0, 40)
        x = features.detach().float().requires_grad_()
        loss = head(x, labels)
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad, head.rows.clone()

    expected = run()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16, where the CPU has it
        lower = run()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    torch.set_default_dtype(torch.float64)
    try:
        default = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (lower, cast, default):
        assert all(torch.equal(one, two) for one, two in zip(expected, other, strict=True))


def test_copies_and_pickles_are_layers_of_their_own() -> None:
    head = make_head(Momentum(lr=0.1))
    loss = head(*make_batch(0))
    copies: list[Callable[[ShardedMarginHead], ShardedMarginHead]] = [
        copy.deepcopy,
        lambda h: pickle.loads(pickle.dumps(h)),
    ]
    others = [make(head) for make in copies]
    before = [other.rows.clone() for other in others]
    loss.backward()
    for other, rows in zip(others, before, strict=True):
        assert torch.equal(other.rows, rows)
        other(*make_batch(0)).backward()
        assert torch.equal(other.rows, head.rows)
        assert torch.equal(other.state, head.state)


def test_threads_that_share_a_layer_get_right_gradients_or_a_refusal() -> None:
    """Two heads and one head, from four threads: each gradient is that of the rows its forward saw."""
    shared, alone = make_head(), [make_head(SGD(lr=0.01), seed=seed) for seed in range(4)]
    wanted = {seed: dense_gradients(shared, *make_batch(seed))[0] for seed in range(4)}
    expected = []
    for seed in range(4):
        head = make_head(SGD(lr=0.01), seed=seed)
        for step in range(5):
            head(*make_batch(10 * seed + step)).backward()
        expected.append(head.rows.clone())
    wrong: list[str] = []
    threads_before = torch.get_num_threads()

    def work(seed: int) -> None:
        for step in range(5):
            features, labels = make_batch(seed)
            (gradient,) = torch.autograd.grad(shared(features, labels), features)
            if (gradient - wanted[seed]).abs().max() > 1e-10:
                wrong.append(f"{seed} {step}")
            alone[seed](*make_batch(10 * seed + step)).backward()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(torch.equal(head.rows, rows) for head, rows in zip(alone, expected, strict=True))
    assert torch.get_num_threads() == threads_before


def test_a_backward_that_ends_early_leaves_a_layer_that_says_so() -> None:
    class Fails(SGD):
        left = 3

        def rates(self, mean_square: Callable[[], Tensor], state: Tensor) -> float | None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().rates(mean_square, state)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        head = make_head(Fails(lr=0.1))
        before = head.rows.clone()
        loss = head(*make_batch(0))
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(head.rows, before)
    assert head.is_torn
    for use in (lambda: head(*make_batch(1)), lambda: head.full_loss(*make_batch(1))):
        with pytest.raises(HeadError, match=r"ended early after step 0, .* load a checkpoint, or set is_torn = False"):
            use()
    head.is_torn = False
    head(*make_batch(1)).backward()
    assert head.step == 1


def test_what_one_rank_refuses_ends_the_call_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tells the others how many samples it has, -1 where it refuses them."""
    told: list[int] = []

    def gather(self: Ranks, mine: Tensor) -> list[Tensor]:
        told.append(int(mine))
        return [mine, torch.tensor([-1])] if self.rank == 0 else [torch.tensor([3]), mine]

    monkeypatch.setattr(Ranks, "_gather", gather)
    features, labels = make_batch(0)
    with pytest.raises(HeadError, match="rank 1 of 2 has refused its batch, and says why"):
        Ranks(group=None, rank=0, size=2).gather_batch(features, labels)
    head = make_head(SGD(lr=0.1))
    head.ranks = Ranks(group=None, rank=1, size=2)
    with pytest.raises(HeadError, match="labels must be whole numbers"):
        head(features, labels.float())
    assert told == [7, -1]


def test_a_look_in_inference_mode_is_that_of_no_grad() -> None:
    head = make_head(SGD(lr=0.1))
    features, labels = make_batch(0)
    with torch.no_grad():
        expected = head(features, labels)
    with torch.inference_mode():
        assert torch.equal(head(features, labels), expected)
        assert torch.equal(head.full_loss(features, labels), expected)
    head(features, labels).backward()
    assert head.step == 1
