"""The best k against sorting everything: float64 and faiss, any blocks, ties, owners of several rows, damage."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from outsize.models.faceid.base.collectives import Ranks
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.gallery.search import ArrayRows, search_rows
from outsize.models.faceid.gallery.top_k import (
    NOBODY,
    Best,
    TopK,
    error_bound,
    exact_scores,
    fold_sum,
    merge_best,
    unit_rows,
)
from outsize.models.faceid.layer.tablets import TabletLayout

ROWS, DIM, QUERIES = 2003, 61, 13
ALONE = Ranks(group=None, rank=0, size=1)


def vectors(count: int, seed: int, dim: int = DIM) -> npt.NDArray[np.float32]:
    return unit_rows(np.random.default_rng(seed).normal(size=(count, dim)))


def search(
    rows: npt.NDArray[np.float32],
    owners: npt.NDArray[np.int64],
    queries: npt.NDArray[np.float32],
    k: int,
    blocks: tuple[int, int] = (256, 64),
    **options: Any,
) -> Best:
    layout = TabletLayout(classes=len(rows), tablet_rows=blocks[0], block_rows=blocks[1])
    return search_rows(ArrayRows(rows, owners), queries, k, layout, ranks=ALONE, **{"threads": 1, **options})


def sort_everything(
    rows: npt.NDArray[np.float32], owners: npt.NDArray[np.int64], queries: npt.NDArray[np.float32], k: int
) -> Best:
    """In plain Python, one query after the other."""
    best = Best.none(len(queries), k)
    for number, query in enumerate(queries):
        scores = exact_scores(rows, np.broadcast_to(query, rows.shape))
        own: dict[int, float] = {}
        for owner, score in zip(owners.tolist(), scores.tolist(), strict=True):
            if owner != NOBODY:
                own[owner] = max(score, own.get(owner, -np.inf))
        for place, (owner, score) in enumerate(sorted(own.items(), key=lambda entry: (-entry[1], entry[0]))[:k]):
            best.scores[number, place], best.owners[number, place] = score, owner
    return best


def test_exact_scores_are_the_dot_products_and_do_not_depend_on_what_stands_beside() -> None:
    rows, queries = vectors(50, 0), vectors(50, 1)
    scores = exact_scores(rows, queries)
    assert scores == pytest.approx(
        [float(np.longdouble(r) @ np.longdouble(q)) for r, q in zip(rows, queries, strict=True)], abs=1e-15
    )
    alone = [exact_scores(rows[i : i + 1], queries[i : i + 1])[0] for i in range(50)]
    assert (scores == alone).all()
    for width in (1, 2, 3, 61, 64):
        values = np.arange(2 * width, dtype=np.float64).reshape(2, width)
        assert (fold_sum(values.copy()) == values.sum(axis=1)).all()


@pytest.mark.parametrize("k", [1, 7, 64])
def test_it_equals_faiss_and_sorting_in_float64(k: int) -> None:
    faiss = pytest.importorskip("faiss")
    rows, queries = vectors(ROWS, 0), vectors(QUERIES, 1)
    best = search(rows, np.arange(ROWS), queries, k)
    expected = sort_everything(rows, np.arange(ROWS), queries, k)
    assert (best.owners == expected.owners).all()
    assert (best.scores == expected.scores).all()
    index = faiss.IndexFlatIP(DIM)
    index.add(rows)
    scores, found = index.search(queries, k)
    assert np.abs(scores - best.scores).max() < error_bound(DIM)
    # float32 may turn over what lies nearer than its rounding, and nothing else.
    turned = found != best.owners
    true = np.einsum("qkd,qd->qk", rows[found].astype(np.float64), queries.astype(np.float64))
    assert np.abs(true - best.scores)[turned].max(initial=0) < error_bound(DIM)
    assert turned.mean() < 0.01


def test_any_blocks_threads_and_parts_of_queries_give_the_same_bits() -> None:
    rows, queries = vectors(ROWS, 0), vectors(QUERIES, 1)
    rows[1500:1510] = rows[3]
    queries[0] = rows[3]
    owners = np.random.default_rng(2).integers(NOBODY, 400, ROWS)
    expected = sort_everything(rows, owners, queries, 9)
    for blocks, threads, part in (((64, 64), 1, 1024), ((2048, 2048), 1, 5), ((512, 128), 3, 1), ((35, 7), 2, 4)):
        best = search(rows, owners, queries, 9, blocks, threads=threads, query_part=part)
        assert (best.owners == expected.owners).all()
        assert (best.scores == expected.scores).all()


def test_of_equal_rows_the_first_owner_comes_first_and_thousands_of_them_are_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("outsize.models.faceid.gallery.top_k.PART", 100)
    monkeypatch.setattr("outsize.models.faceid.gallery.top_k.SCORED", 17)
    rows = np.repeat(vectors(1, 0), 700, axis=0)
    queries = np.concatenate([rows[:3], -rows[:2]])
    best = search(rows, np.arange(700)[::-1].copy(), queries, 5)
    assert (best.owners == np.arange(5)).all()
    assert (best.scores[:3] == best.scores[0, 0]).all()
    assert best.scores[3, 0] == -best.scores[0, 0]


def test_differences_that_float32_does_not_see_decide() -> None:
    """Rows whose scores differ by 1e-9: products in float32 take any of them for the best."""
    row = vectors(1, 0, 512)[0]
    rows = np.repeat(row[None], 300, axis=0)
    for place in range(300):
        rows[place, place] = np.nextafter(rows[place, place], np.float32(1))
    best = search(rows, np.arange(300), row[None], 10)
    expected = sort_everything(rows, np.arange(300), row[None], 10)
    assert (best.owners == expected.owners).all()
    assert len(set(best.scores[0])) == 10
    assert best.scores[0, 0] - best.scores[0, 9] < 1e-7
    single = rows @ row
    assert (np.argsort(-single, kind="stable")[:10] != best.owners[0]).any()


def test_too_few_owners_leave_empty_places() -> None:
    rows = vectors(90, 0)
    best = search(rows, np.full(90, NOBODY), rows[:2], 3)
    assert (best.owners == NOBODY).all()
    assert np.isneginf(best.scores).all()
    best = search(-np.abs(rows), np.where(np.arange(90) == 77, 4, NOBODY), np.abs(rows[:2]), 3)
    assert best.owners.tolist() == [[4, NOBODY, NOBODY]] * 2
    assert (best.scores[:, 0] < 0).all()
    assert search(rows, np.arange(90), rows[:0], 3).owners.shape == (0, 3)


def test_a_block_that_is_no_unit_rows_and_products_that_are_not_float32_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, queries = vectors(64, 0), vectors(2, 1)
    top = TopK(queries, 3, 1, 64)
    damaged = torch.from_numpy(rows.copy())
    damaged[5, 0] = torch.nan
    with pytest.raises(HeadError, match="tablet 9 is damaged"):
        top.look(damaged, np.arange(64), "tablet 9")
    product = torch.mm

    def half(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(product(a.bfloat16().float(), b.bfloat16().float()))

    monkeypatch.setattr(torch, "mm", half)
    with pytest.raises(HeadError, match="set_float32_matmul_precision"):
        top.look(torch.from_numpy(rows), np.arange(64), "tablet 9")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.zeros((2, 3)), "number 0 has length 0"),
        (np.ones(3), r"\(3,\)"),
        (np.array([[1, 0], [np.nan, 1]]), "number 1"),
    ],
)
def test_vectors_without_a_direction_are_refused(value: npt.NDArray[np.float64], reason: str) -> None:
    with pytest.raises(HeadError, match=reason):
        unit_rows(value)


def test_merging_keeps_each_owner_once() -> None:
    a = Best(scores=np.array([[0.9, 0.5]]), owners=np.array([[3, 1]]))
    b = Best(scores=np.array([[0.9, 0.7]]), owners=np.array([[2, 3]]))
    merged = merge_best([a, b])
    assert merged.owners.tolist() == [[2, 3]]
    assert merged.scores.tolist() == [[0.9, 0.9]]


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_is_told_of_all_rows_in_all_passes(threads: int) -> None:
    rows, told = vectors(1000, 0), []
    search(rows, np.arange(1000), vectors(7, 1), 2, threads=threads, query_part=3, tell=lambda *at: told.append(at))
    done = [at for at, _ in told]
    assert {of for _, of in told} == {3 * 1000}
    assert done == sorted(set(done))
    assert done[0] <= 64
    assert done[-1] == 3 * 1000
