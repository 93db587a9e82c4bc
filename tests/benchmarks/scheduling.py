"""What scheduling costs: tiles that do nothing, on a real scheduler and a worker in processes of their own.

    python -m outsize.tests.benchmarks.scheduling [--tiles 1000000] [--map]

Prints, each time the number of tiles has doubled, tiles a second, and of client, scheduler and worker the memory (PSS)
and the CPU time for one tile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
from distributed import Client

from ...tiler.base.geometry import order_cells
from ...tiler.cluster.schedule import job_on, run_cells
from ...tiler.cluster.tile_map import begin_message
from ...tiler.output.tile_record import TileRecord
from ...tiler.system.meter import process_bytes

STRIP_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """A job whose cells are done at once; its records are of the size that a run's are."""

    run_id: str
    in_flight: int = 8
    gdal_cache_bytes: int = 64_000_000
    packages: tuple[str, ...] = ()

    def open(self, *, watched: bool) -> Idle:
        del watched
        return self

    def run(self, row: int, column: int) -> TileRecord:
        chunks = {f"class/c/{row}/{column}": (123_456, "0" * 64)}
        return TileRecord(
            row=row,
            column=column,
            state="done",
            pixels=1 << 20,
            read_s=0.0123,
            compute_s=0.1234,
            write_s=0.0123,
            worker="pid 1",
            chunks=chunks,
        )

    def take_sketch(self, row: int, column: int) -> bytes:
        del row, column
        return b""

    def close(self) -> None: ...


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """(scheduler file, scheduler, worker of eight threads), each a process of its own."""
    file, processes = folder / "scheduler.json", []
    for name, options in (
        ("dask_scheduler", ["--host", "127.0.0.1", "--port", "0"]),
        ("dask_worker", ["--nworkers", "1", "--nthreads", "8", "--no-nanny"]),
    ):
        words = ["-W", "ignore", "-m", f"distributed.cli.{name}", "--scheduler-file", str(file), "--no-dashboard"]
        processes.append(subprocess.Popen([sys.executable, *words, *options], stderr=subprocess.DEVNULL))
        while not file.exists():
            time.sleep(0.1)
    try:
        yield file, processes[0], processes[1]
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()


def measure(tiles: int, *, with_map: bool) -> None:
    """Print one row each time that the number of tiles has doubled, and at the end."""
    side = round(tiles**0.5)
    counts = (-(-tiles // side), side)
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as (file, scheduler, worker):
        processes = {
            "client": psutil.Process(),
            "scheduler": psutil.Process(scheduler.pid),
            "worker": psutil.Process(worker.pid),
        }
        begin = begin_message(run="idle", title="idle", shape=counts, core=(1, 1), counts=counts)
        with (
            Client(scheduler_file=str(file)) as client,
            job_on(client, job := Idle(run_id="idle"), begin if with_map else None),
        ):
            # As a run does: an order that keeps nothing, and a byte for each tile that tells whether it is wanted.
            wanted = np.ones(counts, np.bool_)
            cells = (at for at in order_cells([0] * counts[0], [0] * counts[1], STRIP_ROWS) if wanted[at])
            before = {name: cpu_seconds(process) for name, process in processes.items()}
            began, due = time.perf_counter(), 1000
            for done, _ in enumerate(run_cells(client, job, islice(cells, tiles), "tile"), start=1):
                if done in (due, tiles):
                    due *= 2
                    row: dict[str, float] = {"tiles": done, "per_s": done / (time.perf_counter() - began)}
                    for name, process in processes.items():
                        row[f"{name}_mb"] = process_bytes(process) / 1e6
                        row[f"{name}_cpu_ms"] = 1000 * (cpu_seconds(process) - before[name]) / done
                    print(json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--map", action="store_true", help="with the tile map")
    options = parser.parse_args()
    measure(options.tiles, with_map=options.map)


if __name__ == "__main__":
    main()
