"""Submission follows the workers that are there."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
from dask.utils import key_split
from distributed import Client, LocalCluster
from outsize.tiler import schedule
from outsize.tiler.events import TileRecord
from outsize.tiler.schedule import job_on, run_cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """A job whose cells take a moment; counts those under way."""

    run_id: str = "slow"

    def open(self, *, watched: bool) -> Slow:
        del watched
        return self

    def run(self, row: int, column: int) -> TileRecord:
        with GUARD:
            STATE["now"] += 1
            UNDER_WAY.append(STATE["now"])
        time.sleep(0.05)
        with GUARD:
            STATE["now"] -= 1
        return TileRecord.failure(row, column, 1, "", worker="")

    def take_sketch(self, row: int, column: int) -> bytes:
        del row, column
        return b""

    def close(self) -> None: ...


GUARD, STATE, UNDER_WAY = threading.Lock(), {"now": 0}, list[int]()


def test_workers_that_come_later_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LOOK_EVERY_S", 0.1)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        job_on(client, Slow()),
    ):
        done = 0
        for done, _ in enumerate(run_cells(client, "slow", ((0, index) for index in range(150)), "tile"), start=1):
            if done == 5:
                cluster.scale(6)
        assert done == 150
    # One thread had two cells; six of them are never all busy with two.
    assert max(UNDER_WAY) == 6


def test_what_dask_remembers_of_cells_does_not_grow_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "FORGET_EVERY", 20)
    sizes: list[int] = []
    with (
        LocalCluster(n_workers=1, threads_per_worker=8, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        job_on(client, Slow()),
    ):
        for _ in run_cells(client, "slow", ((0, index) for index in range(120)), "tile"):
            sizes.append(key_split.cache_info().currsize)
    assert len(sizes) == 120
    assert max(sizes[30:]) < 70
