"""The reference of training: ordinary autograd on the whole image, and plans of any tiles to hold against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.training.plan import TrainPlan
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import ARCHITECTURES
from .zoo import ZOO, alive

NETWORKS: dict[str, Callable[[], nn.Module]] = {**ZOO, **ARCHITECTURES}


@cache
def analysed(name: str) -> Network:
    """In float64, with weights that keep every pixel alive."""
    return analyze_network(alive(NETWORKS[name]()), bands=3)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan_of(network: Network, shape: tuple[int, int], core: tuple[int, int], cuts: tuple[int, ...] = ()) -> TrainPlan:
    return TrainPlan(
        image_shape=(network.bands, *shape),
        output_shape=(network.channels, *network.output_shape(shape)),
        core=core,
        cuts=cuts,
    )


def run_whole(network: Network, image: Tensor) -> Tensor:
    """(1, channels, h, w): the module on the whole image, padded as it needs it, the result cropped."""
    shape = (image.shape[-2], image.shape[-1])
    (height, width), (rows, columns) = network.padded_shape(shape), network.output_shape(shape)
    padded = F.pad(image[None], (0, width - shape[1], 0, height - shape[0]))
    return network.module(padded)[..., :rows, :columns]


def gradients_of(value: Tensor, image: Tensor, network: Network, cotangent: Tensor | None = None) -> list[Tensor]:
    """Of the image and of every parameter; zeros for those that it does not depend on."""
    wanted = [image, *network.module.parameters()]
    found = torch.autograd.grad(value, wanted, cotangent, allow_unused=True)
    return [
        torch.zeros_like(one) if gradient is None else gradient for one, gradient in zip(wanted, found, strict=True)
    ]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max |g - g_ref| / max |g_ref|, the largest over all tensors; relative to all of them for one that is zero but for
    rounding, as of a bias that the network subtracts from itself."""
    worst, largest = 0.0, max(float(tensor.detach().abs().max()) for tensor in expected)
    for one, other in zip((t.detach() for t in found), (t.detach() for t in expected), strict=True):
        assert torch.isfinite(one).all()
        scale = float(other.abs().max())
        assert scale > 0 or not one.any()
        if scale:
            worst = max(worst, float((one - other).abs().max()) / (scale if scale > 1e-14 * largest else largest))
    return worst
