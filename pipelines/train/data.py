"""The data of a training: scenes with labels, split, surveyed and sampled; the network set up for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...models.segmentation.files.classes import LabelClasses
from ...models.segmentation.networks.meaning import Meaning
from ...models.segmentation.networks.model import SegmentationClass, SegmentationModel, TileNetwork, meaning_of
from ...models.segmentation.networks.norm import calibrating
from ...models.segmentation.training.loss_text import parse_loss
from ...models.segmentation.training.losses import CrossEntropy, SumOfLosses
from ...models.segmentation.training.recipe import Recipe
from ...models.segmentation.training.sampling import TrainingTile
from ...models.segmentation.training.scene import TrainingScene
from ...models.segmentation.training.split import compute_reach
from ...models.segmentation.training.step import StepEngine
from ...models.segmentation.training.validation import ValidationTile
from ...tiler.analysis.network import analyze_network
from ...tiler.base.errors import UsageError
from ...tiler.base.text import parse_bytes
from ...tiler.labels.labels import open_labels
from ...tiler.rasters.raster import Raster
from ...tiler.training.plan import TrainPlan
from ...tiler.training.trainable import prepare_training
from ..base.console import Console, count_of
from .survey import Survey, describe_survey, require_labels, run_survey
from .tiles import (
    choose_batch_side,
    choose_cache_bytes,
    choose_validation_tiles,
    make_draw,
    plan_training_tiles,
)

if TYPE_CHECKING:
    from .options import TrainOptions

_CALIBRATED = 8
"""Cores in the batch that frozen norms are calibrated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """All that a trainer asks for."""

    scenes: tuple[TrainingScene, ...]
    classes: tuple[SegmentationClass, ...]
    recipe: Recipe
    """With the class weights that were wanted."""
    engine: StepEngine
    draw: Callable[[int], Sequence[TrainingTile]]
    validation_tiles: tuple[ValidationTile, ...]
    survey: Survey
    reach: int
    start: SegmentationModel | None
    meaning: Meaning
    module: TileNetwork
    remarks: tuple[str, ...]
    plan: TrainPlan
    """For an image as long and wide as the longest side of any scene."""

    @property
    def predicted_bytes(self) -> int:
        """Peak of this process, and of each worker."""
        return self.plan.memory.total_bytes if self.plan.memory else 0

    def describe(self) -> dict[str, Any]:
        """For people and for the report, as plain values."""
        return {
            "classes": [{"name": entry.name, "colour": list(entry.colour)} for entry in self.classes],
            "class_values": [list(scene.labels.class_values) for scene in self.scenes],
            "class_weights": list(self.recipe.class_weights),
            "reach": self.reach,
            "scenes": [scene.raster.path for scene in self.scenes],
            "labels": [scene.labels.path for scene in self.scenes],
            "held_out": [scene.is_held_out for scene in self.scenes],
            "training_pixels": self.survey.training_pixels.tolist(),
            "validation_pixels": self.survey.validation_pixels.tolist(),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "splits": [asdict(split) if split else None for split in self.survey.splits],
            "tiles": {"core": self.plan.core[0], "cuts": list(self.plan.cuts)},
        }

    def calibrate(self) -> None:
        """Give frozen norms their statistics from a batch of the first steps' tiles."""
        shapes = [scene.raster.shape_yx for scene in self.scenes if scene.trains]
        side = choose_batch_side(self.engine.network, self.plan, shapes, _CALIBRATED)
        batch = self.engine.read_batch(self.draw, side, _CALIBRATED)
        with calibrating(self.module.network):
            self.module.logits(batch)

    def make_model(self, name: str, weights: dict[str, Tensor]) -> SegmentationModel:
        """The model of some weights of the network."""
        import copy

        network = copy.deepcopy(self.module.network)
        network.load_state_dict(weights)
        bands = self.start.bands if self.start else self.scenes[0].raster.band_names
        return SegmentationModel(
            name=name,
            network=network.eval(),
            bands=tuple(bands),
            scaling=self.survey.scaling,
            fill=self.survey.fill,
            classes=self.classes,
            task=self.meaning.task,
            activation=self.meaning.activation,
            threshold=self.meaning.threshold if self.meaning.task == "binary" else None,
            architecture=self.start.architecture if self.start else "",
            hyperparameters=self.start.hyperparameters if self.start else {},
        )


def prepare_data(
    console: Console,
    options: TrainOptions,
    rasters: Sequence[Raster],
    found: LabelClasses,
    module: TileNetwork,
    start: SegmentationModel | None,
    known: Mapping[str, Any] | None = None,
) -> TrainingData:
    """Open labels, analyse the network, plan tiles, split, survey.

    Args:
        known: core and cuts of the training that goes on; None: they are chosen.

    Raises:
        BudgetError: no tile fits the budget.
        UntileableError: a network that cannot be trained exactly.
        UsageError: no labelled pixel to train on, or to validate on; classes without pixels.
    """
    bands, names = rasters[0].bands, [entry.name for entry in found.classes]
    meaning = _decide_meaning(options, bands, len(names), start)
    _require_loss(options, len(names), meaning)
    scenes = _open_scenes(options, rasters, found)
    with console.stages("analysis") as tell:
        network = analyze_network(module, bands, torch.float32, tell=tell)
    shapes = tuple(scene.raster.shape_yx for scene in scenes)
    reach = compute_reach(network, shapes)
    trainable = prepare_training(network, bands, torch.float32)
    cache = choose_cache_bytes(parse_bytes(options.memory))
    plan = plan_training_tiles(options, trainable, scenes, cache, known)
    core = plan.core[0]
    survey = Survey.load(options.out)
    if survey is None:
        survey = run_survey(console, options, scenes, core=core, reach=reach, classes=len(names), start=start)
        require_labels(options, survey, names)
    scenes = tuple(replace(scene, split=split) for scene, split in zip(scenes, survey.splits, strict=True))
    _set_scaling(module, survey)
    recipe = _weigh(options, survey, len(names))
    loss = parse_loss(recipe.loss, recipe.class_weights)
    return TrainingData(
        scenes=scenes,
        classes=found.classes,
        recipe=recipe,
        engine=StepEngine(trainable, scenes, loss, survey.fill, plan.cuts, cache, meaning.bound(torch.float32)),
        draw=make_draw(core, recipe, survey, shapes),
        validation_tiles=choose_validation_tiles(trainable, plan, survey, shapes),
        survey=survey,
        reach=reach,
        start=start,
        meaning=meaning,
        module=module,
        remarks=(
            *(scene.labels.note for scene in scenes if scene.labels.note),
            *describe_survey(survey, names, scenes),
            f"tiles: {plan.explain_tile()}",
            f"memory: {plan.explain_memory()}{', of each process' if options.workers.uses_dask else ''}",
        ),
        plan=plan,
    )


def _decide_meaning(options: TrainOptions, bands: int, classes: int, start: SegmentationModel | None) -> Meaning:
    """What the network's channels answer.

    Raises:
        UsageError: a model of another number of bands than the scenes have.
    """
    if start is None:
        channels = 1 if options.task == "binary" else classes
        return Meaning(channels=channels, task=options.task or "multiclass", activation="none")
    if len(start.bands) != bands:
        raise UsageError(
            f"the model takes {count_of(len(start.bands), 'band')}, the scenes have {bands}; choose with --bands"
        )
    return meaning_of(start)


def _open_scenes(options: TrainOptions, rasters: Sequence[Raster], found: LabelClasses) -> tuple[TrainingScene, ...]:
    """Every scene with its labels, not split yet."""
    label_options = replace(options.label_options, values=found.values or options.label_options.values)
    names = [entry.name for entry in found.classes]
    paths = options.labels if len(options.labels) == len(rasters) else options.labels * len(rasters)
    return tuple(
        TrainingScene(
            raster=raster,
            labels=open_labels(
                labels, raster.place, raster.shape_yx, of=raster.path, names=names, options=label_options
            ),
            split=None,
            is_held_out=scene in options.validate_on,
        )
        for scene, raster, labels in zip(options.scenes, rasters, paths, strict=True)
    )


def _set_scaling(module: TileNetwork, survey: Survey) -> None:
    with torch.no_grad():
        module.subtract.copy_(torch.tensor(survey.scaling.subtract)[None, :, None, None])
        module.divide.copy_(torch.tensor(survey.scaling.divide)[None, :, None, None])


def _require_loss(options: TrainOptions, classes: int, meaning: Meaning) -> None:
    """Before anything that takes time.

    Raises:
        UsageError: no loss of that name, or weights that do not fit it.
    """
    weights = options.recipe.class_weights
    if weights and len(weights) != classes:
        raise UsageError(f"--class-weights must be one for each of {count_of(classes, 'class')}, got {len(weights)}")
    loss = parse_loss(options.recipe.loss, weights or (1.0,) * classes * options.balanced)
    parts = loss.losses if isinstance(loss, SumOfLosses) else (loss,)
    if meaning.task == "binary" and any(isinstance(part, CrossEntropy) for part in parts):
        raise UsageError(
            f"a cross-entropy needs a channel for each class, and the network has one; take --loss binary or dice, got "
            f"{options.recipe.loss}"
        )


def _weigh(options: TrainOptions, survey: Survey, classes: int) -> Recipe:
    """The recipe with weights of classes: as given, or n / (classes * n_c), at most 10."""
    recipe = options.recipe
    if not options.balanced:
        return recipe
    counts = survey.training_pixels.astype(np.float64)
    weights = np.where(counts > 0, np.minimum(counts.sum() / (classes * np.maximum(counts, 1)), 10.0), 1.0)
    return replace(recipe, class_weights=tuple(round(float(weight), 4) for weight in weights))
