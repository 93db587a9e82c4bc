"""Galleries of growing size beside faiss: latency of one face, faces a second, memory, and whether both agree.

python -m outsize.tests.benchmarks.gallery FOLDER [--rows 10000 1000000 10000000] [--storage float32] [--memory 2GB]

Galleries are made in FOLDER, 2 KB a row in float32, and stay there for another call. Each measurement runs in a process
of its own. faiss IndexFlatIP holds float32 rows in memory: where they do not fit, it searches piece after piece, for
the answers alone, and its columns are empty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from ...models.faceid.gallery.gallery import Gallery
from ...tiler.base.text import format_bytes
from ...tiler.system.machine import cpu_count
from ...tiler.system.meter import MemoryMeter

DIM, K = 512, 5
CHUNK = 163_840
"""Rows that are enrolled at once: ten tablets."""
PIECE = 6 * CHUNK
"""Rows that faiss holds at once where all do not fit."""
BATCH = 64


def make_rows(first: int, count: int) -> npt.NDArray[np.float32]:
    """Random directions, the same for the same place."""
    return np.random.Generator(np.random.Philox(key=[1, first])).standard_normal((count, DIM), dtype=np.float32)


def make_queries(rows: int) -> npt.NDArray[np.float32]:
    """Half of them near rows of the gallery."""
    queries = np.random.default_rng(2).standard_normal((BATCH, DIM), dtype=np.float32)
    known = make_rows(0, min(rows, CHUNK))[: BATCH // 2]
    queries[: len(known)] = known + 0.5 * queries[: len(known)]
    return queries


def make_gallery(place: Path, rows: int, storage: str) -> dict[str, float]:
    """Enrol; seconds."""
    torch.set_num_threads(cpu_count())
    began = time.perf_counter()
    with MemoryMeter() as meter:
        gallery = Gallery.create(place, dim=DIM, embedder="random", storage=storage)
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            gallery.enroll([f"person {first + n}" for n in range(count)], make_rows(first, count))
    return {"seconds": time.perf_counter() - began, "peak": meter.peak_bytes}


def measure_gallery(place: Path, memory: str) -> dict[str, Any]:
    """Look up one face, and a batch."""
    torch.set_num_threads(cpu_count())
    began = time.perf_counter()
    with MemoryMeter() as meter:
        gallery = Gallery.open(place, memory=memory)
        opened = time.perf_counter() - began
        queries = make_queries(gallery.templates)
        one = _repeat(lambda: gallery.identify(queries[:1], K))
        many = _repeat(lambda: gallery.identify(queries, K))
        answers = gallery.identify(queries, K)
    return {
        "open": opened,
        "one": one,
        "many": many,
        "peak": max(meter.peak_bytes, meter.current_bytes),
        "predicted": gallery.plan_identify(BATCH, K).total_bytes,
        "reads_disk": gallery.plan_identify(BATCH, K).reads_disk,
        "names": [[match.name for match in answer.matches] for answer in answers],
        "scores": [[match.score for match in answer.matches] for answer in answers],
    }


def measure_faiss(rows: int, storage: str) -> dict[str, Any]:
    """The same by IndexFlatIP."""
    import faiss

    faiss.omp_set_num_threads(cpu_count())
    queries = _unit(make_queries(rows))
    with MemoryMeter() as meter:
        index = _index(0, rows, storage)
        one = _repeat(lambda: index.search(queries[:1], K))
        many = _repeat(lambda: index.search(queries, K))
        scores, found = index.search(queries, K)
    peak = max(meter.peak_bytes, meter.current_bytes)
    return {"one": one, "many": many, "peak": peak, **_described(scores, found)}


def search_pieces(rows: int, storage: str) -> dict[str, Any]:
    """The same answers of rows that do not fit: an index of each piece, one after the other; no times."""
    queries = _unit(make_queries(rows))
    scores, found = np.empty((BATCH, 0), np.float32), np.empty((BATCH, 0), np.int64)
    for first in range(0, rows, PIECE):
        near, where = _index(first, min(first + PIECE, rows), storage).search(queries, K)
        scores, found = np.hstack([scores, near]), np.hstack([found, where + first])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return _described(np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1))


def _index(begin: int, end: int, storage: str) -> Any:
    """IndexFlatIP of rows as a gallery stores them."""
    import faiss

    index = faiss.IndexFlatIP(DIM)
    for first in range(begin, end, CHUNK):
        index.add(_unit(make_rows(first, min(CHUNK, end - first))).astype(storage).astype(np.float32))
    return index


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _described(scores: npt.NDArray[np.float32], found: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {"names": [[f"person {row}" for row in line] for line in found.tolist()], "scores": scores.tolist()}


def _repeat(work: Callable[[], object]) -> float:
    """The median of some calls, the first left out; of long ones fewer."""
    began = time.perf_counter()
    work()
    times, count = [], 9 if time.perf_counter() - began < 1 else 3
    for _ in range(count):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _run(*words: str) -> dict[str, Any] | None:
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one row for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--storage", choices=["float32", "float16"], default="float32")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--one", choices=["make", "gallery", "faiss", "pieces"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        rows = options.rows[0]
        place = options.folder / f"{rows}-{options.storage}"
        if options.one == "make":
            print(json.dumps(make_gallery(place, rows, options.storage)))
        elif options.one == "gallery":
            print(json.dumps(measure_gallery(place, options.memory)))
        else:
            print(json.dumps((measure_faiss if options.one == "faiss" else search_pieces)(rows, options.storage)))
        return
    print(
        "| rows | made in | opened | rows from | one face | faiss | 64 faces | faiss | memory (plan) | faiss | agree |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for rows in options.rows:
        words = [str(options.folder), "--rows", str(rows), "--storage", options.storage, "--memory", options.memory]
        made = {} if (options.folder / f"{rows}-{options.storage}").exists() else _run(*words, "--one", "make")
        ours = _run(*words, "--one", "gallery")
        needed = rows * DIM * 4 * 1.1 + 1e9
        theirs = _run(*words, "--one", "faiss" if needed < psutil.virtual_memory().available else "pieces")
        print(_row(rows, made or {}, ours or {}, theirs or {}), flush=True)


def _row(rows: int, made: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    def seconds(values: dict[str, Any], name: str) -> str:
        value = values.get(name)
        return "" if value is None else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"

    def size(values: dict[str, Any], name: str) -> str:
        return format_bytes(float(values[name])) if name in values else ""

    agree = ""
    if ours and theirs:
        off = np.abs(np.array(ours["scores"]) - np.array(theirs["scores"])).max()
        same = np.mean(np.array(ours["names"]) == np.array(theirs["names"]))
        agree = f"{100 * same:.1f} % of names, scores to {off:.0e}"
    cells = [
        f"{rows:,}",
        seconds(made, "seconds"),
        seconds(ours, "open"),
        ("disk" if ours.get("reads_disk") else "memory") if ours else "",
        seconds(ours, "one"),
        seconds(theirs, "one"),
        seconds(ours, "many"),
        seconds(theirs, "many"),
        f"{size(ours, 'peak')} ({size(ours, 'predicted')})",
        size(theirs, "peak"),
        agree,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
