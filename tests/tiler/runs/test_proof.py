"""The proof that users run on their own networks: it holds for what is exact, and fails for what was made wrong."""

from __future__ import annotations

import pytest
import torch
from outsize.models import as_tile_network, load_model
from outsize.tiler.analysis import receptive
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.analysis.receptive import Extents, Slide
from outsize.tiler.base.errors import UntileableError
from outsize.tiler.base.geometry import Interval
from outsize.tiler.runs.proof import prove_network
from torch import nn

from ...support.analysed import analysed
from ...support.zoo import alive

pytestmark = pytest.mark.system


@pytest.mark.parametrize("method", ["window", "program"])
@pytest.mark.parametrize("name", ["unet depth 2", "strided", "average pooled", "plain unet"])
def test_exact_networks_are_proved(name: str, method: str) -> None:
    proof = prove_network(analysed(name, torch.float32), method)
    assert proof.passed, proof
    assert proof.method == method
    assert [step.name for step in proof.steps] == ["equality", "NaN outside", "1e30 outside", "one pixel less"]


@pytest.mark.parametrize("name", ["deeplab", "unet bilinear corners", "hrnet"])
def test_networks_that_only_programs_run_are_proved_by_them(name: str) -> None:
    proof = prove_network(analysed(name, torch.float32))
    assert proof.method == "program"
    assert proof.passed, proof


def test_the_shipped_model_is_proved_from_raw_bytes() -> None:
    network = analyze_network(as_tile_network(load_model()), bands=4, dtype="uint8")
    assert prove_network(network).passed


@pytest.mark.parametrize("method", ["window", "program"])
@pytest.mark.parametrize("side", ["start", "stop"])
def test_a_rule_that_is_one_pixel_short_is_found_out(monkeypatch: pytest.MonkeyPatch, method: str, side: str) -> None:
    right, right_under = Slide.needs, Slide.under

    def cut(interval: Interval) -> Interval:
        start, stop = interval.start + (side == "start"), interval.stop - (side == "stop")
        return Interval(start=start, stop=max(start, stop))

    def needs(rule: Slide, wanted: Interval) -> Interval:
        return cut(right(rule, wanted)) if rule.extent > 1 else right(rule, wanted)

    def reads(rule: Slide, wanted: Interval, extents: Extents) -> Interval:
        return cut(right_under(rule, wanted)).clamp(extents.operand)

    monkeypatch.setattr(receptive.Slide, "needs", needs)
    monkeypatch.setattr(receptive.Slide, "reads", reads)
    network = analyze_network(
        alive(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))), bands=3
    )
    proof = prove_network(network, method)
    assert not proof.passed
    assert not {step.name: step.passed for step in proof.steps}["NaN outside"]


def test_a_network_that_lets_nothing_through_proves_nothing() -> None:
    network = nn.Conv2d(3, 2, 3, padding=1)
    with torch.no_grad():
        network.weight.zero_()

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nan_to_num(self.a(x))

    proof = prove_network(analyze_network(Dead(), bands=3))
    assert not proof.passed
    assert "sees nothing" in proof.steps[-1].text


def test_a_network_that_looks_too_far_is_refused_with_the_numbers() -> None:
    far = nn.Conv2d(1, 1, 3, padding=1200, dilation=1200)
    with pytest.raises(UntileableError, match="looks 1200 pixels far, which takes an image of"):
        prove_network(analyze_network(far, bands=1))
