"""The order of samples: each once an epoch, another order in each, the same for any ranks and any place to start."""

from __future__ import annotations

import numpy as np
import pytest
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.pictures.sample_order import SampleOrder, share_of


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 64, 65, 997, 4096])
def test_an_epoch_shows_each_sample_once(samples: int) -> None:
    order = SampleOrder(samples=samples, seed=3)
    for epoch in (0, 1, 7):
        epochs, found = order.at(np.arange(epoch * samples, (epoch + 1) * samples))
        assert (epochs == epoch).all()
        assert (np.sort(found) == np.arange(samples)).all()


def test_orders_differ_by_epoch_and_seed_and_look_random() -> None:
    samples = 2000
    first = SampleOrder(samples=samples, seed=0).at(np.arange(2 * samples))[1]
    other = SampleOrder(samples=samples, seed=1).at(np.arange(samples))[1]
    orders = [first[:samples], first[samples:], other]
    for index, order in enumerate(orders):
        # Of a random order about one place keeps its sample, and neighbours are unrelated.
        assert (order == np.arange(samples)).sum() < 8
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1
        assert all((order == later).sum() < 8 for later in orders[index + 1 :])


def test_any_part_of_the_order_is_the_same_as_in_the_whole() -> None:
    order = SampleOrder(samples=101, seed=5)
    epochs, samples = order.at(np.arange(400))
    part = order.at(np.array([399, 0, 250, 101]))
    assert (part[0] == epochs[[399, 0, 250, 101]]).all()
    assert (part[1] == samples[[399, 0, 250, 101]]).all()
    huge = SampleOrder(samples=10**12, seed=5).at(np.arange(1000))[1]  # in no memory
    assert len(np.unique(huge)) == 1000
    assert huge.max() < 10**12


@pytest.mark.parametrize(("ranks", "batches"), [(1, 5), (2, 5), (3, 5), (5, 5), (4, 9)])
def test_ranks_share_all_micro_batches_in_order(ranks: int, batches: int) -> None:
    shares = [share_of(rank, ranks, batches) for rank in range(ranks)]
    assert [number for share in shares for number in share] == list(range(batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(HeadError, match="an order needs a sample"):
        SampleOrder(samples=0)
