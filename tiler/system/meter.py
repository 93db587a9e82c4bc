"""The memory meter: proportional set size of this process and all its children, sampled."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

INTERVAL_S = 0.2
"""How often the meter looks."""
RARELY, OFTEN = 100, 10
"""A sample is taken again after so many times what the last one took: the kernel walks all pages of all processes for
it, 20 ms for 1.3 GB. Often only while the processes' own pages grow beyond what was there at the largest sample."""
LONGEST_S = 5.0
GROWTH = 1.01


def process_bytes(process: psutil.Process | None = None) -> int:
    """Bytes held by one process (None: this one); 0 where it is gone."""
    process = process or psutil.Process()
    try:
        info = process.memory_full_info()
        # PSS counts a page shared by n processes 1/n in each, so that the sum is what the machine holds. Linux only.
        return int(getattr(info, "pss", 0) or info.uss)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0
    except psutil.AccessDenied:
        return int(process.memory_info().rss)


def _tree() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def measure_tree_bytes() -> int:
    """Bytes held by this process and its descendants now."""
    return sum(map(process_bytes, _tree()))


def _own_bytes(pids: list[int]) -> int:
    """Pages that no file stands behind, of all processes; in microseconds, from what the kernel counts anyway. Where
    it tells nothing, 0."""
    total = 0
    for pid in pids:
        try:
            resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        except (OSError, ValueError):
            continue
        total += (int(resident) - int(shared)) * mmap.PAGESIZE
    return total


@contextmanager
def sample_peak(interval_s: float = 0.01) -> Iterator[list[int]]:
    """This process's largest size meanwhile, as the one number of a list."""
    found, stop = [process_bytes()], threading.Event()

    def sample() -> None:
        while not stop.wait(interval_s):
            found[0] = max(found[0], process_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found[0] = max(found[0], process_bytes())


class MemoryMeter:
    """Samples the tree of processes while open; `peak_bytes` is the largest sum seen.

    It costs about one hundredth of a core, and more only while memory grows.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.current_bytes = 0
        self._own_at_peak = 0
        self._pids: list[int] = []
        self._took_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory meter", daemon=True)

    def _sample(self) -> None:
        began = time.perf_counter()
        processes = _tree()
        self._pids = [process.pid for process in processes]
        own = _own_bytes(self._pids)
        self.current_bytes = sum(map(process_bytes, processes))
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes, self._own_at_peak = self.current_bytes, own
        self._took_s = time.perf_counter() - began

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(INTERVAL_S):
            grows = _own_bytes(self._pids) > GROWTH * self._own_at_peak
            if time.perf_counter() - last >= min(self._took_s * (OFTEN if grows else RARELY), LONGEST_S):
                self._sample()
                last = time.perf_counter()

    def __enter__(self) -> MemoryMeter:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
