"""Random networks: whatever the operations and however they are joined, accepted means exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.analysis.program import make_program
from outsize.tiler.base.errors import UntileableError
from outsize.tiler.base.geometry import Grid
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.zoo import alive

pytestmark = pytest.mark.system

CHANNELS = 4
SMALLEST = 44
"""Sides of the images; operations are drawn so that this leaves something of every tensor."""


def convolution(draw: st.DrawFn) -> nn.Module:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    return nn.Conv2d(
        CHANNELS,
        CHANNELS,
        kernel,
        stride=draw(st.sampled_from([1, 1, 2, 3])),
        padding=(draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        dilation=draw(st.sampled_from([1, 1, 2, 3])),
        groups=draw(st.sampled_from([1, 2, 4])),
    )


def transposed(draw: st.DrawFn) -> nn.Module:
    stride = draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 5))
    return nn.ConvTranspose2d(
        CHANNELS,
        CHANNELS,
        kernel,
        stride=stride,
        padding=draw(st.integers(0, min(1, kernel - 1))),
        output_padding=draw(st.integers(0, stride - 1)),
        groups=draw(st.sampled_from([1, 2])),
    )


def pooling(draw: st.DrawFn) -> nn.Module:
    kernel = draw(st.integers(2, 4))
    options: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, kernel // 2)),
        "ceil_mode": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return nn.MaxPool2d(**options)
    return nn.AvgPool2d(**options, count_include_pad=draw(st.booleans()))


class Resize(nn.Module):
    def __init__(self, factor: float, mode: str, corners: bool) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"scale_factor": factor, "mode": mode}
        if mode in ("bilinear", "bicubic"):
            self.options["align_corners"] = corners

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, **self.options)


def resizing(draw: st.DrawFn) -> nn.Module:
    mode = draw(st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic"]))
    return Resize(draw(st.sampled_from([2.0, 3.0, 1.5, 0.5])), mode, draw(st.booleans()))


class Pad(nn.Module):
    def __init__(self, amounts: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.amounts, self.mode = amounts, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts, mode=self.mode)


def padding(draw: st.DrawFn) -> nn.Module:
    mode = draw(st.sampled_from(["constant", "reflect", "replicate"]))
    least = -2 if mode == "constant" else 0
    return Pad(tuple(draw(st.integers(least, 3)) for _ in range(4)), mode)


class Slice(nn.Module):
    def __init__(self, start: int, stop: int, step: int) -> None:
        super().__init__()
        self.start, self.stop, self.step = start, stop, step

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.start : x.shape[2] - self.stop, :: self.step]


def slicing(draw: st.DrawFn) -> nn.Module:
    return Slice(draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 2)))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(CHANNELS, 4 * CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.a(x), 2)


def pointwise(draw: st.DrawFn) -> nn.Module:
    return draw(st.sampled_from([nn.ReLU, nn.GELU, nn.Sigmoid, nn.Hardswish, Shuffle]))()


BLOCKS = (convolution, convolution, transposed, pooling, resizing, padding, slicing, pointwise)


class Random(nn.Module):
    """Blocks in a row, some of them joined with an earlier tensor brought to their size, and the image's size at the
    end."""

    def __init__(self, blocks: list[nn.Module], joins: dict[int, tuple[int, str]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.joins = joins
        self.head = nn.Conv2d(CHANNELS, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tensors = [self.stem(x)]
        for index, block in enumerate(self.blocks):
            y = block(tensors[-1])
            if index in self.joins:
                earlier, mode = self.joins[index]
                y = y + F.interpolate(tensors[earlier], size=y.shape[-2:], mode=mode)
            tensors.append(y)
        return self.head(F.interpolate(tensors[-1], size=x.shape[-2:], mode="bilinear"))


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    blocks: list[nn.Module] = []
    joins: dict[int, tuple[int, str]] = {}
    x = torch.zeros(1, CHANNELS, SMALLEST, SMALLEST)
    for _ in range(draw(st.integers(1, 6))):
        block = draw(st.sampled_from(BLOCKS))(draw)
        try:
            with torch.no_grad():
                y = block(x)
        except RuntimeError:  # torch has no such operation at this size
            continue
        if min(y.shape[-2:]) < 6 or max(y.shape[-2:]) > 4 * SMALLEST:
            continue
        x = y
        blocks.append(block)
        if draw(st.integers(0, 2)) == 0:
            joins[len(blocks) - 1] = (
                draw(st.integers(0, len(blocks) - 1)),
                draw(st.sampled_from(["nearest", "bilinear"])),
            )
    return Random(blocks, joins)


def require_exact(module: nn.Module, shape: tuple[int, int], cell: tuple[int, int], seed: int) -> None:
    refusal = ""
    network = None
    try:
        network = analyze_network(alive(module, seed), bands=3)
    except UntileableError as error:
        refusal = str(error)
    # What is fit for some sizes only may be refused; not understanding an operation may not.
    assert "no rule" not in refusal
    assume(network is not None)
    assert network is not None
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn((1, 3, *shape), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        whole = network.module(image)[0]
        scale = max(1.0, float(whole.abs().max()))
        for at in (grid := Grid(shape=network.output_shape(shape), cell=cell)):
            core = grid.window(*at)
            expected = whole[(slice(None), *core.slices())]
            program = make_program(network, shape, core)
            tile = program(image[(..., *program.window.slices())])[0][0]
            assert tile.shape == expected.shape
            assert float((tile - expected).abs().max()) < 1e-10 * scale
            if not network.window_refusal:
                window = network.input_window(core, shape)
                result = network.module(image[(..., *window.slices())])[0]
                y, x = core.y - window.y, core.x - window.x
                cut = result[:, y : y + core.height, x : x + core.width]
                assert float((cut - expected).abs().max()) < 1e-10 * scale


CASES = st.tuples(st.integers(SMALLEST, 71), st.integers(SMALLEST, 71))
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@given(networks(), CASES, st.integers(13, 40), st.integers(0, 1000))
@settings(max_examples=12, deadline=None, suppress_health_check=QUIET)
def test_random_networks_are_exact(module: nn.Module, shape: tuple[int, int], cell: int, seed: int) -> None:
    require_exact(module, shape, (cell, cell + 5), seed)


@pytest.mark.long
@given(networks(), CASES, st.integers(13, 40), st.integers(0, 1000))
@settings(max_examples=1000, deadline=None, suppress_health_check=QUIET)
def test_a_thousand_random_networks_are_exact(module: nn.Module, shape: tuple[int, int], cell: int, seed: int) -> None:
    require_exact(module, shape, (cell, cell + 5), seed)
