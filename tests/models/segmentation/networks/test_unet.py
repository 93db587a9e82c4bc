"""The U-Net: every size, checkpointing, norms."""

from __future__ import annotations

import pytest
import torch
from outsize.models.segmentation.networks.norm import FrozenNorm, calibrating, fold_norms
from outsize.models.segmentation.networks.unet import UNet
from outsize.tiler.base.errors import UsageError
from torch import nn


@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 6, 8, 10)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (17, 23), (32, 32)])
def test_it_is_defined_for_every_size(widths: tuple[int, ...], size: tuple[int, int]) -> None:
    network = UNet(3, 5, widths).eval()
    assert network.depth == len(widths) - 1
    assert network(torch.randn(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("norm", ["none", "frozen"])
def test_checkpointing_gives_the_same_gradients(norm) -> None:
    plain = UNet(2, 3, (4, 6, 8), norm=norm).double()
    with calibrating(plain):
        plain(torch.randn(2, 2, 19, 22, dtype=torch.float64))
    saving = UNet(2, 3, (4, 6, 8), norm=norm, checkpointing=True).double()
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(1, 2, 19, 22, dtype=torch.float64)
    for network in (plain, saving):
        network(image).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-14), name


def test_checkpointing_keeps_fewer_tensors_for_backward() -> None:
    kept = {}
    for checkpointing in (False, True):
        network = UNet(2, 3, (4, 6), checkpointing=checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            network(torch.randn(1, 2, 64, 64))
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.6 * kept[False]


def test_frozen_statistics_normalise_the_calibration_batch_and_then_stay() -> None:
    norm = FrozenNorm(3)
    batch = torch.randn(4, 3, 8, 8) * 5 + 7
    with calibrating(norm):
        result = norm(batch)
    assert torch.allclose(result.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(result.var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-3)
    mean = norm.mean.clone()
    norm.train()
    norm(torch.randn(4, 3, 8, 8))
    assert torch.equal(norm.mean, mean)


def test_a_frozen_norms_pixel_depends_on_no_other_in_training() -> None:
    network = UNet(2, 2, (4, 6), norm="frozen").double().train()
    image = torch.randn(1, 2, 40, 40, dtype=torch.float64)
    other = image.clone()
    other[..., 30:, 30:] = 100
    assert torch.equal(network(image)[..., :10, :10], network(other)[..., :10, :10])


@pytest.mark.parametrize("kind", ["frozen", "batch"])
def test_folding_norms_is_the_same_function(kind: str) -> None:
    network: nn.Module = UNet(2, 3, (4, 6), norm="frozen")
    if kind == "batch":
        network = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        network(torch.randn(8, 2, 9, 9) * 3)
    network = network.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if kind == "frozen":
        with calibrating(network):
            network(torch.randn(2, 2, 16, 16, dtype=torch.float64) * 4 + 1)
    folded = fold_norms(network)
    assert not any(isinstance(module, (FrozenNorm, nn.BatchNorm2d)) for module in folded.modules())
    image = torch.randn(1, 2, 21, 20, dtype=torch.float64)
    assert torch.allclose(folded(image), network(image), rtol=1e-10, atol=1e-10)
    assert any(isinstance(module, (FrozenNorm, nn.BatchNorm2d)) for module in network.modules())


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(UsageError, match="must be >= 1"):
        UNet(0, 3)
    with pytest.raises(UsageError, match="must be >= 1"):
        UNet(3, 3, ())
    with pytest.raises(UsageError, match='"none" or "frozen"'):
        UNet(3, 3, norm="batch")  # pyright: ignore[reportArgumentType]
