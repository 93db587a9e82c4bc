"""Interval rules against the operations themselves: which input pixels carry a gradient, or NaN, to an output."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outsize.tiler.analysis.network import LARGEST_DIRECT
from outsize.tiler.analysis.receptive import (
    AxisGraph,
    AxisNode,
    AxisRule,
    EnlargeBilinear,
    EnlargeNearest,
    Extents,
    Resample,
    ResampleMode,
    Same,
    Shift,
    Slide,
    compute_taps,
    footprint,
)
from outsize.tiler.base.geometry import Interval
from torch.nn import functional as F

from ...support.zoo import without_onednn

SIZE = 40


def touched(operation, wanted: Interval) -> Interval:
    """The hull of the inputs in [0, SIZE) that reach `wanted` outputs, found by poisoning one input at a time."""
    clean = operation(torch.ones(1, 1, 1, SIZE, dtype=torch.float64))[0, 0, 0]
    reach = []
    for position in range(SIZE):
        image = torch.ones(1, 1, 1, SIZE, dtype=torch.float64)
        image[..., position] = float("nan")
        result = operation(image)[0, 0, 0]
        assert result.shape == clean.shape
        if torch.isnan(result[wanted.start : wanted.stop]).any():
            reach.append(position)
    return Interval(start=min(reach), stop=max(reach) + 1)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_sliding_windows_need_what_convolution_reads(
    kernel: int, stride: int, dilation: int, data: st.DataObject
) -> None:
    extent = dilation * (kernel - 1) + 1
    padding = data.draw(st.integers(0, extent - 1))
    weight = torch.ones(1, 1, 1, kernel, dtype=torch.float64)
    outputs = (SIZE + 2 * padding - extent) // stride + 1
    start = data.draw(st.integers(0, outputs - 1))
    wanted = Interval(start=start, stop=data.draw(st.integers(start + 1, outputs)))
    rule = Slide(extent=extent, stride=stride, padding=padding)
    needed = rule.needs(wanted).clamp(SIZE)
    if needed.length == 0:
        return

    def convolve(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(image, weight, stride=(1, stride), padding=(0, padding), dilation=(1, dilation))

    with without_onednn():
        found = touched(convolve, wanted)
    # Dilated kernels skip pixels, so the hull may start or end inside the needed interval, never outside it.
    assert needed.contains(found)
    assert needed.start > found.start - dilation
    assert needed.stop < found.stop + dilation


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("wanted", [Interval(start=17, stop=18), Interval(start=20, stop=31)])
def test_upsampling_needs_what_torch_reads(factor: int, wanted: Interval) -> None:
    for rule, mode in ((EnlargeNearest(factor=factor), "nearest"), (EnlargeBilinear(factor=factor), "bilinear")):
        if factor == 1 and mode == "bilinear":
            continue  # torch reads the next pixel with weight zero, or not at all

        def enlarge(image: torch.Tensor, mode: str = mode) -> torch.Tensor:
            return F.interpolate(image, scale_factor=(1, factor), mode=mode)

        assert rule.needs(wanted) == touched(enlarge, wanted)


def unclamped_hull(rule: AxisRule, wanted: Interval) -> Interval:
    each = [rule.needs(Interval(start=i, stop=i + 1)) for i in range(wanted.start, wanted.stop)]
    return Interval(start=min(e.start for e in each), stop=max(e.stop for e in each))


rules = st.one_of(
    st.just(Same()),
    st.builds(Slide, extent=st.integers(1, 9), stride=st.integers(1, 4), padding=st.integers(0, 5)),
    st.builds(EnlargeNearest, factor=st.integers(1, 5)),
    st.builds(EnlargeBilinear, factor=st.integers(1, 5)),
    st.builds(Shift, offset=st.integers(-5, 5)),
)


@given(rules, st.integers(-100, 100), st.integers(1, 30))
def test_an_interval_needs_the_hull_of_its_pixels_needs(rule: AxisRule, start: int, length: int) -> None:
    wanted = Interval(start=start, stop=start + length)
    assert rule.needs(wanted) == unclamped_hull(rule, wanted)


@given(rules, st.integers(-100, 100), st.integers(1, 30), st.integers(-5, 5))
def test_needs_move_with_the_image_by_whole_strides(rule: AxisRule, start: int, length: int, steps: int) -> None:
    inputs = steps * rule.ratio.denominator
    outputs = int(inputs * rule.ratio)
    here = rule.needs(Interval(start=start, stop=start + length))
    there = rule.needs(Interval(start=start + outputs, stop=start + outputs + length))
    assert (there.start, there.stop) == (here.start + inputs, here.stop + inputs)


def test_a_join_needs_the_hull_over_its_paths() -> None:
    one = Fraction(1)
    graph = AxisGraph(
        nodes=(
            AxisNode(name="input", scale=one, sources=()),
            AxisNode(name="wide", scale=one, sources=((0, Slide(extent=7, stride=1, padding=3)),)),
            AxisNode(name="unused", scale=Fraction(1, 2), sources=((0, Slide(extent=99, stride=2, padding=9)),)),
            AxisNode(name="join", scale=one, sources=((0, Shift(offset=5)), (1, Same()))),
        )
    )
    assert graph.input_interval(Interval(start=10, stop=20)) == Interval(start=7, stop=25)
    assert graph.stride == 2
    assert graph.intervals(Interval(start=0, stop=1))[2] is None


@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 6), st.integers(1, 6))
def test_the_footprint_holds_every_pixel_under_the_output(start: int, length: int, up: int, down: int) -> None:
    scale = Fraction(up, down)
    under = footprint(Interval(start=start, stop=start + length), scale)
    assert under.start <= start / scale < under.start + 1
    assert under.stop - 1 < (start + length) / scale <= under.stop


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_takes_the_pixels_that_torch_takes(dtype: torch.dtype, mode: ResampleMode, layout: str) -> None:
    """By size and by factor, small and large, where exact arithmetic has ties: torch has two kernels for them."""
    pairs = [(n, m) for n in range(1, 260, 9) for m in (*range(1, 400, 7), 2 * n, 2 * n - 1, 2 * n + 1, 4 * n)]
    pairs += [(n, m) for n in (7501, 14999, 15000) for m in (15001, 22500, 29999, 30000, 44997)]
    for before, after in pairs:
        image = torch.arange(before, dtype=dtype).repeat(1, 5, 2, 1)
        if layout == "channels last":
            image = image.contiguous(memory_format=torch.channels_last)
        for factor in (None, after / before):
            if factor is not None and int(before * factor) < 1:
                continue
            options: dict[str, Any] = {"size": (2, after)} if factor is None else {"scale_factor": (1.0, factor)}
            taken = F.interpolate(image, mode=mode, **options)[0, 0, 0].numpy().astype(int)
            rule = Resample(
                mode=mode,
                align_corners=False,
                factor=factor,
                double=dtype == torch.float64,
                growth=Fraction(1),
                window=None,
                direct=layout == "channels last" or 2 + len(taken) <= LARGEST_DIRECT,
            )
            wanted = Interval(start=0, stop=len(taken))
            indices, weights = compute_taps(rule, wanted, Extents(image=1, operand=before, result=len(taken)))
            assert weights is None
            assert np.array_equal(indices[0], taken), (before, after, factor)
