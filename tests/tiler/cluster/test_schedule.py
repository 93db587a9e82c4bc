"""Scheduling: workers that join, hang, hold too much or cannot do the job. Cells here count what holds them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask.utils import key_split
from distributed import Client, LocalCluster
from outsize.tests.benchmarks.scheduling import Idle
from outsize.tiler.base.errors import WorkerError
from outsize.tiler.base.text import format_bytes
from outsize.tiler.cluster import schedule
from outsize.tiler.cluster.schedule import Lost, forget_plugin, job_on, run_cells
from outsize.tiler.planning.decisions import SLOW_FLOPS_PER_S
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.runs.events import ClusterReady, Event, TileFinished
from outsize.tiler.runs.workers import compare_workers, find_device_peak

from ...support.runs import class_network, run, scene, stored, whole

pytestmark = pytest.mark.system


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A record that says which worker made it."""

    worker: str
    error: str = ""


HELD: dict[str, list[int]] = {}
"""By run: cells that this process holds, each time that one has begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A job whose cells take a while; workers are threads of this process."""

    run_id: str
    in_flight: int = 2
    gdal_cache_bytes: int = 1 << 20
    packages: tuple[str, ...] = ()
    seconds: float = 0.02

    def open(self, *, watched: bool) -> Waiter:
        del watched
        return Waiter(self)


@dataclass(slots=True)
class Waiter:
    job: Waiting
    held: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, row: int, column: int) -> Told:
        del column
        from distributed import get_worker

        with self.lock:
            self.held += 1
            HELD.setdefault(self.job.run_id, []).append(self.held)
        time.sleep(600 if row < 0 else self.job.seconds)
        with self.lock:
            self.held -= 1
        return Told(worker=get_worker().address)

    def take_sketch(self, row: int, column: int) -> bytes:
        del row, column
        return b""

    def close(self) -> None: ...


@contextmanager
def threads_here(workers: int, threads: int) -> Iterator[tuple[LocalCluster, Client]]:
    settings: dict[str, Any] = {"processes": False, "dashboard_address": "127.0.0.1:0"}
    with (
        LocalCluster(n_workers=workers, threads_per_worker=threads, **settings) as cluster,
        Client(cluster) as client,
    ):
        yield cluster, client


def test_a_worker_that_joins_gets_cells_and_one_that_leaves_takes_its_room_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedule, "LOOK_EVERY_S", 0.1)
    job = Waiting(run_id="joins", in_flight=4)
    known: list[int] = []
    submit = schedule._Flight.submit

    def counted(flight: schedule._Flight, cell: tuple[int, int], *, alone: bool = False) -> None:
        submit(flight, cell, alone=alone)
        known.append(len(flight.cells))

    monkeypatch.setattr(schedule._Flight, "submit", counted)
    with threads_here(1, 1) as (cluster, client), job_on(client, job):
        cells = run_cells(client, job, ((0, i) for i in range(220)), "tile")
        first = {outcome.worker for _, outcome in islice(cells, 10)}
        assert len(first) == 1
        assert max(known) == 2
        cluster.scale(4)
        client.wait_for_workers(4)
        joined = {outcome.worker for _, outcome in islice(cells, 80)}
        assert len(joined) == 4
        assert max(known) == 8
        cluster.scale(1)
        known.clear()
        assert sum(1 for _ in cells) == 130
        assert max(known[20:]) == 2


def test_a_process_holds_no_more_than_the_plan_says_whatever_its_threads() -> None:
    job = Waiting(run_id="holds")
    with threads_here(1, 8) as (_, client), job_on(client, job):
        assert len(list(run_cells(client, job, [(0, i) for i in range(60)], "tile"))) == 60
    assert max(HELD["holds"]) == 2


@pytest.mark.parametrize(("cell_s", "hangs"), [(0.0, True), (10.0, False)])
def test_the_first_cells_get_the_time_that_their_work_takes(
    monkeypatch: pytest.MonkeyPatch, cell_s: float, hangs: bool
) -> None:
    """Nothing has ended yet that would tell how long a cell takes."""
    monkeypatch.setattr(schedule, "LOOK_EVERY_S", 0.1)
    job = Waiting(run_id=f"first-{cell_s}", seconds=1.0)
    with threads_here(1, 1) as (_, client), job_on(client, job):
        ((_, outcome),) = run_cells(client, job, [(0, 0)], "tile", patience=0.3, cell_s=cell_s)
    assert isinstance(outcome, Lost) == hangs


def test_a_slow_tile_s_time_is_the_largest_one_s_share_of_the_work() -> None:
    plan = plan_tiles((3, 1000, 700), class_network(), core=256, memory="4GB", method="window")
    areas = [plan.tile(*at).window.pixels for at in plan.grid]
    assert plan.slow_tile_s == pytest.approx(plan.flops * max(areas) / sum(areas) / SLOW_FLOPS_PER_S)


@contextmanager
def beside(cluster: LocalCluster, **packages: str) -> Iterator[Callable[[], None]]:
    """Gives what starts a worker process on which packages are otherwise, and waits for it."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        words = [f"{name}={how}" for name, how in packages.items()]
        module = "outsize.tests.support.foreign_worker"
        command = [sys.executable, "-m", module, cluster.scheduler_address, *words]
        before = len(cluster.scheduler.workers)
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        until = time.monotonic() + 60
        while len(cluster.scheduler.workers) == before:
            assert started[-1].poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture
def address() -> Iterator[tuple[LocalCluster, Client]]:
    """One worker in this process, whose scheduler other processes can reach."""
    settings: dict[str, Any] = {"processes": False, "protocol": "tcp", "host": "127.0.0.1"}
    settings["dashboard_address"] = "127.0.0.1:0"
    with LocalCluster(n_workers=1, threads_per_worker=2, **settings) as cluster, Client(cluster) as client:
        yield cluster, client


GOES_ON = "mend or remove .*, then the same command goes on"


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        ({"openvino": "2020.1"}, r"worker tcp://\S+ .*openvino 20\S+ of the command, 2020\.1 there"),
        ({"outsize": "gone"}, r"every worker needs outsize \S+, .*; worker tcp://\S+ has none"),
    ],
)
def test_a_worker_of_other_versions_stops_the_run_before_anything_is_written(
    tmp_path: Path, address: tuple[LocalCluster, Client], packages: dict[str, str], reason: str
) -> None:
    cluster, client = address
    with beside(cluster, **packages) as start:
        start()
        with pytest.raises(WorkerError, match=f"{reason}.*{GOES_ON}"):
            run(scene(tmp_path, 70, 70), class_network(), tmp_path / "o.zarr", client, engine="openvino")
    assert not (tmp_path / "o.zarr").exists()


def test_a_worker_that_joins_and_cannot_do_tiles_stops_the_run_and_fails_none(
    tmp_path: Path, address: tuple[LocalCluster, Client]
) -> None:
    cluster, client = address
    source, out = scene(tmp_path, 450, 450), tmp_path / "o.zarr"
    with beside(cluster, openvino="broken") as start:

        def join(event: Event) -> None:
            if isinstance(event, TileFinished) and event.finished == 1:
                start()

        with pytest.raises(WorkerError, match=rf"worker tcp://\S+ \(process \d+ on .*openvino.*{GOES_ON}"):
            run(source, class_network(), out, client, engine="openvino", listener=join)
    summary = run(source, class_network(), out, client, engine="openvino")
    assert summary.failed_tiles == ()
    assert summary.resumed_tiles >= 1
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_a_worker_of_another_version_that_joins_does_no_cell(address: tuple[LocalCluster, Client]) -> None:
    cluster, client = address
    job = Idle(run_id="older", packages=("openvino",))
    with beside(cluster, openvino="2020.1") as start, job_on(client, job):
        cells = run_cells(client, job, ((0, i) for i in range(5000)), "tile")
        next(cells)
        start()
        with pytest.raises(
            WorkerError, match=rf"worker tcp://\S+ .*openvino 20\S+ of the command, 2020\.1 there; {GOES_ON}"
        ):
            for _ in cells:
                pass


def test_workers_that_differ_from_the_plan_are_told(tmp_path: Path) -> None:
    told: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, ClusterReady):
            told.append(event.unplanned)

    with threads_here(2, 5) as (_, client):
        run(scene(tmp_path, 70, 70), class_network(), tmp_path / "o.zarr", client, listener=listen, workers=1)
    plan = plan_tiles((3, 700, 700), class_network(), core=64, memory="4GB", workers=2)
    each = format_bytes((plan.memory.total_bytes - plan.memory.client_bytes) // 2)
    assert told[0].startswith("2 worker processes, planned for 1: up to ")
    assert told[0].endswith("; of up to 5 threads no more than 2 work at once in each")
    assert compare_workers(plan, [2, 2]) == ""
    assert compare_workers(plan, [2]) == f"1 worker process, planned for 2: up to {each} each"
    assert compare_workers(plan, [2, 1]) == "with less than 2 threads reading and writing wait for the computation"


def test_a_worker_s_environment_is_completed_and_never_changed(
    address: tuple[LocalCluster, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers that are threads of this process may have set it here.
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    cluster, client = address
    job = Idle(run_id="environment", gdal_cache_bytes=48 << 20)

    def look() -> tuple[str | None, int]:
        import os

        import zarr

        return os.environ.get("GDAL_CACHEMAX"), zarr.config.get("async.concurrency")

    before = look()
    with beside(cluster) as start:
        start()
        with job_on(client, job):
            found: Any = client.run(look)
    here = {worker.worker_address for worker in cluster.workers.values()}
    assert [value for name, value in found.items() if name not in here] == [("48", 4)]
    # The command's own process is its own affair.
    assert [value for name, value in found.items() if name in here] == [before]


def test_a_figure_that_a_worker_does_not_know_costs_neither_the_run_nor_the_others_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two workers, the second has come as the last tile was done."""
    monkeypatch.setattr("outsize.tiler.runs.workers.device_peak", lambda _, dask_worker: {0: 7}[dask_worker.name])
    with threads_here(2, 1) as (_, client):
        assert find_device_peak(client, "over") == 7
    assert find_device_peak(client, "over") == 0


def test_what_dask_remembers_of_cells_does_not_grow_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "FORGET_EVERY", 20)
    job, names, kinds = Idle(run_id="names", in_flight=8), list[int](), list[int]()
    with threads_here(1, 8) as (cluster, client), job_on(client, job):
        spans = cluster.scheduler.extensions["spans"].spans
        for _ in run_cells(client, job, ((0, index) for index in range(120)), "tile"):
            names.append(key_split.cache_info().currsize)
            kinds.append(max(len(span.metadata["collections"]) for span in spans.values() if span.metadata))
    assert len(names) == 120
    assert max(names[30:]) < 70
    assert 1 < max(kinds[30:]) < 70


class _Plugins:
    """What a client says of its connection, and which plugins it was asked to forget."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.forgotten: list[str] = []

    def unregister_worker_plugin(self, name: str) -> None:
        self.forgotten.append(name)
        raise OSError(name)


def test_a_lost_scheduler_is_not_looked_for_to_forget_a_plugin() -> None:
    for status, forgotten in (("running", ["plugin"]), ("connecting", [])):
        client: Any = _Plugins(status)
        forget_plugin(client, "plugin")
        assert client.forgotten == forgotten
