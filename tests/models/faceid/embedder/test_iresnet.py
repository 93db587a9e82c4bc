"""iResNets: the published sizes, features of one picture alone, the same gradients when activations are recomputed."""

from __future__ import annotations

import pytest
import torch
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.embedder.file import EmbedderDescription
from outsize.models.faceid.embedder.iresnet import IResNet
from torch import nn


@pytest.mark.parametrize(("depth", "parameters", "convolutions"), [("r50", 43.59, 49 + 4), ("r100", 65.16, 99 + 4)])
def test_layouts_are_the_published_ones(depth: str, parameters: float, convolutions: int) -> None:
    with torch.device("meta"):  # no weights, sizes alone
        model = IResNet(depth)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.01)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.fixture(scope="module")
def model() -> IResNet:
    torch.manual_seed(0)
    found = IResNet("r18", 32, 32, 16)
    for parameter in found.parameters():  # blocks that begin as their shortcuts would hide what is inside
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    return found.double().train()


def test_features_depend_on_one_picture_alone(model: IResNet) -> None:
    images = torch.randn((3, 3, 32, 16), dtype=torch.float64)
    together = model(images)
    assert together.shape == (3, 32)
    for index in range(3):
        assert torch.allclose(model(images[index : index + 1])[0], together[index], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[1], rtol=1e-3)


def test_recomputed_activations_give_the_same_gradients_from_less_memory(model: IResNet) -> None:
    images = torch.randn((2, 3, 32, 16), dtype=torch.float64)
    found: list[list[torch.Tensor]] = []
    kept: list[int] = []
    for recompute in (False, True):
        model.recompute = recompute
        held: dict[int, int] = {}

        def keep(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images).square().sum()
        kept.append(sum(held.values()) - sum(p.numel() * 8 for p in model.parameters()))
        found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    model.recompute = False
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[1] < 0.4 * kept[0]


def test_a_description_builds_each_network_and_refuses_other_sizes() -> None:
    described = EmbedderDescription(architecture="r18", dim=8, height=16, width=32, mean=0, scale=1)
    assert described.build()(torch.zeros((1, 3, 16, 32))).shape == (1, 8)
    assert EmbedderDescription.from_bytes(described.to_bytes()) == described
    with pytest.raises(HeadError, match="sides that are multiples of 16, got 20 x 32"):
        EmbedderDescription(architecture="r50", dim=8, height=20, width=32, mean=0, scale=1).build()
    with pytest.raises(HeadError, match="16 x 16 or larger, got 8 x 32"):
        EmbedderDescription(architecture="small", dim=8, height=8, width=32, mean=0, scale=1)
    with pytest.raises(HeadError, match="depth must be one of r18, r50, r100, got 'r34'"):
        IResNet("r34")
