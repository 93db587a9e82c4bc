"""Ranks, and strangers told from known persons, against a dense table of scores."""

from __future__ import annotations

import numpy as np
import pytest
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.gallery.top_k import unit_rows
from outsize.models.faceid.scores.identification import measure_identification, split_pictures


def test_rates_are_those_of_the_dense_table_of_scores() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 61, 400)
    unit = unit_rows(random.normal(size=(61, 17))[labels] + 0.8 * random.normal(size=(400, 17)))
    split = split_pictures(labels, templates=2, stranger_share=0.3, seed=5)
    strangers = set(labels[split.strangers].tolist())
    assert len(strangers) == round(0.3 * 61)
    assert strangers.isdisjoint(labels[split.enrolled].tolist())
    assert sorted(np.concatenate([split.enrolled, split.known, split.strangers]).tolist()) == list(range(400))
    for label in set(labels.tolist()) - strangers:
        assert np.flatnonzero(labels == label)[:2].tolist() == [p for p in split.enrolled if labels[p] == label]
    found = measure_identification(unit, labels, split, rates=("0.2", "0.05", "1e-3"), most=9)
    people = sorted(set(labels[split.enrolled].tolist()))
    scores = unit.astype(np.float64) @ unit[split.enrolled].astype(np.float64).T
    table = np.stack([scores[:, labels[split.enrolled] == person].max(axis=1) for person in people], axis=1)
    order = np.argsort(-table, axis=1)
    rank = np.array([order[p].tolist().index(people.index(labels[p])) for p in split.known])
    assert found.match_rates == pytest.approx([np.mean(rank <= place) for place in range(9)])
    best = np.sort(table[split.strangers].max(axis=1))[::-1]
    for point in found.points:
        assert point.allowed == int(point.rate * len(best) + 1e-9)
        if not point.allowed:
            assert (point.rate, point.threshold, point.missed_rate) == (1e-3, None, None)
            continue
        assert point.named_strangers == point.allowed
        assert point.threshold == pytest.approx(best[point.allowed], abs=1e-12)
        missed = [rank[n] > 0 or table[p].max() <= best[point.allowed] + 1e-12 for n, p in enumerate(split.known)]
        assert point.missed_rate == pytest.approx(np.mean(missed))
    fpir, fnir = found.curve()
    assert len(fpir) == len(best)
    for named, missed in zip(fpir.tolist(), fnir.tolist(), strict=True):
        place = round(named * len(best))  # so many exceed the threshold, which is the next one's score
        limit = best[place] + 1e-12 if place < len(best) else -np.inf
        wrong = [rank[n] > 0 or table[p].max() <= limit for n, p in enumerate(split.known)]
        assert missed == pytest.approx(np.mean(wrong))
    assert fpir.tolist() == pytest.approx((np.arange(len(best)) + 1) / len(best))
    assert fnir[-1] == pytest.approx(1 - found.match_rates[0])
    assert (found.people, found.known, found.strangers) == (len(people), len(split.known), len(best))


def test_progress_goes_through_both_searches() -> None:
    """24 persons are enrolled; 2,376 of their pictures are looked up in three passes, 600 of strangers in one."""
    labels = np.repeat(np.arange(30), 100)
    unit = unit_rows(np.random.default_rng(0).normal(size=(3000, 4)))
    told: list[tuple[int, int]] = []
    found = measure_identification(unit, labels, split_pictures(labels), tell=lambda *progress: told.append(progress))
    assert (found.known, found.strangers) == (2376, 600)
    assert told == [(24 * passes, 96) for passes in (1, 2, 3, 4)]


def test_without_strangers_or_pictures_it_says_so() -> None:
    labels = np.array([0, 0, 1, 1])
    unit = unit_rows(np.eye(4))
    split = split_pictures(labels, stranger_share=0)
    found = measure_identification(unit, labels, split, rates=("0.1",))
    assert found.strangers == 0
    assert [len(part) for part in found.curve()] == [0, 0]
    assert found.points[0].threshold is None
    assert len(found.match_rates) == 2
    with pytest.raises(HeadError, match="more than 1 pictures"):
        split_pictures(np.arange(5), stranger_share=0)
    with pytest.raises(HeadError, match="share of strangers"):
        split_pictures(labels, stranger_share=1.0)
