"""Modules that cannot be traced, with a halo that the user states: right halos run, wrong ones are stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from distributed import Client
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.analysis.stated import StatedNetwork, state_network
from outsize.tiler.base.errors import ExactnessError, UntileableError, UsageError
from outsize.tiler.base.memory import EngineMemory
from outsize.tiler.output.store import open_array
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.runs import memory_probe
from outsize.tiler.runs.proof import prove_network
from outsize.tiler.runs.run import predict
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.rasters import write_geotiff
from ...support.zoo import alive


class Untraceable(nn.Module):
    """Three convolutions around a pooling; leaves for numpy in between, where torch.export cannot follow."""

    def __init__(self, kind: str = "same") -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)
        self.c = nn.Conv2d(4, 2, 3, padding=1)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(self.a(x), 2, ceil_mode=True)
        y = torch.from_numpy(np.tanh(self.b(y).detach().numpy()))
        if self.kind == "half":
            return self.c(y)
        return self.c(F.interpolate(y, scale_factor=2.0)[..., : x.shape[2], : x.shape[3]])


# As a user's script is sent to workers and to the memory probe: by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

HALO = {"same": 8, "half": 9}
"""1 + 2 * 2 + 2 * 1, and the pooling's and enlarging's phases; c is at half the size in "half"."""


def stated(kind: str = "same", halo: int | None = None, stride: int | None = 2) -> StatedNetwork:
    torch.manual_seed(0)
    return state_network(
        alive(Untraceable(kind)).float(), 3, "float32", halo=HALO[kind] if halo is None else halo, stride=stride
    )


def known_memory(*_: object) -> EngineMemory:
    return EngineMemory(worker_bytes=0, factor=10, constant_bytes=0)


@pytest.mark.parametrize(("kind", "stride"), [("same", None), ("half", 2)])
def test_a_run_equals_the_whole_image(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch, kind: str, stride: int | None
) -> None:
    if kind == "same":  # the other measures what it takes
        monkeypatch.setattr(memory_probe, "_find", known_memory)
    network = stated(kind, stride=stride)
    image = np.random.default_rng(0).normal(size=(3, 213, 250)).astype(np.float32)
    source = write_geotiff(tmp_path / "s.tif", image)
    summary = predict(source, network, tmp_path / "o.zarr", client=client, core=64)
    assert summary.start_check is not None
    assert summary.start_check.passed
    assert summary.engine == "torch"
    with torch.no_grad():
        whole = network.module(torch.from_numpy(image)[None])[0].numpy()
    found = np.asarray(open_array(tmp_path / "o.zarr", "logits")[:])
    assert found.shape == whole.shape
    assert np.abs(found - whole).max() < 1e-4 * np.abs(whole).max()
    # What it takes was measured once; another halo would measure again.
    monkeypatch.setattr(memory_probe, "_find", known_memory)
    assert predict(source, network, tmp_path / "o.zarr", client=client, core=64).tiles == 0
    other = stated(kind, halo=HALO[kind] + 2, stride=stride)
    with pytest.raises(Exception, match="was made by another run: network"):
        predict(source, other, tmp_path / "o.zarr", client=client, core=64)


@pytest.mark.parametrize(("halo", "stride"), [(3, 2), (8, 3), (0, 2)])
def test_a_wrong_halo_or_stride_is_stopped_before_anything_is_written(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch, halo: int, stride: int
) -> None:
    monkeypatch.setattr(memory_probe, "_find", known_memory)
    image = np.random.default_rng(0).normal(size=(3, 213, 250)).astype(np.float32)
    source = write_geotiff(tmp_path / "s.tif", image)
    with pytest.raises(ExactnessError, match="the start check must agree"):
        predict(source, stated(halo=halo, stride=stride), tmp_path / "o.zarr", client=client, core=63)
    assert not (tmp_path / "o.zarr").exists()


def test_the_plan_says_that_the_halo_is_only_stated() -> None:
    network = stated()
    plan = plan_tiles((3, 3000, 3000), network, memory="3GB")
    assert "as stated, not derived" in plan.explain()
    assert plan.engine == "torch"
    assert plan.flops > 0
    assert network.output_shape((213, 250)) == (213, 250)
    for options in ({"method": "program"}, {"engine": "openvino"}):
        with pytest.raises(UsageError, match="stated"):
            plan_tiles((3, 300, 300), network, **options)
    with pytest.raises(UntileableError, match="cannot be proved"):
        prove_network(network)


def test_networks_that_are_known_or_known_to_be_inexact_are_refused() -> None:
    with pytest.raises(UsageError, match=r"can be traced, and its halo is 1 px; leave --halo out"):
        state_network(nn.Conv2d(3, 2, 3, padding=1), 3, "float32", halo=1)
    with pytest.raises(UntileableError, match="whole-image statistics"):
        state_network(nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)), 3, "float32", halo=100)
    with pytest.raises(UsageError, match="halo must be >= 0"):
        state_network(Untraceable(), 3, "float32", halo=-1)
    with pytest.raises(UntileableError, match="state its --halo"):
        analyze_network(Untraceable(), 3)


def test_a_stem_that_cannot_be_traced_is_padded_to_its_multiple(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 2, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.from_numpy(np.tanh(self.a(x).detach().numpy())))

    monkeypatch.setattr(memory_probe, "_find", known_memory)
    network = state_network(alive(Stem()).float(), 3, "float32", halo=4, stride=8)
    assert network.size_multiple == 4
    image = np.random.default_rng(0).normal(size=(3, 93, 130)).astype(np.float32)
    source = write_geotiff(tmp_path / "s.tif", image)
    predict(source, network, tmp_path / "o.zarr", client=client, core=64, fill=(1.0, 1.0, 1.0))
    with torch.no_grad():
        padded = F.pad(torch.from_numpy(image)[None], (0, 2, 0, 3), value=1.0)
        whole = network.module(padded)[0, :, :93, :130].numpy()
    found = np.asarray(open_array(tmp_path / "o.zarr", "logits")[:])
    assert found.shape == whole.shape
    assert np.abs(found - whole).max() < 1e-5
