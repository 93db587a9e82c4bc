"""The tiles of a training: how large its budget lets them be, and which of them each step takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.segmentation.training.recipe import Recipe
from ...models.segmentation.training.sampling import ImageSampler, TileSampler, TrainingTile, labelled_cells
from ...models.segmentation.training.scene import TrainingScene
from ...models.segmentation.training.validation import ValidationTile, list_validation_tiles
from ...tiler.base.errors import UsageError
from ...tiler.base.geometry import Window
from ...tiler.base.text import MB
from ...tiler.labels.labels import RasterLabels
from ...tiler.training.memory import count_tile_bytes, predict_tile_bytes
from ...tiler.training.plan import TrainPlan
from ...tiler.training.planner import SIDES, TrainedImages, choose_training_tiles, count_cache_bytes
from ...tiler.training.trainable import TrainableNetwork
from .survey import Survey, sum_classes

if TYPE_CHECKING:
    from .options import TrainOptions

_LARGEST_SAMPLED = 256
"""Cores of tiles:N that a plan chooses: they are part of what such a step is, so a larger budget changes nothing."""
_VALIDATED = 2
"""Side of validation's cores in units of the training's, where without gradients they take no more memory."""
_OPTIMISER_STATE = 6.0
"""Numbers for each parameter, beside weights and what a tile adds: AdamW's two, the average, and copies while a state
is saved, or sums of a step's groups that wait for each other (`fold_tree`)."""
_CACHE_BYTES = 64 * MB
"""Of decoded blocks of all scenes."""


def choose_cache_bytes(budget: int) -> int:
    """Bytes of decoded blocks of all scenes, of a budget in bytes."""
    return min(_CACHE_BYTES, budget // 8)


def plan_training_tiles(
    options: TrainOptions,
    network: TrainableNetwork,
    scenes: Sequence[TrainingScene],
    cache_bytes: int,
    known: Mapping[str, Any] | None,
) -> TrainPlan:
    """Tiles within the budget; those of a training that goes on stay as they are, since they decide its last bits.

    Raises:
        BudgetError: names a budget, or a core, that would do.
    """
    # Scenes are turned, so that each side may become the other.
    longest = max(extent for scene in scenes for extent in scene.raster.shape_yx)
    labels = [scene.labels.raster for scene in scenes if isinstance(scene.labels, RasterLabels)]
    sides: Sequence[int] | None = None
    core = known["core"] if known else options.core
    if core is not None:
        sides = [core]
    elif options.recipe.step != "image":
        sides = [side for side in SIDES if side <= _LARGEST_SAMPLED]
    return choose_training_tiles(
        network,
        TrainedImages(
            shape=(network.network.bands, longest, longest),
            cache_bytes=count_cache_bytes([*(scene.raster for scene in scenes), *labels], cache_bytes),
            is_sampled=options.recipe.step != "image",
        ),
        memory=options.memory,
        sides=sides,
        cuts=tuple(known["cuts"]) if known else None,
        optimiser_state=_OPTIMISER_STATE,
        # With workers or without: the tiles are the same.
        on_cluster=True,
    )


def _fits(network: TrainableNetwork, plan: TrainPlan, image: int, core: int, batch: int = 1) -> bool:
    """Whether cores of that side, or so many images at once, need no more without gradients than a tile does with them.

    Args:
        image: side of the image.
    """
    assert plan.memory is not None
    side = min(core, image)
    start = (image - side) // 2
    window = Window(y=start, x=start, height=side, width=side)
    live = count_tile_bytes(network, (image, image), window, with_gradients=False)
    return predict_tile_bytes(batch * live) <= plan.memory.tile_bytes


def choose_batch_side(network: TrainableNetwork, plan: TrainPlan, shapes: Sequence[tuple[int, int]], batch: int) -> int:
    """Side of so many windows that go through the network at once, without gradients: the largest that fits, or the
    smallest there is."""
    most = min(extent for shape in shapes for extent in shape)
    sides = [min(side, most) for side in SIDES if side <= _LARGEST_SAMPLED]
    return next((side for side in sides if _fits(network, plan, side, side, batch)), sides[-1])


def choose_validation_tiles(
    network: TrainableNetwork, plan: TrainPlan, survey: Survey, shapes: Sequence[tuple[int, int]]
) -> tuple[ValidationTile, ...]:
    """The tiles of the scenes that validate: the larger, the less overlap."""
    core = plan.core[0]
    larger = _VALIDATED * core
    fits = _fits(network, plan, plan.image_shape[1], larger)
    return tuple(list_validation_tiles(shapes, survey.validation, survey.cell, larger if fits else core))


def make_draw(
    core: int, recipe: Recipe, survey: Survey, shapes: tuple[tuple[int, int], ...]
) -> Callable[[int], Sequence[TrainingTile]]:
    """The tiles of each step; around pixels of classes of weight 0, and for scenes of those alone, there are none.

    Raises:
        UsageError: no pixel weighs anything.
    """
    weighed = tuple(counts * (np.array(recipe.class_weights or 1.0) > 0) for counts in survey.training)
    if not sum_classes(weighed).any():
        raise UsageError(
            "no training pixel has a class whose weight is above 0, got --class-weights "
            f"{','.join(f'{weight:g}' for weight in recipe.class_weights)}; weigh another class"
        )
    if recipe.step == "image":
        sampler = ImageSampler(
            seed=recipe.seed,
            shapes=shapes,
            core=core,
            # All tiles of the scenes that remain: some losses count pixels of every class.
            counts=tuple(counts * found.any() for counts, found in zip(survey.training, weighed, strict=True)),
            cell=survey.cell,
            augmentation=recipe.augmentation,
            deviations=survey.deviations,
        )
        return sampler.draw
    tiles = TileSampler(
        seed=recipe.seed,
        shapes=shapes,
        cell=survey.cell,
        core=core,
        cells=labelled_cells(weighed),
        augmentation=recipe.augmentation,
        deviations=survey.deviations,
    )
    return lambda step: tiles.draw(step, recipe.tiles)
