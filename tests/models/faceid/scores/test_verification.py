"""True accept rates against sorting all scores, ties and rates that too few pairs can tell; folds by brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.gallery.top_k import unit_rows
from outsize.models.faceid.scores import verification
from outsize.models.faceid.scores.order_statistics import count_first, keys_of, score_of, select_from_top
from outsize.models.faceid.scores.pair_list import Pair, PairList, read_pairs, write_pairs
from outsize.models.faceid.scores.verification import (
    allow,
    count_blocks,
    find_threshold,
    measure_folds,
    measure_verification,
    parse_rates,
)
from outsize.tiler.base.errors import UsageError


def make_faces(people: int, pictures: int, noise: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    random = np.random.default_rng(0)
    labels = random.integers(0, people, pictures)
    return unit_rows(random.normal(size=(people, 23))[labels] + noise * random.normal(size=(pictures, 23))), labels


def sort_pairs(
    unit: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(genuine, impostor) scores, descending, from one product and one loop over pairs."""
    genuine, impostor = [], []
    for i, j in itertools.combinations(range(len(labels)), 2):
        score = float(unit[i].astype(np.longdouble) @ unit[j].astype(np.longdouble))
        (genuine if labels[i] == labels[j] else impostor).append(score)
    return np.sort(genuine)[::-1], np.sort(impostor)[::-1]


@pytest.mark.parametrize("block", [37, 1024])
def test_rates_are_those_of_all_scores_sorted(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(verification, "BLOCK", block)
    unit, labels = make_faces(41, 211, 0.9)
    genuine, impostor = sort_pairs(unit, labels)
    told: list[int] = []
    found = measure_verification(unit, labels, ("0.3", "1e-1", "1e-2", "1e-3", "1e-6"), tell=told.append)
    assert sum(told) == count_blocks(211) == (63 if block == 37 else 3)
    assert (found.genuine_pairs, found.impostor_pairs) == (len(genuine), len(impostor))
    for point in found.points:
        assert point.allowed == int(len(impostor) * point.rate + 1e-9)
        assert point.is_sure == (point.allowed >= 10)
        if not point.allowed:
            assert point.rate == 1e-6
            assert point.threshold is point.true_accept_rate is None
            continue
        assert point.threshold == pytest.approx(impostor[point.allowed], abs=1e-13)
        assert point.false_accepts == point.allowed
        assert point.true_accept_rate == np.mean(genuine > impostor[point.allowed] + 1e-13)
    assert int(found.genuine.sum()) == len(genuine)
    far, tar = found.curve()
    assert (far[-1], tar[-1]) == (1, 1)
    at = int(np.searchsorted(far, 0.1))
    assert tar[at] == pytest.approx(found.points[1].true_accept_rate, abs=0.02)
    cuts, shares, others = found.histogram(7)
    assert (shares.sum(), others.sum()) == pytest.approx((1, 1))
    assert cuts[0] <= impostor[-1] <= impostor[0] <= cuts[-1]


def test_equal_scores_count_against_the_embedder() -> None:
    """Six impostor pairs of score 1, when one false accept is allowed: none of the equal ones is accepted."""
    unit = np.repeat(np.eye(3, dtype=np.float32)[:1], 4, axis=0)
    unit = np.concatenate([unit, np.eye(3, dtype=np.float32)[1:2].repeat(4, axis=0)])
    labels = np.array([0, 1, 2, 3, 4, 4, 5, 5])
    found = measure_verification(unit, labels, ("0.1", "0.5"))
    assert (found.genuine_pairs, found.impostor_pairs) == (2, 26)
    strict, loose = found.points
    assert (strict.allowed, strict.threshold, strict.false_accepts, strict.true_accept_rate) == (2, 1.0, 0, 0.0)
    assert (loose.allowed, loose.threshold, loose.false_accepts, loose.true_accept_rate) == (13, 0.0, 10, 1.0)


def test_faces_that_allow_no_measurement_are_refused() -> None:
    unit = unit_rows(np.eye(4))
    with pytest.raises(HeadError, match="needs two persons"):
        measure_verification(unit, np.arange(4))
    with pytest.raises(HeadError, match="needs two persons"):
        measure_verification(unit, np.zeros(4, np.int64))
    assert allow("1e-6", 29_000_000) == 29  # 1e-6 * 29e6 is less than 29 in float64
    for text in ("0", "1", "x", "-1e-3", "1/0"):
        with pytest.raises(HeadError, match="a rate must be"):
            parse_rates([text])


def test_order_statistics_are_those_of_sorted_numbers() -> None:
    """Also where thousands are equal, and with the extremes."""
    random = np.random.default_rng(0)
    scores = np.concatenate(
        [random.uniform(-1, 1, 5000), np.full(3000, 0.125), [1.0, -1.0], 0.5 + 1e-13 * np.arange(9)]
    )
    keys = keys_of(scores)
    ordered = np.sort(keys)[::-1]
    places = [0, 1, 17, 2500, 4000, len(keys) - 1]
    found = select_from_top(count_first(keys), lambda: iter(np.array_split(keys, 7)), places)
    for place, at in zip(places, found, strict=True):
        assert at.key == ordered[place]
        assert at.above == np.count_nonzero(keys > at.key) <= place
    assert score_of(int(keys[-10])) == -1
    with pytest.raises(HeadError, match="places must be"):
        select_from_top(count_first(keys), lambda: iter([keys]), [len(keys)])
    with pytest.raises(HeadError, match="different scores"):
        select_from_top(count_first(keys), lambda: iter([keys[:7000]]), [2500])


def test_folds_take_the_best_threshold_of_the_others() -> None:
    random = np.random.default_rng(1)
    same = np.tile(np.repeat([True, False], 15), 10)
    scores = np.round(random.normal(np.where(same, 0.6, 0.2), 0.2), 2)  # with ties
    folds = np.repeat(np.arange(10), 30)
    found = measure_folds(scores, same, folds)
    assert found.pairs == 300
    for fold in range(10):
        train, test = folds != fold, folds == fold
        best = max(np.mean((scores[train] > t) == same[train]) for t in np.arange(-1, 2, 0.005))
        threshold = found.thresholds[fold]
        assert np.mean((scores[train] > threshold) == same[train]) == best
        assert found.accuracies[fold] == np.mean((scores[test] > threshold) == same[test])
    assert found.mean == pytest.approx(np.mean(found.accuracies))
    assert 0.7 < found.mean < 0.95
    assert 0 < found.standard_error < 0.05
    with pytest.raises(HeadError, match="at least 2 folds"):
        measure_folds(scores[:30], same[:30], folds[:30])


@pytest.mark.parametrize(
    ("scores", "same", "threshold"),
    [([0.1, 0.4, 0.8], [False, False, True], 0.6), ([0.3, 0.5], [True, True], -0.7), ([0.3, 0.5], [False, False], 0.5)],
)
def test_thresholds_lie_between_scores(scores: list[float], same: list[bool], threshold: float) -> None:
    assert find_threshold(np.array(scores), np.array(same)) == pytest.approx(threshold)


def test_pair_lists_are_lfw_s(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("2\t1\nAda Lovelace\t1\t12\nAda Lovelace\t3\tBob\t1\nBob\t1\t2\nBob\t4\tCy\t1\n")
    pairs = read_pairs(path)
    assert pairs.folds == 2
    assert [(pair.fold, pair.first, pair.second, pair.is_same) for pair in pairs.pairs] == [
        (0, ("Ada Lovelace", 1), ("Ada Lovelace", 12), True),
        (0, ("Ada Lovelace", 3), ("Bob", 1), False),
        (1, ("Bob", 1), ("Bob", 2), True),
        (1, ("Bob", 4), ("Cy", 1), False),
    ]
    write_pairs(tmp_path / "again.txt", pairs)
    assert (tmp_path / "again.txt").read_text() == path.read_text()
    assert isinstance(pairs, PairList)
    assert isinstance(pairs.pairs[0], Pair)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "got an empty file"),
        ("10 x\n", "line 1: must be FOLDS and COUNT"),
        ("1 1\na 1 2\n", "must have 2 pairs, 1 folds of 1 pairs of one person and 1 of two, got 1"),
        ("1 1\na 1 2\nb 1 2\n", "line 3: must be name1 n1 name2 n2, of two persons, got 'b 1 2'"),
        ("1 1\na 1 b 2\na 1 b 2\n", "line 2: must be name n1 n2"),
        ("1 1\na 1 x\na 1 b 2\n", "line 2: must be name n1 n2"),
        ("1 1\na 1 1\na 1 b 2\n", "line 2: must be name n1 n2, two pictures"),
        ("1 1\na 1 2\na 1 a 2\n", "line 3: must be name1 n1 name2 n2, of two persons"),
        ("1 1\na 0 2\na 1 b 2\n", "line 2"),
    ],
)
def test_what_breaks_the_format_of_pairs_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_pairs(tmp_path / "pairs.txt")
