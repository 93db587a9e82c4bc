"""Tablets: every class has one owner, whatever the ranks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.layer.tablets import TabletLayout


@given(st.integers(1, 5000), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5))
def test_tablets_partition_the_classes_in_the_order_of_ranks(classes: int, ranks: int, block: int, blocks: int) -> None:
    layout = TabletLayout(classes=classes, ranks=ranks, tablet_rows=block * blocks, block_rows=block)
    owned = [tablet for rank in range(ranks) for tablet in layout.owned(rank)]
    assert [tablet.index for tablet in owned] == list(range(layout.count))
    assert owned[0].first == 0
    assert owned[-1].stop == classes
    assert all(before.stop == after.first for before, after in itertools.pairwise(owned))
    counts = [len(layout.owned(rank)) for rank in range(ranks)]
    assert max(counts) - min(counts) <= 1
    assert all(0 <= layout.padded_rows(tablet) - tablet.rows < block for tablet in owned)
    # A tablet does not depend on how many ranks there are.
    alone = TabletLayout(classes=classes, tablet_rows=block * blocks, block_rows=block)
    assert alone.owned(0) == owned


def test_bad_layouts_are_refused() -> None:
    with pytest.raises(HeadError, match="whole blocks"):
        TabletLayout(classes=5, tablet_rows=10, block_rows=4)
    with pytest.raises(HeadError, match=r"a rank must be in 0 \.\.\. 1"):
        TabletLayout(classes=5, ranks=2).owned(2)
