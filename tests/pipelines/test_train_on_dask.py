"""`outsize train` on Dask: the same bits as in one process, on one worker, on two, and when one is killed in a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from outsize.tiler.training_cluster import TrainingCluster

from .test_train import done, make_scene, refusal, same_log, same_tensors

STEPS = 4
CHOICES = ("--widths", "4,6", "--core", "48", "--warm-up", "2", "--val-every", "2", "--steps", str(STEPS))
LOSS = ("--step", "image", "--loss", "cross-entropy+0.5*dice")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    scene, labels = make_scene(tmp_path_factory.mktemp("scene"))
    return ["train", scene, "--labels", labels, *CHOICES]


@pytest.fixture(scope="module")
def alone(words: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In this process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done(*words, *LOSS, "--threads", "1", "--out", out)
    return out


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with one worker, a thread of this process."""
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address


def same_training(one: Path, other: Path) -> bool:
    names = (f"state-{STEPS:08}", "best", "last")
    return same_log(one, other) and all(
        same_tensors(one / f"{name}.safetensors", other / f"{name}.safetensors") for name in names
    )


def test_two_workers_of_which_one_is_killed_in_a_step_make_the_same_training(
    words: list[Any], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, killed, calls = TrainingCluster._submit, [], 0

    def submit_and_kill(self: TrainingCluster, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        pids: Any = self.client.run(os.getpid) if calls == STEPS else {}
        future = submit(self, *arguments, **named)
        for pid in list(pids.values())[:1]:
            assert pid != os.getpid()
            os.kill(pid, signal.SIGKILL)
            killed.append(len(pids))
        return future

    monkeypatch.setattr(TrainingCluster, "_submit", submit_and_kill)
    values = done(*words, *LOSS, "--workers", "2", "--no-dashboard", "--out", tmp_path / "out")
    assert killed == [2]
    assert calls > 2 * STEPS - 1
    assert same_training(alone, tmp_path / "out")
    assert values["predicted_peak_bytes"] % 3 == 0


def test_a_schedulers_worker_goes_on_with_what_one_process_began(
    words: list[Any], alone: Path, address: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done(*words, *LOSS, "--scheduler", address, "--out", out)
    assert same_training(alone, out)
    assert "--workers 2 with" in refusal(*words, "--workers", "2", "--scheduler", address, "--out", tmp_path / "other")
