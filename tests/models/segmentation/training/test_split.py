"""The split: the guard holds, the share is kept, blocks follow from seed and position alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from outsize.models.segmentation.networks.unet import UNet
from outsize.models.segmentation.training.split import (
    BlockSplit,
    choose_block,
    choose_split,
    compute_reach,
    seed_offset,
)
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.geometry import Grid, Interval, Window
from torch import nn

from ....support.analysed import analysed

pytestmark = pytest.mark.system

SHAPE = (311, 277)


@pytest.fixture(scope="module")
def network() -> Network:
    return analyze_network(UNet(2, 3, (4, 4, 4)).eval(), 2, torch.float32)


def find_leaks(network: Network, split: BlockSplit) -> int:
    """Training pixels whose receptive field holds a validation pixel."""
    validation = split.find_validation(Window.whole(SHAPE))
    training = split.find_training(Window.whole(SHAPE))
    assert validation.any()
    assert training.any()
    assert not (training & validation).any()
    seen = [
        [network.needed_interval(axis, Interval(start=at, stop=at + 1)).clamp(extent) for at in range(extent)]
        for axis, extent in enumerate(SHAPE)
    ]
    # Validation pixels above and left of each: four of these sums count those in a rectangle.
    sums = np.pad(validation.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    leaks = 0
    for y, x in np.argwhere(training):
        rows, columns = seen[0][y], seen[1][x]
        corners = sums[np.ix_((rows.start, rows.stop), (columns.start, columns.stop))]
        leaks += bool(corners[0, 0] + corners[1, 1] - corners[0, 1] - corners[1, 0])
    return leaks


def test_no_training_pixel_sees_a_validation_block(network: Network) -> None:
    split = BlockSplit(share=0.2, block=61, guard=compute_reach(network, [SHAPE]), offset=0.3)
    assert find_leaks(network, split) == 0
    # One pixel less, and some do: the guard is no larger than it must be.
    assert find_leaks(network, replace(split, guard=split.guard - 1)) > 0


def test_no_training_pixel_feels_a_validation_pixel_by_gradient(network: Network) -> None:
    """What the analysis says of the receptive field, autograd says too."""
    split = BlockSplit(share=0.2, block=61, guard=compute_reach(network, [SHAPE]), offset=0.3)
    module = UNet(2, 3, (4, 4, 4)).double()
    for parameter in module.parameters():  # all positive: no dead ReLU hides a path
        nn.init.uniform_(parameter, 0.1, 1.0)
    image = torch.rand(1, 2, *SHAPE, dtype=torch.float64, requires_grad=True)
    training = torch.from_numpy(split.find_training(Window.whole(SHAPE)))
    module(image)[:, :, training].sum().backward()
    assert image.grad is not None
    seen = (image.grad[0] != 0).any(0).numpy()
    assert seen[training.numpy()].all()
    assert not seen[split.find_validation(Window.whole(SHAPE))].any()


def test_a_window_has_the_split_of_the_whole() -> None:
    split = BlockSplit(share=0.3, block=37, guard=11, offset=0.9)
    for kind in (split.find_training, split.find_validation):
        whole = kind(Window.whole(SHAPE))
        grid = Grid(shape=SHAPE, cell=(53, 41))
        for at in grid:
            window = grid.window(*at)
            assert np.array_equal(kind(window), whole[window.slices()])


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
@pytest.mark.parametrize("count", [8, 23, 97])
def test_blocks_are_spread_evenly(share: float, count: int) -> None:
    for seed in range(5):
        split = BlockSplit(share=share, block=10, guard=0, offset=seed_offset(seed, 0))
        found = np.array([[split.validates(row, column) for column in range(count)] for row in range(count)])
        assert abs(found.mean() - share) < 0.7 / count
        # Every neighbourhood that should hold a few blocks does.
        side = min(count, int(np.ceil(2.6 / np.sqrt(share))))
        parts = np.lib.stride_tricks.sliding_window_view(found, (side, side))
        assert parts.any((2, 3)).all()


def test_the_split_depends_on_the_seed_and_keeps_rare_classes_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros((9, 11, 5), np.int64)
    counts[..., 0] = rng.integers(0, 100, (9, 11))
    for rare in range(1, 5):  # three blocks each
        for _ in range(3):
            counts[rng.integers(9), rng.integers(11), rare] = 20
    chosen = {}
    for seed in range(8):
        split = choose_split(counts, share=0.2, block=50, guard=9, seed=seed, scene=0)
        assert split == choose_split(counts, share=0.2, block=50, guard=9, seed=seed, scene=0)
        validating = np.array([[split.validates(row, column) for column in range(11)] for row in range(9)])
        assert (counts[validating].sum(0) > 0).all()
        assert (counts[~validating].sum(0) > 0).all()
        chosen[split.offset] = split
    assert len(chosen) == 8


def test_a_share_of_zero_trains_on_all() -> None:
    split = BlockSplit(share=0.0, block=10, guard=100, offset=0.1)
    assert split.find_training(Window.whole(SHAPE)).all()
    assert not split.find_validation(Window.whole(SHAPE)).any()
    with pytest.raises(UsageError, match="share of validation"):
        BlockSplit(share=1.0, block=10, guard=1, offset=0)


def test_blocks_are_wide_enough_for_their_guards() -> None:
    assert choose_block([(512, 512)], 46) == 92
    assert choose_block([(30_000, 30_000)], 46) == 1024
    assert choose_block([(100, 100)], 1) == 32


@pytest.mark.parametrize(
    "name",
    [
        "unet bilinear",
        "unet bilinear corners",
        "unet bilinear corners padded",
        "unet bicubic",
        "unet bicubic corners",
        "unet nearest",
        "unet nearest exact",
        "deeplab",
        "reflect padded",
    ],
)
def test_the_reach_is_that_of_the_gradient(name: str) -> None:
    """Of output pixels along the diagonal and at the corners of a scene, and of the scene turned."""
    network = analysed(name)
    shape = (76, 61)
    module = copy.deepcopy(network.module)
    for parameter in module.parameters():  # all positive: no dead ReLU hides a path
        nn.init.uniform_(parameter, 0.1, 1.0)
    felt = 0
    for height, width in (shape, shape[::-1]):
        image = torch.rand(1, 3, height, width, dtype=torch.float64, requires_grad=True)
        output = module(image)[0].sum(0)
        for y in (*range(0, height, 5), height - 1):
            x = y * (width - 1) // (height - 1)
            (slope,) = torch.autograd.grad(output[y, x], image, retain_graph=True)
            rows, columns = (slope[0] != 0).any(0).nonzero(as_tuple=True)
            felt = max(felt, int((rows - y).abs().max()), int((columns - x).abs().max()))
    # Of the pixels that a pooling looks at, the largest alone is felt.
    assert felt <= compute_reach(network, [shape]) <= felt + 4


def test_the_reach_in_a_large_scene_is_that_of_a_smaller_one_of_the_same_phase() -> None:
    network = analysed("reflect padded")
    period = network.stride[0] * network.size_multiple
    assert compute_reach(network, [(100, 90)]) == compute_reach(network, [(100 + 10**6 * period, 90 + 10**6 * period)])


def test_a_network_of_another_scale_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2))
    with pytest.raises(UsageError, match="one output pixel for each input pixel"):
        compute_reach(analyze_network(module.eval(), 2, torch.float32), [SHAPE])
