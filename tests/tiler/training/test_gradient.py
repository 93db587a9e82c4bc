"""The sum of tile gradients is the whole image's gradient, in float64, for every network that torch can train."""

from __future__ import annotations

import pytest
import torch
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.errors import UntileableError
from outsize.tiler.base.geometry import Window
from outsize.tiler.training.tiled_autograd import tile_checkpoint
from outsize.tiler.training.window_source import TensorSource
from torch import Tensor, nn

from ...support.whole_gradients import NETWORKS, analysed, draw, gradients_of, largest_difference, plan_of, run_whole
from ...support.zoo import ZOO

pytestmark = pytest.mark.system

TRAINABLE = [name for name in ZOO if name != "attended"]
POSITION_DEPENDENT = ["unet bilinear corners", "unet transposed overlapping", "reflect padded", "deeplab", "espcn"]


def compare(
    name: str, shape: tuple[int, int], core: tuple[int, int], cuts: tuple[int, ...] = ()
) -> tuple[list[Tensor], float]:
    """The tiles' gradients of image and parameters, and their largest difference from ordinary autograd's."""
    network = analysed(name)
    image = draw(3, *shape).requires_grad_()
    whole = run_whole(network, image)
    direction = draw(*whole.shape, seed=2)
    expected = gradients_of(whole, image, network, direction)
    tiled = tile_checkpoint(network, plan_of(network, shape, core, cuts))(image)
    assert float((tiled - whole).detach().abs().max()) < 1e-10
    found = gradients_of(tiled, image, network, direction)
    return found, largest_difference(found, expected)


@pytest.mark.parametrize("name", [*TRAINABLE, *POSITION_DEPENDENT])
def test_tile_gradients_are_the_whole_images_for_every_plan(name: str) -> None:
    shape = (53, 67)
    first, difference = compare(name, shape, (17, 29))
    assert difference < 1e-11
    # Other tiles, with parts computed again in backward.
    second, difference = compare(name, shape, (41, 7), cuts=(3, 5, 9))
    assert difference < 1e-11
    assert largest_difference(first, second) < 1e-12


@pytest.mark.parametrize("name", ["convolution", "unet depth 2", "strided"])
def test_gradients_of_tiny_images_are_exact(name: str) -> None:
    for shape in ((1, 1), (2, 3), (5, 1)):
        assert compare(name, shape, (1, 2))[1] < 1e-11


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "attended"])
def test_tile_gradients_of_larger_images_are_the_whole_images(name: str) -> None:
    for core, cuts in (((128, 131), ()), ((61, 250), (7, 12))):
        assert compare(name, (384, 391), core, cuts)[1] < 1e-11


@pytest.mark.long
@pytest.mark.parametrize("core", [512, 331])
def test_tile_gradients_of_a_unet_at_1024_are_the_whole_images(core: int) -> None:
    assert compare("unet depth 3", (1024, 1024), (core, core))[1] < 1e-11


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
@pytest.mark.parametrize("name", ["convolution", "unet depth 2", "unet bilinear corners", "deeplab"])
def test_windows_one_pixel_short_give_another_gradient(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TensorSource.read

    def short(source: TensorSource, window: Window) -> tuple[Tensor, None]:
        pixels, _ = read(source, window)
        pixels = pixels.clone()
        inside = {
            "top": window.y > 0,
            "bottom": window.rows.stop < source.shape[1],
            "left": window.x > 0,
            "right": window.columns.stop < source.shape[2],
        }
        if inside[side]:
            pixels[
                {"top": (slice(None), 0), "bottom": (slice(None), -1), "left": (..., 0), "right": (..., -1)}[side]
            ] = 0
        return pixels, None

    network, shape = analysed(name), (90, 110)
    image = draw(3, *shape).requires_grad_()
    whole = run_whole(network, image)
    expected = gradients_of((whole**2).sum(), image, network)
    plan = plan_of(network, shape, (24, 24))

    def difference() -> float:
        tiled = tile_checkpoint(network, plan)(image)
        return largest_difference(gradients_of((tiled**2).sum(), image, network)[1:], expected[1:])

    assert difference() < 1e-11
    monkeypatch.setattr(TensorSource, "read", short)
    assert difference() > 1e-9


def test_a_module_that_torch_cannot_train_is_refused_in_torchs_words() -> None:
    network = analysed("attended")
    tiled = tile_checkpoint(network, plan_of(network, (20, 30), (8, 8)))
    with pytest.raises(UntileableError, match=r"torch itself cannot train this module: .*modified inplace"):
        tiled(draw(3, 20, 30))


class Doubtful(nn.Module):
    """Something about its gradients that its operations do not show."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "block":
            with torch.no_grad():
                y = self.a(x)
        else:
            y = self.a(x)
        return self.b(Reversed.apply(y) if self.kind == "rule" else y)


class Reversed(torch.autograd.Function):
    """The gradient with its sign changed, as adversarial training uses it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> Tensor:
        del ctx
        return -cotangent


@pytest.mark.parametrize("kind", ["block", "rule", "hook"])
def test_gradients_that_the_graph_does_not_show_are_refused(kind: str) -> None:
    module = Doubtful(kind).double()
    if kind == "hook":
        module.b.register_full_backward_hook(lambda module, before, after: (before[0] * 2,))  # noqa: ARG005
    network = analyze_network(module, bands=3)
    with pytest.raises(
        UntileableError, match=r"the gradient of a\.(weight|bias) is another than that of the operations"
    ):
        tile_checkpoint(network, plan_of(network, (20, 30), (8, 8)))(draw(3, 20, 30))
