"""Variables of worker processes: they hold no more than they must."""

from __future__ import annotations

import os


def worker_environment(gdal_cache_bytes: int) -> dict[str, str]:
    """Variables of worker processes: they hold no more than they must."""
    return {
        # GDAL takes a number below 100,000 for megabytes.
        "GDAL_CACHEMAX": str(max(1, gdal_cache_bytes // 2**20)),
        "MALLOC_TRIM_THRESHOLD_": "65536",
        # Programs hold hundreds of megabytes: in pages of 2 MB they are there sooner, and found faster.
        "GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1"))),
        # One tile's chunks are few; more threads would only hold more memory.
        "ZARR_ASYNC__CONCURRENCY": "4",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def complete_environment(gdal_cache_bytes: int) -> None:
    """In a worker that others have started: what keeps it small, where its own environment says nothing of that."""
    import zarr

    wanted = worker_environment(gdal_cache_bytes)
    # GDAL looks when it reads its first block. Memory allocators look when a process starts: too late for them.
    os.environ.setdefault("GDAL_CACHEMAX", wanted["GDAL_CACHEMAX"])
    if _ZARR_CONCURRENCY not in os.environ:
        zarr.config.set({"async.concurrency": int(wanted[_ZARR_CONCURRENCY])})


_ZARR_CONCURRENCY = "ZARR_ASYNC__CONCURRENCY"
