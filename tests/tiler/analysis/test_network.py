"""What analysis refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from outsize.tiler.analysis.graph import find_accepted_sizes
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.analysis.operations import nearest_is_exact
from outsize.tiler.base.errors import UntileableError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.planning.method import choose_method
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.zoo import PlainUNet, alive


class Wrapped(nn.Module):
    """A convolution, then a function of its result and the image."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), x)


def sorted_in_space(y: Tensor, _: Tensor) -> Tensor:
    return y.sort(dim=-1).values


REFUSED = {
    "global pooling": (lambda y, _: y * F.adaptive_avg_pool2d(y, 1), "whole-image statistics"),
    "global mean": (lambda y, _: y * y.mean((2, 3), keepdim=True), "whole-image statistics"),
    "group norm": (lambda y, _: F.group_norm(y, 2), "whole-image statistics"),
    "instance norm": (lambda y, _: F.instance_norm(y), "whole-image statistics"),
    "sorting in space": (sorted_in_space, "any pixel of the image"),
    "fft": (lambda y, _: torch.fft.fft2(y).abs(), "any pixel of the image"),
    "grid sample": (
        lambda y, _: F.grid_sample(y, torch.zeros(1, 5, 5, 2), align_corners=False),
        "any pixel of the image",
    ),
    "positions": (lambda y, _: y * torch.arange(y.shape[-1]), "tensor of the image's size"),
    "size as a number": (lambda y, _: y / y.shape[-1], "image's size as a number"),
    "sizes that torch.export gets wrong": (
        lambda y, x: F.interpolate(F.max_pool2d(y, 2, 2, 1, ceil_mode=True), size=x.shape[-2:]),
        "torch.export says .* leave ceil_mode out",
    ),
    "circular padding": (lambda y, _: F.pad(y, (1, 1, 1, 1), mode="circular"), "circular padding"),
    "flip": (lambda y, _: y.flip(-1), "any pixel of the image"),
    "crop to a fixed size": (lambda y, _: y[..., :40], "fixes|cuts|above|cannot be tiled"),
    "crop from the end": (lambda y, _: y[..., -5:], "cannot be tiled"),
    "writing into a part": (lambda y, _: _write_into_part(y), "writes in place"),
    "joining side by side": (lambda y, _: torch.cat([y, y], dim=-1), "side by side"),
    "flatten": (lambda y, _: y.flatten(2).softmax(-1).unflatten(2, y.shape[2:]), "any pixel of the image"),
    "unpadded": (lambda y, _: F.conv2d(y, torch.ones(1, 4, 3, 3)), "pad its convolutions"),
    "dropped dimension": (lambda y, _: y.amax(1), "batch and channel dimensions"),
    "branch on size": (lambda y, x: y if x.shape[-1] < 1000 else y + 1, "control flow that depends on sizes"),
}


def _write_into_part(y: Tensor) -> Tensor:
    y[..., 1:].relu_()
    return y


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused(what: str) -> None:
    function, words = REFUSED[what]
    with pytest.raises(UntileableError, match=words):
        analyze_network(Wrapped(function).eval(), bands=3)


def test_a_refusal_names_operation_module_line_and_remedy() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(x, 1) * x

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Inner())
    with pytest.raises(UntileableError) as refusal:
        analyze_network(network.eval(), bands=3)
    text = str(refusal.value)
    assert "aten.adaptive_avg_pool2d" in text
    assert "module '1'" in text
    assert "test_network.py:" in text
    assert "; use " in text
    assert "\n" not in text


def test_training_mode_is_refused_with_the_remedy() -> None:
    with pytest.raises(UntileableError, match=r"module\.eval\(\)"):
        analyze_network(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), bands=3)
    with pytest.raises(UntileableError, match=r"module\.eval\(\)"):
        analyze_network(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()), bands=3)


def test_a_network_of_sizes_divisible_by_four_is_found_out() -> None:
    network = analyze_network(alive(PlainUNet()), bands=3)
    assert network.size_multiple == 4
    assert network.padded_shape((61, 64)) == (64, 64)


def test_a_network_of_large_images_only_is_tried_on_larger_ones() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if min(x.shape[2:]) > 200 else x[:, :, :0]

    class Refusing(Large):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten()[0] * x

    assert find_accepted_sizes(Large(), 1, torch.float32) == (1, (131, 113))
    assert find_accepted_sizes(Refusing(), 1, torch.float32) == (1, (331, 293))


def test_a_network_that_runs_at_no_size_is_refused_in_its_own_words() -> None:
    with pytest.raises(UntileableError, match=r"expected input.* to have 5 channels"):
        analyze_network(nn.Conv2d(5, 1, 1), bands=3)


def test_a_core_outside_the_output_is_refused() -> None:
    network = analyze_network(nn.Conv2d(3, 2, 1).eval(), bands=3)
    for core in (Window(y=0, x=0, height=0, width=4), Window(y=8, x=8, height=4, width=4)):
        with pytest.raises(UsageError, match="non-empty and inside the output of 10 x 10"):
            network.input_window(core, (10, 10))


def test_a_raster_below_the_smallest_size_is_refused() -> None:
    class Halved(nn.Module):
        """At least two pixels each way, or pooling has nothing to give."""

        def forward(self, x: Tensor) -> Tensor:
            y = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)
            return F.pad(y, (0, x.shape[-1] - y.shape[-1], 0, x.shape[-2] - y.shape[-2]))

    network = analyze_network(Halved(), bands=3)
    assert network.graph.smallest == (2, 2)
    with pytest.raises(UsageError, match="height of at least 2 pixels, the raster has 1"):
        network.padded_shape((1, 9))


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 6, 7, 8])
def test_nearest_upsampling_by_small_factors_has_the_exact_index(factor: int) -> None:
    if not nearest_is_exact(factor):
        pytest.skip("torch's float32 index differs; the rule refuses it")
    small = torch.arange(1000.0)[None, None, None]
    large = F.interpolate(small, scale_factor=(1, factor))
    assert torch.equal(large[0, 0, 0], torch.arange(1000.0).repeat_interleave(factor))


def test_bilinear_by_three_runs_in_windows_in_float64_and_up_to_1024_pixels_in_float32() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Upsample(scale_factor=3, mode="bilinear")).eval()
    network = analyze_network(module, bands=3)
    assert choose_method(network, None, (1024, 1000)) == "window"
    assert choose_method(network, None, (1025, 10)) == "program"
    with pytest.raises(UntileableError, match=r"exact up to 1024 pixels a side .* has 1025"):
        choose_method(network, "window", (1025, 10))
    assert choose_method(analyze_network(module.double(), bands=3), None, (30000, 1)) == "window"
