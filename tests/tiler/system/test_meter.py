"""The memory meter: what it sees of this process and of its children."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from outsize.tiler.system.meter import INTERVAL_S, MemoryMeter, measure_tree_bytes

pytestmark = pytest.mark.system

MB = 1_000_000
CHILD = """
import time
block = bytearray(150_000_000)
print("ready", flush=True)
time.sleep(7)
"""


def test_a_short_peak_of_this_process_is_seen() -> None:
    before = measure_tree_bytes()  # with what other tests have started here
    with MemoryMeter() as meter:
        block, deadline = np.ones(200 * MB, np.uint8), time.monotonic() + 10
        time.sleep(4 * INTERVAL_S)
        # A look at a process that has run many tests takes its time on a busy machine.
        while meter.peak_bytes - before < 190 * MB and time.monotonic() < deadline:
            time.sleep(INTERVAL_S)
        del block
        time.sleep(2 * INTERVAL_S)
    # What other tests have left may go meanwhile.
    assert 190 * MB < meter.peak_bytes - min(before, measure_tree_bytes()) < 260 * MB


@pytest.mark.long
def test_children_count_from_when_they_are_known() -> None:
    with MemoryMeter() as meter:
        before = meter.current_bytes
        with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.wait()
    assert meter.peak_bytes - before > 140 * MB


def test_the_longer_a_look_takes_the_fewer_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def slow(_: object) -> int:
        looks.append(time.perf_counter())
        time.sleep(0.03)
        return 100 * MB

    monkeypatch.setattr("outsize.tiler.system.meter.process_bytes", slow)
    monkeypatch.setattr("outsize.tiler.system.meter._tree", lambda: [psutil.Process()])
    monkeypatch.setattr("outsize.tiler.system.meter._own_bytes", lambda _: 50 * MB)
    with MemoryMeter():
        time.sleep(10 * INTERVAL_S)
    assert len(looks) <= 3  # at the beginning, at the end, and once where this machine is slow
    looks.clear()
    grown = iter(range(10**9))
    monkeypatch.setattr("outsize.tiler.system.meter._own_bytes", lambda _: next(grown) ** 2 * MB)
    with MemoryMeter():
        time.sleep(10 * INTERVAL_S)
    assert len(looks) >= 4  # of memory that grows
