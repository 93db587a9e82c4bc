"""What this machine offers: cores, speed, versions of what results depend on, memory back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from dask.system import CPU_COUNT


def cpu_count() -> int:
    """Cores that this process may use, as Dask counts them (cgroup limits and affinity included)."""
    return int(CPU_COUNT)


def measure_flops_per_s(seconds: float = 0.25) -> float:
    """Float32 operations a second in a large matrix product on all cores: the yardstick of estimated times."""
    import torch

    size = 1024
    a = torch.ones(size, size)
    b = torch.ones(size, size)
    torch.mm(a, b)
    began, best = time.perf_counter(), float("inf")
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, for the whole process: on tiny images, or beside other work, threads only wait for each
    other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def release_freed_memory() -> None:
    """Give back to the machine what this process has freed, as far as its allocator does that: glibc's."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def find_versions() -> dict[str, str]:
    """Of what results depend on, by name; what is not installed is left out."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Once for a process: each name's whole metadata is read for its version."""
    found = {"python": platform.python_version()}
    for name in ("outsize", "torch", "openvino", "zarr", "rasterio", "dask", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
