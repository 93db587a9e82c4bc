"""Modules whose tiles would be wrong although every interval rule holds: aliasing, sizes as values, branches, state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.errors import UntileableError
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.windows import cores_of, run_whole, run_window


class Trap(nn.Module):
    """A function with a few layers at hand."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 4, 1)
        self.c3 = nn.Conv2d(3, 4, 3, padding=1)
        self.c7 = nn.Conv2d(3, 4, 7, padding=3)
        self.s2 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.drop = nn.Dropout()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.register_buffer("state", torch.zeros(4, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def add_to_a_chunk(s: Trap, x: Tensor) -> Tensor:
    y = s.c1(x)
    part, _ = y.chunk(2, 1)
    part += s.c7(x)[:, :2]
    return y


def add_under_a_view(s: Trap, x: Tensor) -> Tensor:
    y = s.c1(x)
    view = y[:, :2]
    y.add_(s.c7(x))
    return view


def add_to_the_image(s: Trap, x: Tensor) -> Tensor:
    part = x[:, :1]
    part += s.c7(x)[:, :1]
    return s.c3(x)


def write_through_eval_dropout(s: Trap, x: Tensor) -> Tensor:
    y = s.c1(x) - 1
    s.relu_in_place(s.drop(y[..., 1:]))
    return y


def write_through_type_as(s: Trap, x: Tensor) -> Tensor:
    y = s.c1(x) - 1
    y[..., 1:].type_as(x).relu_()
    return y


def count_calls(s: Trap, x: Tensor) -> Tensor:
    s.state += 1
    return s.c3(x) * s.state


def pooling_indices(s: Trap, x: Tensor) -> Tensor:
    values, indices = F.max_pool2d(s.c3(x), 2, return_indices=True, ceil_mode=True)
    return values + indices


def odd_only(s: Trap, x: Tensor) -> Tensor:
    return s.c1(x) + F.interpolate(s.s2(x), scale_factor=2)[..., :-1, :-1]


def pad_if_odd(s: Trap, x: Tensor) -> Tensor:
    y = s.c3(x)
    if x.shape[2] % 2 and x.shape[3] % 2:
        y = F.pad(y, (1, 0, 1, 0))[..., 1:, 1:] + 1
    return y


REFUSED = {
    "adding to a chunk": add_to_a_chunk,
    "adding under a view": add_under_a_view,
    "adding to the image": add_to_the_image,
    "writing through eval dropout": write_through_eval_dropout,
    "writing through type_as": write_through_type_as,
    "half the height": lambda s, x: s.c3(x) * (x.shape[2] * 0.5),
    "root of the height": lambda s, x: s.c3(x) * x.shape[2] ** -0.5,
    "a slope by the height": lambda s, x: F.leaky_relu(s.c3(x), 1.0 / x.shape[2]),
    "a limit by the height": lambda s, x: s.c3(x).clamp(max=x.shape[2] / 100),
    "a factor among keywords": lambda s, x: torch.add(s.c3(x), s.c1(x), alpha=x.shape[2]),
    "a constant of the height": lambda s, x: s.c3(x) * torch.full((), x.shape[2]),
    "weights of the height": lambda s, x: F.conv2d(x, s.c3.weight / x.shape[2], padding=1),
    "a channel by the height": lambda s, x: s.c3(x)[:, x.shape[2] % 4].unsqueeze(1),
    "channels by the height": lambda s, x: s.c3(x)[:, x.shape[2] % 2 : x.shape[2] % 2 + 2],
    "padded channels by the height": lambda s, x: F.pad(s.c3(x), (0, 0, 0, 0, x.shape[2] % 2, 1 - x.shape[2] % 2)),
    "a branch on parity": lambda s, x: s.c3(x) + 1 if x.shape[2] % 2 else s.c3(x),
    "a branch on thirds": lambda s, x: s.c3(x) + 1 if x.shape[2] % 3 == 0 else s.c3(x),
    "a branch on shape": lambda s, x: s.c3(x) + 1 if x.shape[2] > x.shape[3] else s.c3(x),
    "a branch on area": lambda s, x: s.c3(x) + 1 if x.shape[2] * x.shape[3] > 1000 else s.c3(x),
    "a branch on one size": lambda s, x: s.c3(x) + 1 if x.shape[2] == 40 else s.c3(x),
    "a branch on one pixel": lambda s, x: s.c3(x) + 1 if x.shape[2] == 1 else s.c3(x),
    "padding when odd": pad_if_odd,
    "padding by the other axis": lambda s, x: F.pad(s.c3(x), (x.shape[2] % 2, 0))[..., : x.shape[3]],
    "pooling indices": pooling_indices,
    "state": count_calls,
    "randomness": lambda s, x: s.c3(x) * torch.rand(4, 1, 1),
    "a dict": lambda s, x: {"out": s.c3(x)},
    "a tuple": lambda s, x: (s.c3(x),),
    "two images": lambda s, x: torch.cat([s.c3(x), s.c1(x)], dim=0),
    "odd sizes only": odd_only,
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(what: str) -> None:
    with pytest.raises(UntileableError):
        analyze_network(Trap(REFUSED[what]).double().eval(), bands=3)


def resize_if_needed(s: Trap, x: Tensor) -> Tensor:
    up = F.interpolate(s.s2(x), scale_factor=2)
    if up.shape != x.shape:
        up = up[..., : x.shape[2], : x.shape[3]]
    return up + s.c1(x)


def add_in_place(s: Trap, x: Tensor) -> Tensor:
    y = s.c1(x)
    y += s.c7(x)
    return s.relu_in_place(y)


def add_to_a_crop(s: Trap, x: Tensor) -> Tensor:
    y = F.interpolate(s.s2(x), scale_factor=2)[..., : x.shape[2], : x.shape[3]]
    y += s.c3(x)
    return y.relu_()


def strided_crop(s: Trap, x: Tensor) -> Tensor:
    return F.pad(s.c3(x)[..., :-4:2, :-4:2], (0, 2, 0, 2))


class DeepStride(nn.Module):
    """A stride of 64: inner images of one pixel while the outer one is not small."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*[nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.down(x), scale_factor=64)[..., : x.shape[2], : x.shape[3]] + x


ACCEPTED = {
    "resizing if needed": lambda: Trap(resize_if_needed),
    "adding in place": lambda: Trap(add_in_place),
    "adding to a crop": lambda: Trap(add_to_a_crop),
    "a strided crop": lambda: Trap(strided_crop),
    "the larger of two": lambda: Trap(lambda s, x: torch.max(s.c3(x), s.c1(x))),
    "a minimum size": lambda: Trap(lambda s, x: F.pad(F.conv2d(x, s.c3.weight, dilation=36), (36,) * 4)),
    "a stride of 64": DeepStride,
    "a wide kernel after upsampling": lambda: Trap(
        lambda s, x: F.pad(F.conv2d(F.interpolate(x, scale_factor=2), s.c7.weight), (3,) * 4)
    ),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_it_is_accepted_and_exact(what: str) -> None:
    network = analyze_network(ACCEPTED[what]().double().eval(), bands=3)
    for shape in ((max(7, network.graph.smallest[0]), 90), (101, 150)):
        if network.graph.smallest[1] > shape[1]:
            continue
        image = torch.randn(1, 3, *network.padded_shape(shape), dtype=torch.float64)
        whole = run_whole(network, image)
        for core in cores_of(network, shape, (16, 23)):
            tile = run_window(network, image, core, network.input_window(core, shape))
            rows, columns = core.slices()
            assert (tile - whole[:, rows, columns]).abs().max() < 1e-10


def test_a_size_that_the_module_asserts_is_kept_by_every_window() -> None:
    class Asserting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] % 4 == 0
            assert x.shape[3] % 4 == 0
            return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)

    network = analyze_network(Asserting().double(), bands=3)
    assert network.size_multiple == 4
    shape = (31, 42)
    image = torch.randn(1, 3, *network.padded_shape(shape), dtype=torch.float64)
    for core in cores_of(network, shape, (5, 7)):
        run_window(network, image, core, network.input_window(core, shape))


def test_logits_of_another_scale_or_submodules_of_those_names_are_no_logits() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits, self.finish = nn.Conv2d(3, 2, 1), nn.Softmax(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.finish(self.logits(x))

    class Scaled(nn.Module):
        def logits(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 4, ceil_mode=True)

        def finish(self, logits: Tensor) -> Tensor:
            return F.interpolate(logits, scale_factor=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.finish(self.logits(x))[..., : x.shape[2], : x.shape[3]]

    for module in (Named(), Scaled()):
        assert not analyze_network(module.eval(), bands=3).graph.has_logits
