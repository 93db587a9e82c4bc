"""The memory meter: proportional set size of this process and all its children, sampled."""

from __future__ import annotations

import threading

import psutil

INTERVAL_S = 0.2


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


def measure_tree_bytes() -> int:
    """Bytes held by this process and its descendants now."""
    me = psutil.Process()
    return sum(process_bytes(process) for process in (me, *me.children(recursive=True)))


class MemoryMeter:
    """Samples the tree of processes five times a second while open; `peak_bytes` is the largest sum seen."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.current_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory meter", daemon=True)

    def _sample(self) -> None:
        self.current_bytes = measure_tree_bytes()
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._sample()

    def __enter__(self) -> MemoryMeter:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
