"""What this machine offers: cores, speed, versions of what results depend on, memory back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dask.system import CPU_COUNT

from .process_locks import has_lost_threads


def cpu_count() -> int:
    """Cores that this process may use, as Dask counts them (cgroup limits and affinity included)."""
    return int(CPU_COUNT)


def measure_flops_per_s(seconds: float = 0.25, device: str = "cpu") -> float:
    """Float32 operations a second in a large matrix product, on all cores or a CUDA device: the yardstick of estimated
    times."""
    import torch

    size = 1024 if device == "cpu" else 8192
    a = torch.ones(size, size, device=device)
    b = torch.ones(size, size, device=device)

    def multiply() -> None:
        torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize(device)

    multiply()
    began, best = time.perf_counter(), float("inf")
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch on so many threads: whatever the thread that enters computes, for the whole process."""
    import torch

    threads = torch.get_num_threads()
    # Even where it says so already: OpenMP keeps a number for each thread that computes.
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def spare_lost_threads() -> None:
    """In a process that was forked from one with threads, have torch compute by the one that came along, for good."""
    if has_lost_threads():
        import torch

        torch.set_num_threads(1)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """torch on one thread, for the whole process: on tiny images, or beside other work, threads only wait for each
    other."""
    return torch_threads(1)


def release_freed_memory() -> None:
    """Give back to the machine what this process has freed, as far as its allocator does that: glibc's."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""
MAPPED_FROM_BYTES = 256 * 1024


def map_large_blocks() -> None:
    """Have glibc give every large block back as soon as it is freed, from now on.

    By itself it keeps blocks of up to 32 MB, and tensors whose sizes change from tile to tile leave holes that hold
    twice what is in use.
    """
    # Read by torch at its first tensor: those from 2 MB on then ask for huge pages, which the kernel clears faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
            mallopt(M_TRIM_THRESHOLD, MAPPED_FROM_BYTES)


PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent has died."""


def die_with_parent(parent: int | None = None) -> None:
    """A process that this command started must not outlive it. Dask's workers notice a closed pipe, in a thread that
    waits for the interpreter; the kernel does not wait.

    Args:
        parent: its process number, so that one that died before this call is noticed; None: whichever is there.
    """
    parent = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died just before
            os._exit(1)


INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""As Linux names what multiplies 8-bit numbers and adds the products in one instruction."""


def has_int8_instructions() -> bool | None:
    """Whether this machine's processor does; None where it cannot be told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return bool(INT8_FLAGS & set(flags.split()))
    return None


def find_versions() -> dict[str, str]:
    """Of what results depend on, by name; what is not installed is left out."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Once for a process: each name's whole metadata is read for its version."""
    found = {"python": platform.python_version()}
    for name in ("outsize", "torch", "openvino", "zarr", "rasterio", "dask", "numpy", "nncf"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
