"""Rewritten graphs against the module itself: the same results, and the operations that were to go are gone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from outsize.tiler.engines.openvino import compile_options
from outsize.tiler.engines.openvino_rewrite import rewrite_model, spread_weights
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.zoo import alive

pytestmark = pytest.mark.system

ov = pytest.importorskip("openvino")


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (5, 3), (4, 7)])
@pytest.mark.parametrize("factor", [(2, 2), (3, 2), (1, 4), (5, 5)])
def test_a_convolution_of_repeated_pixels_is_one_transposed_convolution(
    kernel: tuple[int, int], factor: tuple[int, int]
) -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.randn((3, 4, *kernel), generator=random, dtype=torch.float64)
    small = torch.randn((1, 4, 9, 8), generator=random, dtype=torch.float64)
    large = small.repeat_interleave(factor[0], 2).repeat_interleave(factor[1], 3)
    expected = F.conv2d(large, weights)
    spread = F.conv_transpose2d(small, torch.from_numpy(spread_weights(weights.numpy(), factor)), stride=factor)
    rows, columns = (slice(k - 1, k - 1 + extent) for k, extent in zip(kernel, expected.shape[2:], strict=True))
    assert (spread[:, :, rows, columns] - expected).abs().max() < 1e-12


class Decoder(nn.Module):
    """Upsamples by `factor`, crops to the skip, joins, convolves: what decoders do."""

    def __init__(self, factor: int = 2, kernel: int = 3, padding: int = 1, order: str = "skip first") -> None:
        super().__init__()
        self.factor, self.order = factor, order
        self.down = nn.Conv2d(3, 5, factor, stride=factor)
        self.across = nn.Conv2d(3, 4, 3, padding=1)
        self.join = nn.Conv2d({"alone": 5, "twice": 14}.get(order, 9), 6, kernel, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        # Rounded up, so that what is upsampled again is at least as large as the skip.
        small = F.relu(self.down(F.pad(x, (0, self.factor - 1, 0, self.factor - 1))))
        skip = F.relu(self.across(x))
        up = F.interpolate(small, scale_factor=self.factor)[..., : x.shape[2], : x.shape[3]]
        parts = {"skip first": [skip, up], "up first": [up, skip], "alone": [up], "twice": [up, skip, up]}[self.order]
        return F.relu(self.join(torch.cat(parts, 1)))


def convert(module: nn.Module, image: Tensor) -> ov.Model:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = ov.convert_model(torch.export.export(module, (image,), strict=False))
    model.reshape(list(image.shape))
    return model


def kinds(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def run(model: ov.Model, image: Tensor) -> np.ndarray:
    request = ov.Core().compile_model(model, "CPU", compile_options(2)).create_infer_request()
    request.infer([image.numpy()])
    return request.get_output_tensor(0).data.copy()


def agree(module: nn.Module, size: tuple[int, int]) -> tuple[list[str], int]:
    """The kinds of what is left and how much was replaced, where the result is the module's."""
    image = torch.randn((1, 3, *size), generator=torch.Generator().manual_seed(1))
    model = convert(module, image)
    replaced = rewrite_model(model)
    with torch.no_grad():
        expected = module(image).numpy()
    result = run(model, image)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    return kinds(model), replaced


@pytest.mark.parametrize("order", ["skip first", "up first", "alone", "twice"])
@pytest.mark.parametrize(("factor", "kernel", "padding"), [(2, 3, 1), (2, 3, 0), (3, 3, 1), (2, 5, 2), (4, 2, 0)])
def test_upsampled_channels_are_convolved_where_they_are_few(
    order: str, factor: int, kernel: int, padding: int
) -> None:
    module = alive(Decoder(factor, kernel, padding, order)).float()
    left, replaced = agree(module, (8 * factor, 7 * factor))
    assert replaced == 1
    assert "Interpolate" not in left
    assert "Concat" not in left
    assert left.count("ConvolutionBackpropData") == (2 if order == "twice" else 1)


@pytest.mark.parametrize("size", [(17, 16), (16, 17), (19, 21)])
def test_what_an_edge_cuts_stays_as_it_is(size: tuple[int, int]) -> None:
    """A cropped pixel has one half inside the image and one that padding takes the place of."""
    left, replaced = agree(alive(Decoder()).float(), size)
    assert replaced == 0
    assert "Interpolate" in left
    # Without padding there is no edge to mind.
    assert agree(alive(Decoder(padding=0)).float(), size)[1] == 1


@pytest.mark.parametrize("scale", ["bilinear", "size", "strided", "dilated", "grouped"])
def test_other_enlargements_and_convolutions_stay_as_they_are(scale: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 4, 2, stride=2)
            options = {"strided": {"stride": 2}, "dilated": {"dilation": 2}, "grouped": {"groups": 2}}.get(scale, {})
            self.join = nn.Conv2d(4, 4, 3, padding=1, **options)

        def forward(self, x: Tensor) -> Tensor:
            small = self.down(x)
            if scale == "bilinear":
                return self.join(F.interpolate(small, scale_factor=2, mode="bilinear"))
            if scale == "size":
                return self.join(F.interpolate(small, size=(27, 29)))
            return self.join(F.interpolate(small, scale_factor=2))

    assert agree(alive(Other()).float(), (20, 24))[1] == 0


class Classes(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).argmax(1, keepdim=True).to(torch.uint8)


@pytest.mark.parametrize(("classes", "replaced"), [(2, 1), (7, 1), (64, 1), (65, 0)])
def test_the_largest_class_is_found_by_comparing(classes: int, replaced: int) -> None:
    left, found = agree(Classes(classes).eval(), (23, 31))
    assert found == replaced
    assert ("TopK" in left) == (not replaced)


def test_of_equal_classes_the_first_wins() -> None:
    module = Classes(5).eval()
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.copy_(torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0]))
    image = torch.zeros((1, 3, 9, 9))
    model = convert(module, image)
    assert rewrite_model(model) == 1
    assert (run(model, image) == 1).all()


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 3, 0)])
def test_pooling_forgets_positions_that_nobody_reads(kernel: int, stride: int, padding: int, ceil_mode: bool) -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)

    for size in ((16, 17), (11, 13)):
        agree(Pooled().eval(), size)
