"""Windows and lazy arrays: from threads, forked processes and Dask, with the weights that the module has."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from distributed import Client
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import EngineError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.raster import Raster
from outsize.tiler.runs import inference
from outsize.tiler.runs.inference import lazy_predict, predict_window
from torch import nn

from ...support.forks import in_a_fork
from ...support.runs import class_network, logit_network, run, scene, stored, whole

pytestmark = pytest.mark.system

THREADS = 8


def windows_of(shape: tuple[int, int], side: int) -> list[Window]:
    return [
        Window(y=y, x=x, height=min(side, shape[0] - y), width=min(side, shape[1] - x))
        for y in range(0, shape[0], side)
        for x in range(0, shape[1], side)
    ]


def by_threads(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


class _Shared:
    """An engine whose results are its own memory, which says whose they are; slow enough to be met in between."""

    def __init__(self) -> None:
        self._buffer = np.zeros((1, 4, 4), np.float32)
        self.callers = 0

    def run_tile(self, image: np.ndarray, tile: Any) -> np.ndarray:
        del image
        self.callers += 1
        assert self.callers == 1, "two threads are in one engine"
        self._buffer[:] = tile.core.y * 1000 + tile.core.x
        time.sleep(0)
        self.callers -= 1
        return self._buffer

    def device_peak_bytes(self) -> int:
        return 0


def test_no_thread_gets_another_threads_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitiser: the engine returns its buffer's owner, so that a result that is not copied in time shows."""
    raster, opened = open_raster(scene(tmp_path, 96, 96)), []

    def open_engine(*_: Any) -> _Shared:
        opened.append(_Shared())
        return opened[-1]

    monkeypatch.setattr(inference, "_open_engine", open_engine)
    network = logit_network("convolution")
    windows = windows_of((96, 96), 8) * 2
    got = by_threads(lambda window: predict_window(raster, network, window), windows)
    time.sleep(0)
    wrong = [w for w, values in zip(windows, got, strict=True) if not (values == w.y * 1000 + w.x).all()]
    assert not wrong
    assert len(opened) == 1


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("by", ["window", "program"])
def test_windows_by_threads_equal_the_whole_image(tmp_path: Path, engine: str, by: str) -> None:
    """Of two shapes, and so of two compiled forms, in turns; programs differ wherever they lie."""
    network = class_network()
    if by == "program":
        enlarged = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        network = analyze_network(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ZeroPad2d(1), enlarged).eval(), 3)
        assert network.window_refusal
    source = scene(tmp_path, 97, 131)
    raster, expected = open_raster(source), whole(network, source)
    windows = windows_of((96, 120), 24)[:12] * 3 if by == "window" else windows_of((96, 120), 60) * 6
    windows.insert(20, Window(y=3, x=5, height=50, width=40))

    def differs(window: Window) -> bool:
        found = predict_window(raster, network, window, engine=engine)
        return not np.allclose(found, expected[(slice(None), *window.slices())], atol=1e-3)

    assert not any(by_threads(differs, windows))


@pytest.mark.long
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_a_hundred_thousand_windows_by_eight_threads(tmp_path: Path, engine: str) -> None:
    network, source = class_network(), scene(tmp_path, 160, 160)
    raster, expected = open_raster(source), whole(class_network(), source)
    windows = windows_of((160, 160), 8) * 125  # 50,000 by each engine
    windows.sort(key=lambda window: network.input_window(window, (160, 160)).shape)  # which OpenVINO compiles anew

    def differs(window: Window) -> bool:
        found = predict_window(raster, network, window, engine=engine)
        return not np.array_equal(found, expected[(slice(None), *window.slices())])

    assert len(windows) == 50_000
    assert sum(by_threads(differs, windows)) == 0


def test_networks_are_analysed_from_threads() -> None:
    def analysed(seed: int) -> tuple[int, int]:
        torch.manual_seed(seed)
        network = analyze_network(nn.Sequential(nn.Conv2d(3, 4, 2 * seed + 1, padding=seed), nn.ReLU()), 3)
        return seed, network.halo.top

    assert by_threads(analysed, [1, 2, 3, 4]) == [(seed, seed) for seed in (1, 2, 3, 4)]


def test_whole_rasters_run_from_threads(tmp_path: Path, client: Client) -> None:
    sources = [scene(tmp_path, 90 + 7 * number, 131) for number in range(3)]
    outs = [tmp_path / f"{number}.zarr" for number in range(3)]
    by_threads(lambda at: run(sources[at], class_network(), outs[at], client), [0, 1, 2])
    for source, out in zip(sources, outs, strict=True):
        assert np.array_equal(stored(out), whole(class_network(), source))


def test_a_running_loop_does_not_matter(tmp_path: Path) -> None:
    """As in a notebook, whose cells run inside a loop of asyncio."""
    source = scene(tmp_path, 97, 131)
    raster, expected = open_raster(source), whole(class_network(), source)

    async def cell() -> np.ndarray:
        first = predict_window(raster, class_network(), Window(y=0, x=0, height=97, width=60))
        lazy = lazy_predict(raster, class_network(), chunk=50)
        return np.concatenate([first, np.asarray(lazy[:, :, 60:].compute())], axis=2)

    assert np.array_equal(asyncio.run(cell()), expected)


def test_lazy_arrays_are_computed_by_threads_and_by_dask_workers(tmp_path: Path, client: Client) -> None:
    source = scene(tmp_path, 97, 131)
    lazy, expected = lazy_predict(open_raster(source), class_network(), chunk=66), whole(class_network(), source)
    assert np.array_equal(lazy.compute(scheduler="threads", num_workers=THREADS), expected)
    assert np.array_equal(client.compute(lazy, sync=True), expected)
    # What a worker process gets is analysed there once, however many blocks it computes.
    networks = []
    for _ in range(2):
        copy = pickle.loads(cloudpickle.dumps(lazy))
        assert np.array_equal(copy[:, 30:50, 40:90].compute(), expected[:, 30:50, 40:90])
        networks.append(inference._RESTORED[lazy.name.removeprefix("outsize-")].network)
    assert networks[0] is networks[1] is not class_network()


def _one_layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2)).eval()


def _tile(raster: Raster, network: Network, engine: str) -> np.ndarray:
    return predict_window(raster, network, Window(y=10, x=20, height=30, width=40), engine=engine)


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_weights_that_were_written_to_are_those_that_count(tmp_path: Path, engine: str) -> None:
    source = scene(tmp_path, 97, 131)
    raster, module = open_raster(source), _one_layer()
    network = analyze_network(module, 3)
    before = _tile(raster, network, engine)
    with torch.no_grad():
        module[0].weight.mul_(2)
        module[0].bias.zero_()
    after = _tile(raster, network, engine)
    assert not np.allclose(before, after)
    assert np.allclose(after, whole(network, source)[:, 10:40, 20:60], atol=1e-4)


def test_a_module_that_is_no_longer_what_was_analysed_is_refused(tmp_path: Path) -> None:
    raster, module = open_raster(scene(tmp_path, 97, 131)), _one_layer()
    network = analyze_network(module, 3)
    module.train()
    with pytest.raises(UsageError, match=r"must be in eval mode.*got its part '1'"):
        _tile(raster, network, "torch")
    module.eval()
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)
    with pytest.raises(UsageError, match=r"'0\.weight' was replaced since; call analyze_network again"):
        _tile(raster, network, "openvino")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_computes_too_or_says_why_not(tmp_path: Path) -> None:
    """Threads of OpenVINO and OpenMP do not come along, and whoever waits for them waits for ever."""
    source = scene(tmp_path, 197, 131)
    raster, network, expected = open_raster(source), class_network(), whole(class_network(), source)
    for engine in ("openvino", "torch"):
        _tile(raster, network, engine)
    seen = threading.Event()  # a lock that another thread holds as the process is forked
    holder = threading.Thread(target=lambda: inference._ENGINES._looking.__enter__() or seen.wait(60), daemon=True)
    holder.start()
    try:
        found = in_a_fork(lambda: predict_window(raster, network, Window(y=0, x=0, height=197, width=131)))
    finally:
        seen.set()
        holder.join()
        inference._ENGINES._looking._renew()
    assert np.array_equal(found, expected)
    refused = in_a_fork(lambda: predict_window(raster, network, Window(y=0, x=0, height=9, width=9), engine="openvino"))
    assert isinstance(refused, EngineError)
    assert "was forked from one that had computed by OpenVINO" in str(refused)
