"""Tiled autograd in a torch loop: what is true of ordinary training's gradients is true of these."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outsize.models.segmentation.networks.model import TileNetwork
from outsize.models.segmentation.networks.scaling import Scaling
from outsize.models.segmentation.networks.unet import UNet
from outsize.models.segmentation.training.losses import CrossEntropy, Dice, SquaredLoss, SumOfLosses
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import LabelError, UntileableError, UsageError
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.training.loss import Loss
from outsize.tiler.training.plan import TrainPlan
from outsize.tiler.training.tiled_autograd import TiledModule, tile_checkpoint, tile_loss
from torch import Tensor, nn
from torch.nn import functional as F

from ...support import train_rank
from ...support.rasters import write_geotiff
from ...support.whole_gradients import analysed, draw, gradients_of, largest_difference, plan_of, run_whole

pytestmark = pytest.mark.system

SHAPE = (53, 67)
BOTH = SumOfLosses(losses=(CrossEntropy(ignore_index=255), Dice(ignore_index=255)), weights=(1.0, 0.5))


def draw_labels(*shape: int, classes: int = 2) -> Tensor:
    labels = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(3))
    labels[: shape[0] // 5] = 255
    return labels


def loss_by_hand(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Of a whole image's logits, through torch's own cross-entropy where there is one."""
    known = torch.where(labels == 255, -100, labels)
    if isinstance(loss, CrossEntropy):
        return F.cross_entropy(logits, known[None])
    counted = known >= 0
    probability, truth = logits[0].softmax(0)[:, counted], F.one_hot(known[counted], logits.shape[1]).T
    dice = (2 * (probability * truth).sum(1) + 1) / (probability.sum(1) + truth.sum(1) + 1)
    return F.cross_entropy(logits, known[None]) + 0.5 * (1 - dice.mean())


@pytest.mark.parametrize("loss", [CrossEntropy(ignore_index=255), BOTH], ids=["separable", "by sums"])
@pytest.mark.parametrize("name", ["unet depth 2", "plain unet", "strided", "enlarged bilinear"])
def test_loss_and_gradients_are_the_whole_images(name: str, loss: Loss) -> None:
    network, image = analysed(name), draw(3, *SHAPE).requires_grad_()
    labels = draw_labels(*network.output_shape(SHAPE))
    whole = loss_by_hand(run_whole(network, image), labels, loss)
    expected = gradients_of(whole, image, network)
    for core, cuts in (((17, 19), ()), ((60, 23), (4, 8))):
        value = tile_loss(network, plan_of(network, SHAPE, core, cuts), loss, image, labels)
        assert value.dtype == torch.float64
        assert float(value.detach()) == pytest.approx(float(whole.detach()), rel=1e-13)
        assert largest_difference(gradients_of(value, image, network), expected) < 1e-11


@pytest.mark.parametrize("loss", [CrossEntropy(ignore_index=255), BOTH], ids=["separable", "by sums"])
def test_the_loss_without_gradients_is_the_same(loss: Loss) -> None:
    network, image = analysed("unet depth 2"), draw(3, *SHAPE)
    plan, labels = plan_of(network, SHAPE, (17, 19)), draw_labels(*SHAPE)
    value = tile_loss(network, plan, loss, image, labels)
    with torch.no_grad():
        silent = tile_loss(network, plan, loss, image, labels)
        output = tile_checkpoint(network, plan)(image)
    assert value.requires_grad
    assert not silent.requires_grad
    assert not output.requires_grad
    assert float(silent) == float(value.detach())


class Twice(nn.Module):
    """A convolution that is used twice, and a weight that belongs to two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.c.weight = self.b.weight
        self.unused = nn.Conv2d(3, 3, 1)
        self.head = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(F.silu(self.b(F.silu(self.a(F.silu(self.a(x))))))))


def test_shared_frozen_derived_and_unused_parameters_have_ordinary_gradients() -> None:
    module = Twice().double()
    module.a.bias.requires_grad_(False)
    network, image, labels = analyze_network(module, bands=3), draw(3, *SHAPE), draw_labels(*SHAPE)
    F.cross_entropy(module(image[None]), torch.where(labels == 255, -100, labels)[None]).backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    seen: list[str] = []
    module.b.weight.register_hook(lambda gradient: seen.append("b.weight") or gradient)
    tile_loss(network, plan_of(network, SHAPE, (17, 19)), CrossEntropy(ignore_index=255), image, labels).backward()
    assert seen == ["b.weight"]
    for name, parameter in module.named_parameters():
        wanted = expected[name]
        if wanted is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None
            assert largest_difference([parameter.grad], [wanted]) < 1e-11, name
    assert {name for name, gradient in expected.items() if gradient is None} == {
        "a.bias",
        "unused.weight",
        "unused.bias",
    }


class Sum(nn.Module):
    """Two weights whose gradient autograd gives as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(2, 3, 3, 3, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.first + self.second, padding=1)


@pytest.mark.parametrize("core", [(60, 70), (17, 19)], ids=["one tile", "tiles"])
@pytest.mark.parametrize("loss", [CrossEntropy(ignore_index=255), BOTH], ids=["separable", "by sums"])
def test_gradients_that_autograd_gives_as_one_tensor_are_counted_once(loss: Loss, core: tuple[int, int]) -> None:
    network, labels = analyze_network(Sum(), bands=3), draw_labels(*SHAPE)
    image = draw(3, *SHAPE).requires_grad_()
    expected = gradients_of(loss_by_hand(run_whole(network, image), labels, loss), image, network)
    value = tile_loss(network, plan_of(network, SHAPE, core), loss, image, labels)
    assert largest_difference(gradients_of(value, image, network), expected) < 1e-11
    direction = torch.randn(1, 2, *SHAPE, dtype=torch.float64)
    expected = gradients_of((run_whole(network, image) * direction).sum(), image, network)
    output = tile_checkpoint(network, plan_of(network, SHAPE, core))(image)
    assert largest_difference(gradients_of((output * direction).sum(), image, network), expected) < 1e-11


class Doubled(torch.autograd.Function):
    """A rule of its own: twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x + 0

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        del ctx
        return 2 * cotangents[0]


class Thawing(nn.Module):
    """Rules that the graph does not show, before the first layer and behind it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.second, self.where = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), where

    def forward(self, x: Tensor) -> Tensor:
        x = Doubled.apply(x) if self.where == "image" else x
        x = self.first(x)
        return self.second(Doubled.apply(x) if self.where == "layer" else x)


def test_rules_that_matter_only_later_are_found_then() -> None:
    """Under a layer that learns later, or at an image that learns."""
    shape, loss = (20, 22), CrossEntropy()
    image, labels = torch.rand(3, *shape), draw_labels(*shape) % 2
    module = Thawing("layer")
    module.first.requires_grad_(False)
    plan = TrainPlan(image_shape=(3, *shape), output_shape=(2, *shape), core=(9, 9))
    tile_loss(module, plan, loss, image, labels).backward()
    module.first.requires_grad_(True)
    with pytest.raises(UntileableError, match="gradient of first"):
        tile_loss(module, plan, loss, image, labels)
    module = Thawing("image")
    tile_loss(module, plan, loss, image, labels).backward()
    with pytest.raises(UntileableError, match="gradient of the image"):
        tile_checkpoint(module, plan)(image.requires_grad_())


def test_losses_are_the_same_in_inference_mode_and_plans_of_other_outputs_are_refused() -> None:
    network, image, labels = analysed("unet depth 2"), draw(3, *SHAPE), draw_labels(*SHAPE)
    plan, loss = plan_of(network, SHAPE, (17, 19)), CrossEntropy(ignore_index=255)
    value = tile_loss(network, plan, loss, image, labels).detach()
    with torch.inference_mode():
        assert float(tile_loss(network, plan, loss, image, labels)) == float(value)
    short = dataclasses.replace(plan, output_shape=(plan.output_shape[0], 10, 10))
    with pytest.raises(UsageError, match=r"output_shape must be \(channels, 53, 67\).*got \(2, 10, 10\)"):
        tile_loss(network, short, loss, image, labels[:10, :10])


@pytest.mark.parametrize("loss", [CrossEntropy(ignore_index=255), BOTH], ids=["separable", "by sums"])
def test_steps_of_an_optimiser_are_those_of_ordinary_training(loss: Loss) -> None:
    """Weights change at every step, and the network is traced once; gradients of two images are accumulated."""
    ordinary = UNet(3, 2, (4, 6), norm="frozen").double()
    tiled = copy.deepcopy(ordinary)
    network = analyze_network(tiled, bands=3)
    plan = plan_of(network, SHAPE, (30, 30))
    optimisers = [torch.optim.Adam(module.parameters(), lr=0.01) for module in (ordinary, tiled)]
    labels = draw_labels(*SHAPE)
    values: list[float] = []
    for step in range(3):
        for optimiser in optimisers:
            optimiser.zero_grad()
        for part in range(2):
            image = draw(3, *SHAPE, seed=10 * step + part)
            loss_by_hand(ordinary(image[None]), labels, loss).backward()
            value = tile_loss(network, plan, loss, image, labels)
            value.backward()
            values.append(float(value.detach()))
        for optimiser in optimisers:
            optimiser.step()
    assert len(set(values)) == len(values)
    assert largest_difference([*tiled.parameters()], [*ordinary.parameters()]) < 1e-9


def test_a_module_is_traced_once_whatever_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from outsize.tiler.training import trainable

    module = UNet(3, 2, (4,)).double()
    calls: list[nn.Module] = []
    analyse = trainable.analyze_network

    def counted(given: nn.Module, *arguments: object) -> Network:
        calls.append(given)
        return analyse(given, *arguments)

    monkeypatch.setattr(trainable, "analyze_network", counted)
    plan = TrainPlan(image_shape=(3, *SHAPE), output_shape=(2, *SHAPE), core=(20, 20))
    values = []
    for _ in range(3):
        values.append(
            float(tile_loss(module, plan, CrossEntropy(), draw(3, *SHAPE), torch.zeros(SHAPE).long()).detach())
        )
        with torch.no_grad():
            module.head.bias[0] += 1
    assert len(calls) == 1
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("loss", [CrossEntropy(ignore_index=255), BOTH], ids=["separable", "by sums"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler_is_as_near_as_in_ordinary_training(dtype: torch.dtype, loss: Loss) -> None:
    module = UNet(3, 2, (8, 8), norm="frozen")
    network, image, labels = analyze_network(module, bands=3), draw(3, *SHAPE).float(), draw_labels(*SHAPE)
    plan = plan_of(network, SHAPE, (30, 40))
    exact = torch.autograd.grad(loss_by_hand(module(image[None]), labels, loss), [*module.parameters()])
    off: dict[str, float] = {}
    for kind in ("ordinary", "tiled"):
        module.zero_grad()
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with torch.autocast("cpu", dtype):
            logits = module(image[None])
            tiled = tile_checkpoint(network, plan)(image)
            if kind == "ordinary":
                value = loss_by_hand(logits.float(), labels, loss)
            else:
                value = tile_loss(network, plan, loss, image, labels)
        assert logits.dtype == tiled.dtype == dtype
        assert float((tiled - logits).detach().abs().max()) <= 0.02 * float(logits.detach().abs().max())
        scaler.scale(value).backward()
        scaler.unscale_(optimiser)
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        off[kind] = largest_difference(gradients, exact)
        before = copy.deepcopy(module.state_dict())
        scaler.step(optimiser)
        assert not torch.equal(module.head.weight, before["head.weight"])
        module.load_state_dict(before)
    assert 1e-5 < off["tiled"] < 2 * off["ordinary"]


def test_gradients_twice_over_and_of_changed_weights_are_refused() -> None:
    network, image, labels = analysed("unet depth 1"), draw(3, *SHAPE), draw_labels(*SHAPE)
    plan = plan_of(network, SHAPE, (30, 40))
    for value in (
        tile_loss(network, plan, CrossEntropy(ignore_index=255), image, labels),
        tile_loss(network, plan, BOTH, image, labels),
        tile_checkpoint(network, plan)(image).square().sum(),
    ):
        wanted = [*network.module.parameters()]
        (first, *_) = torch.autograd.grad(value, wanted, create_graph=True, retain_graph=True)
        with pytest.raises(UsageError, match="second derivatives through tiles are not computed"):
            torch.autograd.grad(value + first.sum(), wanted[0], retain_graph=True)
        again, *_ = torch.autograd.grad(value, wanted, retain_graph=True)
        assert torch.equal(first, again)
    module = copy.deepcopy(network.module)
    late = tile_loss(analyze_network(module, bands=3), plan, BOTH, image, labels)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_labels_that_change_before_they_are_read_again_are_refused() -> None:
    network, image, labels = analysed("unet depth 1"), draw(3, *SHAPE), draw_labels(*SHAPE)
    plan = plan_of(network, SHAPE, (30, 40))
    once, twice = (tile_loss(network, plan, loss, image, labels) for loss in (CrossEntropy(ignore_index=255), BOTH))
    labels[0, 0] = 1
    once.backward()
    with pytest.raises(UsageError, match=r"labels were changed in place between the loss and its backward\(\)"):
        twice.backward()
    with torch.inference_mode():
        kept = labels.clone()
    tile_loss(network, plan, BOTH, image, kept).backward()


def test_pixels_of_float64_and_weights_of_float32_are_refused() -> None:
    network = nn.Conv2d(3, 2, 3, padding=1)
    plan = TrainPlan(image_shape=(3, *SHAPE), output_shape=(2, *SHAPE), core=(30, 40))
    image, labels = draw(3, *SHAPE), draw_labels(*SHAPE)
    assert image.dtype == torch.float64
    loss = CrossEntropy(ignore_index=255)
    with pytest.raises(UsageError, match=r"image is float64 and the network's weights are float32; give image\.float"):
        tile_loss(network, plan, loss, image, labels)
    known = analyze_network(network, bands=3)
    with pytest.raises(UsageError, match="analysed for 3 bands float32, the image has 3 bands float64; convert"):
        tile_loss(known, plan, loss, image, labels)
    with pytest.raises(UsageError, match="float64, the image has 3 bands float32; convert"):
        tile_loss(analysed("unet depth 1"), plan, loss, image.float(), labels)


def test_modules_that_are_random_or_take_statistics_in_training_are_refused_and_left_as_they_are() -> None:
    norm = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    plan = plan_of_module(20, 20)
    image, labels = draw(3, 20, 20), torch.zeros(20, 20).long()
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(UntileableError, match=r"module '1' \(BatchNorm2d\) takes whole-image statistics .*eval\(\)"):
        tile_loss(norm.train(), plan, CrossEntropy(), image, labels)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    dropping = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout2d(0.1), nn.Conv2d(4, 2, 1)).double()
    with pytest.raises(UntileableError, match=r"module '1' \(Dropout2d\) is random in training mode"):
        tile_loss(dropping, plan, CrossEntropy(), image, labels)
    # Frozen, with only weight and bias learning, a norm is a map of pixels.
    norm.train()[1].eval()
    value = tile_loss(norm, plan, CrossEntropy(), image, labels)
    ordinary = F.cross_entropy(norm(image[None]), labels[None])
    found, expected = (torch.autograd.grad(v, [*norm.parameters()]) for v in (value, ordinary))
    assert largest_difference(found, expected) < 1e-11
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items() if "running" in name)


def test_a_mode_that_changes_the_result_asks_for_another_analysis() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if self.training else self.a(x).sigmoid()

    module = Moody().double().eval()
    network, plan = analyze_network(module, bands=3), plan_of_module(20, 20)
    arguments = (plan, CrossEntropy(), draw(3, 20, 20), torch.zeros(20, 20).long())
    tile_loss(network, *arguments).backward()
    module.train()
    with pytest.raises(UntileableError, match="another result than when it was analysed"):
        tile_loss(network, *arguments)
    value = tile_loss(module, *arguments)
    ordinary = F.cross_entropy(module(arguments[2][None]), arguments[3][None])
    assert float(value.detach()) == pytest.approx(float(ordinary.detach()))


def plan_of_module(height: int, width: int) -> TrainPlan:
    return TrainPlan(image_shape=(3, height, width), output_shape=(2, height, width), core=(8, 8))


def test_features_of_tiles_under_an_ordinary_head_learn_from_labels_of_the_image() -> None:
    """Low-resolution features are held whole; the head looks at all of them, attention and pooling included."""
    network = analysed("strided")
    head = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 5)).double()
    images, truth = draw(2, 3, *SHAPE).requires_grad_(), torch.tensor([1, 4])
    tiled = TiledModule(network, plan_of(network, SHAPE, (7, 9)))
    whole = torch.cat([run_whole(network, image) for image in images])
    features = tiled(images)
    assert features.shape == whole.shape
    wanted = [images, *network.module.parameters(), *head.parameters()]
    found, expected = (
        torch.autograd.grad(F.cross_entropy(head(given), truth), wanted, materialize_grads=True)
        for given in (features, whole)
    )
    assert largest_difference(found, expected) < 1e-11
    assert [name for name, _ in tiled.named_parameters()] == [
        f"module.{name}" for name, _ in network.module.named_parameters()
    ]


def test_a_model_with_scaling_and_classes_is_trained_at_its_logits(tmp_path: Path) -> None:
    """From rasters on disk, with nodata pixels that do not count in either."""
    network = UNet(2, 3, (4, 6)).double()
    tile_network = TileNetwork(network, Scaling.z_score(mean=[90.0, 110.0], stddev=[30.0, 40.0]), "class")
    tile_network.double()
    analysis = analyze_network(tile_network, bands=2, dtype="uint8")
    rng = np.random.default_rng(0)
    image = rng.integers(1, 255, (2, *SHAPE), dtype=np.uint8)
    image[:, 30:40, 10:40] = 0
    labels = rng.integers(0, 3, (1, *SHAPE), dtype=np.uint8)
    labels[0, :, 50:] = 7
    raster = open_raster(write_geotiff(tmp_path / "image.tif", image, nodata=0))
    truth = open_raster(write_geotiff(tmp_path / "labels.tif", labels, nodata=7))
    fill = (91.0, 105.0)
    filled = torch.from_numpy(np.where((image == 0).all(0), np.array([[[91]], [[105]]]), image))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ([90, 110], [30, 40]))
    target = torch.from_numpy(labels[0]).long().masked_fill(torch.from_numpy((image == 0).all(0)), 7)
    ordinary = F.cross_entropy(network(((filled - mean) / std)[None]), target[None], ignore_index=7)
    plan = plan_of_analysis(analysis, (19, 23))
    value = tile_loss(analysis, plan, CrossEntropy(), raster, truth, fill=fill)
    assert float(value.detach()) == pytest.approx(float(ordinary.detach()), rel=1e-12)
    # The whole output, whose loss is the caller's.
    output = tile_checkpoint(analysis, plan, fill=fill)(raster)
    held = F.cross_entropy(output, target[None], ignore_index=7)
    assert float(held.detach()) == pytest.approx(float(ordinary.detach()), rel=1e-12)
    found, by_output, expected = (torch.autograd.grad(v, [*network.parameters()]) for v in (value, held, ordinary))
    assert largest_difference(found, expected) < 1e-11
    assert largest_difference(by_output, expected) < 1e-11
    # Pixels that do not count are seen by those beside them.
    unfilled = F.cross_entropy(tile_checkpoint(analysis, plan)(raster), target[None], ignore_index=7)
    assert float(unfilled.detach()) != pytest.approx(float(ordinary.detach()), rel=1e-4)


def plan_of_analysis(network: Network, core: tuple[int, int]) -> TrainPlan:
    return TrainPlan(image_shape=(network.bands, *SHAPE), output_shape=(3, *SHAPE), core=core)


def test_labels_and_images_that_do_not_fit_are_refused_by_name() -> None:
    network, image, labels = analysed("unet depth 1"), draw(3, *SHAPE), draw_labels(*SHAPE)
    plan = plan_of(network, SHAPE, (30, 40))
    with pytest.raises(LabelError, match=r"labels must lie on the network's output of 53 x 67 px, got 53 x 66"):
        tile_loss(network, plan, CrossEntropy(), image, labels[:, :-1])
    with pytest.raises(LabelError, match=r"labels must be classes 0\.\.1, got 255"):
        tile_loss(network, plan, CrossEntropy(), image, labels)
    for loss in (CrossEntropy(ignore_index=255), BOTH):
        with pytest.raises(LabelError, match="no pixel counts"):
            tile_loss(network, plan, loss, image, torch.full(SHAPE, 255))
    with pytest.raises(UsageError, match=r"the plan is for images of \(3, 53, 67\), got \(3, 53, 66\)"):
        tile_loss(network, plan, CrossEntropy(), image[..., :-1], labels)
    with pytest.raises(UsageError, match="analysed for 3 bands float64, the image has 3 bands uint8"):
        tile_loss(network, plan, CrossEntropy(), image.to(torch.uint8), labels)
    with pytest.raises(UsageError, match="analysed for 3 bands float64, the image has 3 bands float32"):
        tile_loss(network, plan, CrossEntropy(ignore_index=255), image.float(), labels)
    with pytest.raises(UsageError, match=r"pixels must be \(bands, height, width\)"):
        tile_loss(network, plan, CrossEntropy(), image[None, None], labels)
    classes = analyze_network(nn.Sequential(nn.Conv2d(3, 2, 1), Largest()), bands=3)
    with pytest.raises(UsageError, match="the network returns int64 and shows no logits"):
        tile_loss(classes, plan, CrossEntropy(), image.float(), labels)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(dim=1, keepdim=True)


def test_a_loss_that_is_not_linear_in_its_sum_cannot_say_that_it_is_separable() -> None:
    class SquareRoot(SquaredLoss):
        def value(self, sums: Tensor) -> Tensor:
            return (sums[0] / sums[1]).sqrt()

    network, image = analysed("unet depth 1"), draw(3, *SHAPE)
    plan, labels = plan_of(network, SHAPE, (30, 40)), draw(2, *SHAPE, seed=5)
    with pytest.raises(UsageError, match="SquareRoot is not linear in its first sum; say separable = False"):
        tile_loss(network, plan, SquareRoot(), image, labels)
    value = tile_loss(network, plan, SquareRoot(separable=False), image, labels)
    ordinary = F.mse_loss(network.module(image[None])[0], labels).sqrt()
    found, expected = (torch.autograd.grad(v, [*network.module.parameters()]) for v in (value, ordinary))
    assert largest_difference(found, expected) < 1e-11


def test_tiles_without_a_pixel_that_counts_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from outsize.tiler.analysis.program import Program

    runs: list[int] = []
    forward = Program.forward

    def counted(program: Program, *arguments: Tensor) -> tuple[Tensor, ...]:
        runs.append(1)
        return forward(program, *arguments)

    network, image = analysed("unet depth 1"), draw(3, *SHAPE).requires_grad_()
    labels = torch.full(SHAPE, 255)
    labels[20:30, 5:60] = 1
    expected = gradients_of(loss_by_hand(run_whole(network, image), labels, CrossEntropy()), image, network)
    plan = plan_of(network, SHAPE, (16, 16))
    tile_loss(network, plan, CrossEntropy(ignore_index=255), image, labels)
    monkeypatch.setattr(Program, "forward", counted)
    value = tile_loss(network, plan, CrossEntropy(ignore_index=255), image, labels)
    assert len(runs) == 4  # of 20
    assert largest_difference(gradients_of(value, image, network), expected) < 1e-11


def test_ranks_of_ddp_average_the_gradients_of_their_images(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", train_rank.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    module = train_rank.make_module()
    wanted = [*module.parameters()]
    expected = []
    for rank in range(2):
        image, labels = train_rank.make_sample(rank)
        expected.append(torch.autograd.grad(F.cross_entropy(module(image[None]), labels[None]), wanted))
    mean = [(one + other) / 2 for one, other in zip(*expected, strict=True)]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert largest_difference(found["loss"], mean) < 1e-11
        assert largest_difference(found["output"], found["whole output"]) < 1e-11
        # The second rank had no pixel that counts: it gave 0, and waited for by the first.
        for kind in ("no pixel", "no pixel by sums"):
            halves = [gradient / 2 for gradient in expected[0]]
            assert kind == "no pixel by sums" or largest_difference(found[kind], halves) < 1e-11
            assert all(gradient.isfinite().all() for gradient in found[kind])
            assert any(gradient.any() for gradient in found[kind])
