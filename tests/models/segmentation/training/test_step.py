"""A step's gradient: that of the loss over the tiles' cores, each in its whole scene, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from outsize.models.segmentation.networks.model import TileNetwork
from outsize.models.segmentation.networks.scaling import Scaling
from outsize.models.segmentation.networks.unet import UNet
from outsize.models.segmentation.training.augmentation import Augmentation
from outsize.models.segmentation.training.loss_text import parse_loss
from outsize.models.segmentation.training.losses import OneAgainstAll
from outsize.models.segmentation.training.sampling import ImageSampler, TileSampler, TrainingTile, labelled_cells
from outsize.models.segmentation.training.scene import SceneLabels, TrainingScene
from outsize.models.segmentation.training.split import BlockSplit
from outsize.models.segmentation.training.step import StepEngine
from outsize.models.segmentation.training.survey import count_labels
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import LabelError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.labels.labels import UNLABELLED, LabelOptions, open_labels
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.training.trainable import prepare_training
from torch import Tensor
from torch.nn import functional as F

from ....support.rasters import write_geotiff

SHAPES = ((83, 71), (61, 97))
CLASSES, CELL, CORE = 3, 11, 23
FILL = (40.0, 60.0)
DEVIATIONS = (20.0, 30.0)
WEIGHTS = (1.0, 2.5, 0.5)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(1)
    module = TileNetwork(UNet(2, CLASSES, (4, 6, 8)), Scaling.z_score(mean=(50, 70), stddev=DEVIATIONS), "logits")
    return analyze_network(module.double().eval(), 2, torch.float64)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingScene]:
    """Two scenes with nodata, unlabelled pixels and a split."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    found: list[TrainingScene] = []
    for index, shape in enumerate(SHAPES):
        image = rng.integers(1, 120, (2, *shape)).astype(np.uint8)
        image[:, 30:37, 20:41] = 0
        labels = rng.integers(0, CLASSES, shape).astype(np.uint8)
        labels[rng.random(shape) < 0.2] = 255
        raster = open_raster(write_geotiff(folder / f"{index}.tif", image, nodata=0))
        path = write_geotiff(folder / f"{index}-labels.tif", labels[None])
        names = ("a", "b", "c")
        opened = open_labels(str(path), raster.place, shape, of="scene", names=names, options=LabelOptions())
        split = BlockSplit(share=0.15, block=13, guard=3, offset=0.1 + 0.3 * index)
        found.append(TrainingScene(raster=raster, labels=opened, split=split))
    return found


def whole_variant(scene: TrainingScene, tile: TrainingTile) -> tuple[Tensor, Tensor]:
    """(1, bands, height, width) and (height, width) of the whole scene as the tile's step shows it."""
    shape = scene.raster.shape_yx
    stored = scene.raster.open_reader().read(Window.whole(shape)).astype(np.float64)
    missing = (stored == 0).all(0)
    variant = tile.variant
    if variant.gain:
        stored = stored * np.array(variant.gain)[:, None, None] + np.array(variant.offset)[:, None, None]
    image = np.where(missing, np.array(FILL)[:, None, None], stored)
    labels = scene.labels.open_reader().read(Window.whole(shape))
    assert scene.split is not None
    counted = np.where(scene.split.find_training(Window.whole(shape)) & ~missing, labels, UNLABELLED)
    turned = [np.ascontiguousarray(variant.turn.apply(array)) for array in (image, counted.astype(np.int32))]
    return torch.from_numpy(turned[0])[None], torch.from_numpy(turned[1])


def ordinary_gradient(
    network: Network, scenes: list[TrainingScene], tiles: list[TrainingTile], *, with_context: bool = True
) -> tuple[float, dict[str, Tensor]]:
    """By autograd on whole images, in one graph; without context, on the cores cut out of them."""
    above, below = torch.zeros((), dtype=torch.float64), 0.0
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    for tile in tiles:
        image, labels = whole_variant(scenes[tile.scene], tile)
        rows, columns = tile.core.slices()
        logits = (
            network.module(image)[..., rows, columns] if with_context else network.module(image[..., rows, columns])
        )
        target = labels[rows, columns].long()
        above = above + F.cross_entropy(logits, target[None], weight, ignore_index=UNLABELLED, reduction="sum")
        below += float(weight[target[target != UNLABELLED]].sum())
    parameters = dict(network.module.named_parameters())
    loss = above / below
    return float(loss.detach()), dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
    )


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference in units of each parameter's largest gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)


def make_samplers(scenes: list[TrainingScene], augmentation: Augmentation) -> tuple[TileSampler, ImageSampler]:
    counts = tuple(count_labels(scene, cell=CELL, classes=CLASSES, part="training") for scene in scenes)
    tiles = TileSampler(
        seed=3,
        shapes=SHAPES,
        cell=CELL,
        core=CORE,
        cells=labelled_cells(counts),
        augmentation=augmentation,
        deviations=DEVIATIONS,
    )
    image = ImageSampler(
        seed=3,
        shapes=SHAPES,
        core=CORE,
        counts=counts,
        cell=CELL,
        augmentation=augmentation,
        deviations=DEVIATIONS,
    )
    return tiles, image


AUGMENTATION = Augmentation.parse("flips,turns,radiometry=0.2")


def test_a_step_of_tiles_has_the_whole_images_gradient_restricted_to_their_cores(
    network: Network, scenes: list[TrainingScene]
) -> None:
    loss = parse_loss("cross-entropy", WEIGHTS)
    engine = StepEngine(prepare_training(network, 2, torch.float64), scenes, loss, FILL)
    sampler, _ = make_samplers(scenes, AUGMENTATION)
    tiles = sampler.draw(5, 6)
    assert {tile.scene for tile in tiles} == {0, 1}
    found = engine.compute(tiles)
    expected = ordinary_gradient(network, scenes, tiles)
    assert found.loss == pytest.approx(expected[0], rel=1e-12)
    assert difference(found.gradients, expected[1]) < 1e-11
    # Cores without their context have another gradient: the test would see it.
    _, blind = ordinary_gradient(network, scenes, tiles, with_context=False)
    assert difference(blind, expected[1]) > 1e-2
    counted = [whole_variant(scenes[tile.scene], tile)[1][tile.core.slices()] for tile in tiles]
    assert found.pixels == sum(int((labels != UNLABELLED).sum()) for labels in counted)


@pytest.mark.parametrize("text", ["cross-entropy", "cross-entropy+0.5*dice"])
def test_a_step_of_a_whole_scene_has_its_gradient(network: Network, scenes: list[TrainingScene], text: str) -> None:
    engine = StepEngine(prepare_training(network, 2, torch.float64), scenes, parse_loss(text, WEIGHTS), FILL)
    _, sampler = make_samplers(scenes, AUGMENTATION)
    tiles = sampler.draw(2)
    assert len(tiles) > 9
    image, labels = whole_variant(scenes[tiles[0].scene], tiles[0])
    logits = network.module(image)[0]
    known = labels != UNLABELLED
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    loss = F.cross_entropy(logits[:, known].T, labels[known].long(), weight)
    if "dice" in text:
        probability, truth = logits[:, known].softmax(0), F.one_hot(labels[known].long(), CLASSES).T
        both = (probability * truth).sum(1)
        loss = loss + 0.5 * (1 - ((2 * both + 1) / (probability.sum(1) + truth.sum(1) + 1)).mean())
    parameters = dict(network.module.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    found = engine.compute(tiles)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert difference(found.gradients, expected) < 1e-11
    assert found.pixels == int(known.sum())


def test_every_scene_is_seen_once_in_each_round(scenes: list[TrainingScene]) -> None:
    _, sampler = make_samplers(scenes, AUGMENTATION)
    for turn_of in range(5):
        seen = [sampler.draw(2 * turn_of + place)[0].scene for place in range(2)]
        assert sorted(seen) == [0, 1]


def test_the_stream_of_tiles_depends_on_seed_and_step_alone(scenes: list[TrainingScene]) -> None:
    sampler, _ = make_samplers(scenes, AUGMENTATION)
    again, _ = make_samplers(scenes, AUGMENTATION)
    forward = [sampler.draw(step, 3) for step in range(20)]
    assert forward == [again.draw(step, 3) for step in reversed(range(20))][::-1]
    tiles = [tile for step in forward for tile in step]
    assert len({(tile.scene, tile.core) for tile in tiles}) > 55
    for tile in tiles:
        scene = scenes[tile.scene]
        reader = SceneLabels(scene=scene, part="training", turn=tile.variant.turn).open_reader()
        assert (reader.read(tile.core) != UNLABELLED).any()
        assert tile.core.shape == (CORE, CORE)


def test_predictions_of_tiles_are_those_of_the_whole_scene(network: Network, scenes: list[TrainingScene]) -> None:
    engine = StepEngine(prepare_training(network, 2, torch.float64), scenes, parse_loss("cross-entropy"), FILL)
    plain, _ = make_samplers(scenes, Augmentation.parse("none"))
    image, _ = whole_variant(scenes[1], next(t for t in plain.draw(0, 20) if t.scene == 1))
    with torch.no_grad():
        expected = network.module(image)[0].argmax(0).numpy()
    window = Window(y=20, x=31, height=29, width=43)
    assert np.array_equal(engine.predict(1, window), expected[window.slices()])
    # Other weights in place of the network's own, which stay.
    other = {name: -value for name, value in network.module.state_dict().items() if name.startswith("network.head")}
    assert not np.array_equal(engine.predict(1, window, other), expected[window.slices()])
    assert np.array_equal(engine.predict(1, window), expected[window.slices()])


def test_a_batch_to_calibrate_on_holds_no_pixel_of_a_validation_block(
    network: Network, scenes: list[TrainingScene], tmp_path: Path
) -> None:
    """Scenes that differ in validation blocks alone give the same batch; one that differs elsewhere another."""

    def batch(places: str) -> Tensor:
        changed: list[TrainingScene] = []
        for index, scene in enumerate(scenes):
            whole = Window.whole(scene.raster.shape_yx)
            assert scene.split is not None
            held = scene.split.find_validation(whole)
            image = scene.raster.open_reader().read(whole)
            where = {"none": held & False, "held": held, "others": ~held}[places]
            image[:, where] = 200
            path = write_geotiff(tmp_path / f"{places}-{index}.tif", image, nodata=0)
            changed.append(replace(scene, raster=open_raster(path)))
        engine = StepEngine(prepare_training(network, 2, torch.float64), changed, parse_loss("cross-entropy"), FILL)
        sampler, _ = make_samplers(scenes, AUGMENTATION)
        return engine.read_batch(lambda step: sampler.draw(step, 2), 40, 6)

    plain = batch("none")
    assert plain.shape == (6, 2, 40, 40)
    assert torch.equal(batch("held"), plain)
    assert not torch.equal(batch("others"), plain)
    filled = (plain == torch.tensor(FILL, dtype=plain.dtype)[:, None, None]).all(1)
    assert 0.05 < filled.double().mean() < 0.4


def test_tiles_without_labels_are_refused_and_losses_have_names(network: Network, scenes: list[TrainingScene]) -> None:
    engine = StepEngine(prepare_training(network, 2, torch.float64), scenes, parse_loss("cross-entropy"), FILL)
    plain, _ = make_samplers(scenes, Augmentation.parse("none"))
    tile = plain.draw(0, 1)[0]
    nodata = Window(y=31, x=22, height=4, width=5)
    with pytest.raises(LabelError, match="no labelled pixel counts"):
        engine.compute([TrainingTile(scene=tile.scene, variant=tile.variant, core=nodata)])
    for text in ("l2", "cross-entropy+", "much*dice", "-1*dice", ""):
        with pytest.raises(UsageError, match="a loss must be"):
            parse_loss(text)
    for text in ("mse", "cross-entropy+0.1*huber"):
        with pytest.raises(UsageError, match=r"(mse|huber) is a loss of numbers, and labels are classes here"):
            parse_loss(text)
    assert parse_loss("binary") == OneAgainstAll(ignore_index=UNLABELLED)
    with pytest.raises(UsageError, match="class-weights are for cross-entropy"):
        parse_loss("dice", WEIGHTS)


def test_the_labels_are_counted_once_whatever_the_cells(scenes: list[TrainingScene]) -> None:
    for scene, part in ((scene, part) for scene in scenes for part in ("training", "validation", "all")):
        totals = [
            count_labels(scene, cell=cell, classes=CLASSES, part=part).sum((0, 1)) for cell in (CELL, 7, 64, 5000)
        ]
        assert all(np.array_equal(total, totals[0]) for total in totals)
        labels = SceneLabels(scene=scene, part=part).open_reader().read(Window.whole(scene.raster.shape_yx))
        assert np.array_equal(totals[0], [(labels == value).sum() for value in range(CLASSES)])
