"""`outsize train` on Dask: the same bits as in one process, on one worker, on two, and when one is killed in a step."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster
from outsize.models.segmentation.training.step import StepEngine
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.training import cluster as training_cluster
from outsize.tiler.training.cluster import TrainingCluster

from ...support.train_commands import done, make_scene, refusal, same_log, same_tensors

pytestmark = pytest.mark.system

STEPS = 3
WINDOW = Window(y=50, x=60, height=7, width=9)
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


@pytest.mark.long
@pytest.mark.usefixtures("_warm_workers")
def test_two_workers_of_which_one_is_killed_in_a_step_make_the_same_training(
    words: list[Any], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second pass of the second step."""
    submit, killed, calls = TrainingCluster._submit, [], 0

    def submit_and_kill(self: TrainingCluster, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        pids: Any = self.client.run(os.getpid) if calls == 4 else {}
        future = submit(self, *arguments, **named)
        for pid in list(pids.values())[:1]:
            assert pid != os.getpid()
            os.kill(pid, signal.SIGKILL)
            killed.append(len(pids))
        return future

    monkeypatch.setattr(TrainingCluster, "_submit", submit_and_kill)
    values = done(*words, *LOSS, "--workers", "2", "--no-dashboard", "--out", tmp_path / "out")
    assert killed == [2]
    assert calls >= 2 * STEPS
    assert same_training(alone, tmp_path / "out")
    assert values["predicted_peak_bytes"] % 3 == 0


def test_a_schedulers_worker_makes_the_same_training(
    words: list[Any], alone: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, scatter, sent = tmp_path / "out", Client.scatter, list[int]()

    def count(self: Client, data: Any, **options: Any) -> Any:
        sent.append(len(data))
        return scatter(self, data, **options)

    monkeypatch.setattr(Client, "scatter", count)
    done(*words, *LOSS, "--scheduler", address, "--out", out)
    assert same_training(alone, out)
    # Once a step, though it has two passes.
    assert sent == [1] * STEPS
    # Steps of tiles too, of which there are fewer than groups.
    tiles, apart = tmp_path / "tiles", tmp_path / "apart"
    done(*words, "--step", "tiles:3", "--scheduler", address, "--out", tiles)
    done(*words, "--step", "tiles:3", "--threads", "1", "--out", apart)
    assert same_training(tiles, apart)
    # Nothing of it stays on the workers.
    assert not training_cluster._PLUGINS
    assert not training_cluster._WORKS
    assert "--workers 2 with" in refusal(*words, "--workers", "2", "--scheduler", address, "--out", tmp_path / "other")


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_scenes_that_workers_do_not_see_are_refused_before_the_first_step(
    kind: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, labels = make_scene(tmp_path / "scene")
    if kind == "zarr":
        scene = tmp_path / "scene.zarr"
        done("ingest", tmp_path / "scene" / "scene.tif", scene, "--no-dashboard")
    # Paths of this folder are found from others too.
    monkeypatch.chdir(tmp_path)
    here = open_raster(scene.relative_to(tmp_path))
    pixels = here.open_reader().read(WINDOW)
    anywhere = here.made_absolute()
    monkeypatch.chdir(tmp_path / "scene")
    assert np.array_equal(anywhere.open_reader().read(WINDOW), pixels)
    spread, out = StepEngine.spread_over, tmp_path / "out"

    def spread_elsewhere(self: StepEngine, cluster: TrainingCluster) -> None:
        """The worker shares this machine's disk: the scene is moved away for it."""
        hidden = scene.rename(tmp_path / "hidden")
        spread(self, cluster)
        hidden.rename(scene)

    monkeypatch.setattr(StepEngine, "spread_over", spread_elsewhere)
    words = ["train", scene, "--labels", labels, *CHOICES]
    said = refusal(*words, "--scheduler", address, "--out", out)
    assert re.match(rf"worker inproc://.*: .*scene\.{kind}.*; scenes and labels must lie under the same paths", said)
    assert not (out / "training.json").exists()
