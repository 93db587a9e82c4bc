"""Kills at random moments, each followed by a resume: every result must be byte-identical to an undisturbed run's.

python -m outsize.tests.support.kill_campaign FOLDER [--kills 200] [--seed 0]

Victims, in turn: a worker (the run itself goes on), the client (its workers must not outlive it), the client and its
workers at once; of a cluster that the run only connects to, the scheduler, a worker, and the scheduler with the client.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import psutil
from distributed import Client
from outsize.sample_data.scene import Scene
from outsize.sample_data.write import write_scene

VICTIMS = ("worker", "client", "all", "scheduler", "worker of a cluster", "scheduler and client")
OF_CLUSTERS = VICTIMS[3:]
WORKERS = 2
CALM_S = 240.0
"""Within which an undisturbed run has to end."""


def outsize(*words: str | Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "outsize.pipelines.commands.cli", *map(str, words)]


def hash_chunks(out: Path) -> dict[str, str]:
    """Every chunk of an output, the tiles' states among them; not its metadata, which tells of times."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "zarr.json")
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Cluster:
    """A scheduler and two workers that are nobody's children."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "scheduler.json"

    def __enter__(self) -> Cluster:
        self.file.unlink(missing_ok=True)
        dask = [sys.executable, "-W", "ignore", "-m", "distributed.cli"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = (self.folder / "cluster.log").open("ab")
        for words in (
            [
                "dask_scheduler",
                "--scheduler-file",
                str(self.file),
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--no-dashboard",
            ],
            [
                "dask_worker",
                "--scheduler-file",
                str(self.file),
                "--nworkers",
                str(WORKERS),
                "--nthreads",
                "1",
                "--no-dashboard",
            ],
        ):
            command = [*dask[:-1], f"distributed.cli.{words[0]}", *words[1:]]
            self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            while not self.file.exists() and self.processes[0].poll() is None:
                time.sleep(0.05)
        log.close()
        # A `dask worker` one of whose processes dies while it starts gives up, with all of them: not a kill to survive.
        with Client(scheduler_file=str(self.file), timeout=CALM_S) as client:
            client.wait_for_workers(WORKERS, timeout=CALM_S)
        return self

    def kill_scheduler(self) -> None:
        self.processes[0].kill()

    def workers(self) -> list[psutil.Process]:
        return workers_of(psutil.Process(self.processes[1].pid))

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill_all([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])
            process.wait()


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def workers_of(client: psutil.Process) -> list[psutil.Process]:
    """Spawned processes that do tiles, as Dask starts them."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in client.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("spawn_main" in word for word in child.cmdline()):
                    found.append(child)
    return found


class Process(Protocol):
    """A running command, as subprocess has it."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


Log = IO[str]


def start_command(words: list[str], log: Log) -> Process:
    """The command in an interpreter of its own."""
    return subprocess.Popen(outsize(*words), stderr=log, stdout=subprocess.DEVNULL)


class Campaign:
    """Kills, counted."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        size: int = 1024,
        core: int = 128,
        victims: tuple[str, ...] = VICTIMS,
        latest: float = 1.1,
        calm_share: float = 0.4,
        more: tuple[str | Path, ...] = (),
        start: Callable[[list[str], Log], Process] = start_command,
    ) -> None:
        """Args:
        latest: moment of a kill, in times of a calm run.
        calm_share: of runs after a kill that are left in peace.
        more: words of every run.
        start: begins a command with those words, whose stderr is the log.
        """
        self._more, self._start = more, start
        self.folder, self.random, self.victims = folder, random.Random(seed), victims
        self.latest, self.calm_share = latest, calm_share
        self.kills: Counter[str] = Counter()
        self.early: Counter[str] = Counter()
        """Kills before the first tile was recorded."""
        self.finished = 0
        self.size, self.core = size, core
        folder.mkdir(parents=True, exist_ok=True)
        write_scene(folder / "scene", Scene(height=size, width=size))
        began = time.monotonic()
        self._call(*self._segment(folder / "calm.zarr"))
        self.usual_s = dict.fromkeys(victims, time.monotonic() - began)
        """Seconds of an undisturbed run, by victim: on a cluster whose workers are there already a run is shorter."""
        self.expected = hash_chunks(folder / "calm.zarr")

    def _segment(self, out: Path, *more: str | Path) -> list[str | Path]:
        scene = self.folder / "scene" / "scene.zarr"
        return [
            "segment",
            scene,
            out,
            "--core",
            str(self.core),
            "--no-dashboard",
            "--threads",
            "1",
            "--workers",
            str(WORKERS),
            *self._more,
            *more,
        ]

    def _call(self, *words: str | Path) -> None:
        with tempfile.TemporaryFile("w+") as log:
            process = self._start([*map(str, words)], log)
            if process.wait(timeout=CALM_S):
                log.seek(0)
                raise SystemExit(f"{words[0]} ended with {process.returncode}: {log.read()[-2000:]}")

    def run(self, kills: int) -> None:
        """Runs of an output until enough kills are done; each output is finished and compared."""
        while sum(self.kills.values()) < kills:
            out = self.folder / "out.zarr"
            for path in (out, out.with_name("out.zarr.run")):
                shutil.rmtree(path, ignore_errors=True)
            while True:
                victim = self.victims[sum(self.kills.values()) % len(self.victims)]
                if self._disturb(out, victim):
                    break
                if sum(self.kills.values()) >= kills or self.random.random() < self.calm_share:
                    self._call(*self._segment(out))
                    break
            self._compare(out)

    def _disturb(self, out: Path, victim: str) -> bool:
        """One run with one kill; whether it finished all the same."""
        with contextlib.ExitStack() as stack:
            cluster = stack.enter_context(Cluster(self.folder)) if victim in OF_CLUSTERS else None
            more = ["--scheduler-file", cluster.file] if cluster else []
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            began = time.monotonic()
            process = self._start([*map(str, self._segment(out, *more))], log)
            client = psutil.Process(process.pid)
            moment = self.random.uniform(0.2, self.latest) * self.usual_s[victim]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=moment)
            workers = workers_of(client)
            while victim == "worker" and not workers and process.poll() is None:
                time.sleep(0.05)
                workers = workers_of(client)
            if process.poll() is not None:  # it was faster than the kill
                self._require(process.returncode == 0, victim, log)
                self.usual_s[victim] = min(self.usual_s[victim], time.monotonic() - began)
                return True
            if victim == "worker":
                kill_all([self.random.choice(workers)])
            elif victim == "client":
                process.kill()
            elif victim == "all":
                kill_all([*workers, client])
            elif cluster is not None and victim == "worker of a cluster":
                kill_all([self.random.choice(cluster.workers())])
            elif cluster is not None:
                cluster.kill_scheduler()
                if victim == "scheduler and client":
                    process.kill()
            self.kills[victim] += 1
            records = out.with_name(out.name + ".run").glob("records-*.jsonl")
            self.early[victim] += not any(path.stat().st_size for path in records)
            code = process.wait(timeout=CALM_S)
            _, alive = psutil.wait_procs(workers, timeout=10)
            if alive:
                raise SystemExit(f"{len(alive)} workers outlived their client, killed: {victim}")
            if victim == "scheduler":
                # Its client must notice, say so, and be resumable; it may just have finished.
                self._require(code in (0, 1), victim, log)
            elif victim in ("worker", "worker of a cluster"):
                self._require(code == 0, victim, log)
            return code == 0

    def _require(self, holds: bool, victim: str, log: Log) -> None:
        if not holds:
            log.seek(0)
            raise SystemExit(f"after killing {victim}: {log.read()[-3000:]}")

    def _compare(self, out: Path) -> None:
        found = hash_chunks(out)
        wrong = {name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)}
        if wrong:
            raise SystemExit(f"{len(wrong)} chunks are lost or wrong: {sorted(wrong)[:5]}")
        self.finished += 1

    def sentence(self) -> str:
        parts = ", ".join(
            f"{victim} {self.kills[victim]} ({self.early[victim]} before a tile)" for victim in self.victims
        )
        return (
            f"{sum(self.kills.values())} kills: {parts}; {self.finished} outputs of {len(self.expected)} chunks "
            "finished, all byte-identical to the undisturbed one, 0 tiles lost or wrong"
        )


def main() -> None:
    """Run a campaign; ends with 1 at the first lost or wrong tile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    campaign = Campaign(options.folder, options.seed)
    while sum(campaign.kills.values()) < options.kills:
        campaign.run(min(options.kills, sum(campaign.kills.values()) + 10))
        print(f"{time.monotonic() - began:.0f} s: {campaign.sentence()}", flush=True)


if __name__ == "__main__":
    main()
