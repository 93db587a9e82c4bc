"""Batches gathered from many threads: every item served once, with its own result, never with another kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from outsize.tiler.engines.batches import LANES, Gatherer


class Recorder:
    """Doubles numbers, and remembers what came together."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.at_once = self.most = 0
        self._seconds, self._lock = seconds, threading.Lock()

    def __call__(self, key: str, items: Sequence[int]) -> list[int]:
        with self._lock:
            self.batches.append((key, list(items)))
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(self._seconds)
        with self._lock:
            self.at_once -= 1
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]


def test_every_item_gets_its_own_result_and_kinds_are_not_mixed() -> None:
    run = Recorder(0.002)
    gatherer = Gatherer(run, 5)
    items = [(f"kind {i % 3}", 1000 + i) for i in range(211)]
    with ThreadPoolExecutor(17) as pool:
        results = list(pool.map(lambda item: gatherer(*item), items))
    gatherer.close()
    assert results == [2 * number for _, number in items]
    assert sorted(number for _, batch in run.batches for number in batch) == [number for _, number in items]
    assert all(key == f"kind {(number - 1000) % 3}" for key, batch in run.batches for number in batch)
    assert max(len(batch) for _, batch in run.batches) == 5
    assert run.most == LANES


def test_what_waits_longest_says_what_is_next() -> None:
    started, go, seen = threading.Semaphore(0), threading.Event(), []

    def run(key: str, items: Sequence[int]) -> list[int]:
        seen.append((key, list(items)))
        started.release()
        if key == "first":
            go.wait(10)
        return list(items)

    gatherer = Gatherer(run, 3)
    with ThreadPoolExecutor(20) as pool:
        # Both lanes are taken while the others come, one after the other.
        pool.submit(gatherer, "first", 0)
        assert started.acquire(timeout=10)
        for number in range(3):
            pool.submit(gatherer, "first", number)
        assert started.acquire(timeout=10)
        waiting = []
        for number, key in enumerate(["b", "a", "b", "a", "b", "b"]):
            waiting.append(pool.submit(gatherer, key, number))
            deadline = time.monotonic() + 10
            while len(gatherer._waiting) <= number and time.monotonic() < deadline:
                time.sleep(0.001)
        go.set()
        assert [future.result(10) for future in waiting] == [0, 1, 2, 3, 4, 5]
    gatherer.close()
    assert sorted(seen[LANES:], key=str) == [("a", [1, 3]), ("b", [0, 2, 4]), ("b", [5])]


def test_a_batch_that_is_not_full_goes_only_where_nothing_is_under_way() -> None:
    started, go, sizes = threading.Semaphore(0), threading.Semaphore(0), []

    def run(_: str, items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        started.release()
        assert go.acquire(timeout=10)
        return list(items)

    gatherer = Gatherer(run, 4)
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(gatherer, "k", 0)]
        assert started.acquire(timeout=10)
        futures += [pool.submit(gatherer, "k", number) for number in (1, 2, 3)]
        assert not started.acquire(timeout=0.2)
        futures.append(pool.submit(gatherer, "k", 4))
        assert started.acquire(timeout=10)  # full: on the other lane
        futures += [pool.submit(gatherer, "k", number) for number in (5, 6)]
        go.release()
        assert not started.acquire(timeout=0.2)
        go.release()
        assert started.acquire(timeout=10)  # nothing else is under way
        go.release()
        assert [future.result(10) for future in futures] == list(range(7))
    gatherer.close()
    assert sizes == [1, 4, 2]


def test_what_a_batch_raises_reaches_those_in_it_and_nobody_else() -> None:
    gatherer = Gatherer(Recorder(), 1)
    with ThreadPoolExecutor(4) as pool:
        futures = {number: pool.submit(gatherer, "k", number) for number in (11, 12, 13, 14)}
    with pytest.raises(ValueError, match="thirteen"):
        futures.pop(13).result()
    assert {number: future.result() for number, future in futures.items()} == {11: 22, 12: 24, 14: 28}
    gatherer.close()


def test_a_runner_that_loses_a_result_is_found_out() -> None:
    gatherer: Gatherer[str, int, int] = Gatherer(lambda *_: [], 2)
    with pytest.raises(ValueError, match="shorter"):
        gatherer("k", 1)
    gatherer.close()
