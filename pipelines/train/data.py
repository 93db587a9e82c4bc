"""The data of a training: scenes with labels, split, surveyed and sampled; the network set up for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from ...models.segmentation.files.classes import LabelClasses
from ...models.segmentation.networks.meaning import Meaning
from ...models.segmentation.networks.model import SegmentationClass, SegmentationModel, TileNetwork, meaning_of
from ...models.segmentation.networks.norm import calibrating
from ...models.segmentation.networks.scaling import Scaling, ScalingKind
from ...models.segmentation.training.loss_text import parse_loss
from ...models.segmentation.training.losses import CrossEntropy, SumOfLosses
from ...models.segmentation.training.moments import Moments
from ...models.segmentation.training.recipe import Recipe
from ...models.segmentation.training.sampling import ImageSampler, TileSampler, TrainingTile, labelled_cells
from ...models.segmentation.training.scene import TrainingScene
from ...models.segmentation.training.split import Split, choose_block, choose_split, compute_reach
from ...models.segmentation.training.step import StepEngine
from ...models.segmentation.training.survey import Counts, count_labels, measure_bands
from ...models.segmentation.training.validation import ValidationTile, list_validation_tiles
from ...tiler.analysis.network import Network, analyze_network
from ...tiler.base.errors import OutputError, UsageError
from ...tiler.base.geometry import Window
from ...tiler.base.text import MB, first_line, parse_bytes
from ...tiler.labels.labels import RasterLabels, describe_ignored, open_labels
from ...tiler.rasters.raster import Raster
from ...tiler.system.files import write_durably
from ...tiler.training.memory import count_tile_bytes, predict_tile_bytes
from ...tiler.training.plan import TrainPlan
from ...tiler.training.planner import SIDES, TrainedImages, choose_training_tiles, count_cache_bytes
from ...tiler.training.trainable import TrainableNetwork, prepare_training
from ..base.console import Console, count_of

if TYPE_CHECKING:
    from .options import TrainOptions

SURVEY, COUNTS = "survey.json", "survey.safetensors"
_VALIDATED = 2
"""Side of validation's cores in units of the training's, where without gradients they take no more memory."""
_LARGEST_SAMPLED = 256
"""Cores of tiles:N that a plan chooses: they are part of what such a step is, so a larger budget changes nothing."""
_OPTIMISER_STATE = 6.0
"""Numbers for each parameter, beside weights and what a tile adds: AdamW's two, the average, and copies while a state
is saved, or sums of a step's groups that wait for each other (`fold_tree`)."""
_CACHE_BYTES = 64 * MB
"""Of decoded blocks of all scenes."""
_CALIBRATED = 8
"""Cores in the batch that frozen norms are calibrated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the passes over scenes and labels found; kept, so that going on needs none of them."""

    splits: tuple[Split | None, ...]
    """Of each scene."""
    scaling: Scaling
    fill: tuple[float, ...]
    means: tuple[float, ...]
    """Of each band over the valid pixels that train, in raw units."""
    deviations: tuple[float, ...]
    cell: int
    training: tuple[Counts, ...] = field(repr=False)
    """Of each scene, (rows, columns, classes) labelled pixels that are trained on."""
    validation: tuple[Counts, ...] = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write FOLDER/survey.safetensors, then FOLDER/survey.json, without which there is no survey; if there is one,
        it stays as it is."""
        if (folder / SURVEY).exists():
            return
        counts = {f"training.{i}": entry for i, entry in enumerate(self.training)}
        counts |= {f"validation.{i}": entry for i, entry in enumerate(self.validation)}
        write_durably(folder / COUNTS, save(counts))
        values = {
            "splits": [asdict(split) if split else None for split in self.splits],
            "scaling": asdict(self.scaling),
            "fill": list(self.fill),
            "means": list(self.means),
            "deviations": list(self.deviations),
            "cell": self.cell,
        }
        write_durably(folder / SURVEY, json.dumps(values, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Survey | None:
        """None where there is none.

        Raises:
            OutputError: damaged files.
        """
        if not (folder / SURVEY).exists():
            return None
        try:
            values = json.loads((folder / SURVEY).read_text())
            counts = load_file(folder / COUNTS)
            kind = values["scaling"]["kind"]
            return cls(
                splits=tuple(Split(**split) if split else None for split in values["splits"]),
                scaling=Scaling(
                    kind=cast("ScalingKind | tuple[ScalingKind, ...]", kind if isinstance(kind, str) else tuple(kind)),
                    subtract=tuple(values["scaling"]["subtract"]),
                    divide=tuple(values["scaling"]["divide"]),
                ),
                fill=tuple(values["fill"]),
                means=tuple(values["means"]),
                deviations=tuple(values["deviations"]),
                cell=values["cell"],
                training=tuple(counts[f"training.{i}"] for i in range(len(values["splits"]))),
                validation=tuple(counts[f"validation.{i}"] for i in range(len(values["splits"]))),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise OutputError(
                f"the survey in {folder} cannot be read: {first_line(error)}; --overwrite begins anew"
            ) from error


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
            "training_pixels": _sum(self.survey.training).tolist(),
            "validation_pixels": _sum(self.survey.validation).tolist(),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "splits": [asdict(split) if split else None for split in self.survey.splits],
            "tiles": {"core": self.plan.core[0], "cuts": list(self.plan.cuts)},
        }

    def calibrate(self, network: nn.Module) -> None:
        """Give frozen norms their statistics from a batch of the first steps' tiles."""
        shapes = [scene.raster.shape_yx for scene in self.scenes if scene.trains]
        most = min(extent for shape in shapes for extent in shape)
        sides = [min(side, most) for side in SIDES if side <= _LARGEST_SAMPLED]
        side = next((s for s in sides if _fits(self.engine.network, self.plan, s, s, _CALIBRATED)), sides[-1])
        batch = self.engine.read_batch(self.draw, side, _CALIBRATED)
        with calibrating(network):
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
    bands = rasters[0].bands
    if start is not None and len(start.bands) != bands:
        raise UsageError(
            f"the model takes {count_of(len(start.bands), 'band')}, the scenes have {bands}; choose with --bands"
        )
    meaning = (
        meaning_of(start)
        if start is not None
        else Meaning(
            channels=1 if options.task == "binary" else len(found.classes),
            task=options.task or "multiclass",
            activation="none",
        )
    )
    _require_loss(options, len(found.classes), meaning)
    label_options = replace(options.label_options, values=found.values or options.label_options.values)
    names = [entry.name for entry in found.classes]
    scenes = tuple(
        TrainingScene(
            raster=raster,
            labels=open_labels(
                labels, raster.place, raster.shape_yx, of=raster.path, names=names, options=label_options
            ),
            split=None,
            is_held_out=scene in options.validate_on,
        )
        for scene, raster, labels in zip(
            options.scenes,
            rasters,
            options.labels if len(options.labels) == len(rasters) else options.labels * len(rasters),
            strict=True,
        )
    )
    with console.stages("analysis") as tell:
        network: Network = analyze_network(module, bands, torch.float32, tell=tell)
    reach = compute_reach(network, [scene.raster.shape_yx for scene in scenes])
    trainable: TrainableNetwork = prepare_training(network, bands, torch.float32)
    budget = parse_bytes(options.memory)
    cache = min(_CACHE_BYTES, budget // 8)
    plan = _plan(options, trainable, scenes, cache, known)
    core = plan.core[0]
    survey = Survey.load(options.out)
    if survey is None:
        survey = _survey(console, options, core, scenes, reach, len(names), start)
        _require_labels(options, survey, names)
    scenes = tuple(replace(scene, split=split) for scene, split in zip(scenes, survey.splits, strict=True))
    with torch.no_grad():
        module.subtract.copy_(torch.tensor(survey.scaling.subtract)[None, :, None, None])
        module.divide.copy_(torch.tensor(survey.scaling.divide)[None, :, None, None])
    recipe = _weigh(options, survey, len(names))
    loss = parse_loss(recipe.loss, recipe.class_weights)
    bound = meaning.bound(torch.float32)
    engine = StepEngine(trainable, scenes, loss, survey.fill, plan.cuts, cache, bound)
    shapes = tuple(scene.raster.shape_yx for scene in scenes)
    return TrainingData(
        scenes=scenes,
        classes=found.classes,
        recipe=recipe,
        engine=engine,
        draw=_make_draw(core, recipe, survey, shapes),
        validation_tiles=tuple(
            list_validation_tiles(
                shapes,
                survey.validation,
                survey.cell,
                # The larger, the less overlap.
                _VALIDATED * core if _fits(trainable, plan, plan.image_shape[1], _VALIDATED * core) else core,
            )
        ),
        survey=survey,
        reach=reach,
        start=start,
        meaning=meaning,
        module=module,
        remarks=(
            *(scene.labels.note for scene in scenes if scene.labels.note),
            *_remark(survey, names, scenes),
            f"tiles: {plan.explain_tile()}",
            f"memory: {plan.explain_memory()}{', of each process' if options.workers.uses_dask else ''}",
        ),
        plan=plan,
    )


def _plan(
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


def _survey(
    console: Console,
    options: TrainOptions,
    core: int,
    scenes: Sequence[TrainingScene],
    reach: int,
    classes: int,
    start: SegmentationModel | None,
) -> Survey:
    """The passes over scenes and labels."""
    shapes = [scene.raster.shape_yx for scene in scenes]
    block = options.block or choose_block(shapes, reach)
    share = 0.0 if options.validate_on else options.validation
    splits: list[Split | None] = []
    passes = (bool(share) + 2 * scene.trains + (scene.is_held_out or bool(share)) for scene in scenes)
    pixels = sum(count * height * width for count, (height, width) in zip(passes, shapes, strict=True))
    cell = max(1, core // 2)
    moments = Moments.none(scenes[0].raster.bands)
    training: list[Counts] = []
    validation: list[Counts] = []
    left_out: list[str] = []
    with console.step("survey", pixels) as step:
        for index, scene in enumerate(scenes):
            split: Split | None = None
            if share:
                counts = count_labels(scene, cell=block, classes=classes, advance=step.advance)
                seed = options.recipe.seed
                split = choose_split(counts, share=share, block=block, guard=reach, seed=seed, scene=index)
            splits.append(split)
            scene = replace(scene, split=split)
            ignored: dict[int, int] = {}
            nothing = np.zeros((*_cells_of(scene, cell), classes), np.int64)
            training.append(
                count_labels(scene, cell=cell, classes=classes, part="training", advance=step.advance, ignored=ignored)
                if scene.trains
                else nothing
            )
            validation.append(
                count_labels(
                    scene, cell=cell, classes=classes, part="validation", advance=step.advance, ignored=ignored
                )
                if scene.validates
                else nothing
            )
            if scene.trains:
                moments += measure_bands(scene, step.advance)
            left_out += [describe_ignored(scene.labels.path, ignored)] if ignored else []
    for line in dict.fromkeys(left_out):
        console.remark(line)
    deviations = np.where(moments.deviation > 0, moments.deviation, 1.0)
    scaling = start.scaling if start else Scaling.z_score(mean=moments.mean.tolist(), stddev=deviations.tolist())
    raw = np.asarray(start.fill if start else moments.mean)
    # As a reader puts it into pixels of the scene's own type, so that training and inference see the same.
    dtype = scenes[0].raster.dtype
    fill = np.rint(raw).astype(dtype) if not start and dtype.kind in "ui" else raw.astype(dtype)
    return Survey(
        splits=tuple(splits),
        scaling=scaling,
        fill=tuple(float(value) for value in fill),
        means=tuple(moments.mean.tolist()),
        deviations=tuple(deviations.tolist()),
        cell=cell,
        training=tuple(training),
        validation=tuple(validation),
    )


def _sum(counts: Sequence[Counts]) -> Counts:
    """(classes,): pixels of each class, in all cells of all scenes."""
    return np.sum([entry.sum((0, 1)) for entry in counts], axis=0)


def _cells_of(scene: TrainingScene, cell: int) -> tuple[int, int]:
    height, width = scene.raster.shape_yx
    return (-(-height // cell), -(-width // cell))


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


def _require_labels(options: TrainOptions, survey: Survey, names: Sequence[str]) -> None:
    """Pixels of every class that the user named, on both sides.

    Raises:
        UsageError: names what is missing and what would help.
    """
    trained, held = _sum(survey.training), _sum(survey.validation)
    wants = bool(options.validate_on) or options.validation > 0
    split = next((entry for entry in survey.splits if entry is not None), None)
    how = (
        f"blocks of {split.block} px, {split.guard} px from every validation block are left out"
        if split is not None
        else "all labels of scenes that are not held out"
    )
    if not trained.any():
        raise UsageError(
            f"no labelled pixel is left to train on ({how}); try a larger --block, another --seed, --validate-on "
            "SCENE, or --validation 0"
        )
    if wants and not held.any():
        raise UsageError(
            f"no labelled pixel validates ({how}); try a smaller --block, a larger --validation, another --seed, "
            "--validate-on SCENE, or --validation 0"
        )
    absent = [name for name, count in zip(names, trained, strict=True) if not count]
    if absent and options.classes:
        raise UsageError(
            f"no training pixel has the class {', '.join(absent)} ({how}); leave it out of --classes, add a scene that "
            "has it, or split otherwise: --seed, --block, --validation"
        )


def _remark(survey: Survey, names: Sequence[str], scenes: Sequence[TrainingScene]) -> tuple[str, ...]:
    trained, held = _sum(survey.training), _sum(survey.validation)
    lines = [
        f"{count_of(len(scenes), 'scene')}, {trained.sum() / 1e6:.3f} Mpx to train on, {held.sum() / 1e6:.3f} Mpx to "
        f"validate on; {count_of(len(names), 'class')}: {', '.join(names)}"
    ]
    for what, counts in (("trained on", trained), ("validated", held)):
        absent = [name for name, count in zip(names, counts, strict=True) if not count]
        if absent and counts.any():
            lines.append(f"no pixel of {', '.join(absent)} is {what}")
    return tuple(lines)


def _weigh(options: TrainOptions, survey: Survey, classes: int) -> Recipe:
    """The recipe with weights of classes: as given, or n / (classes * n_c), at most 10."""
    recipe = options.recipe
    if not options.balanced:
        return recipe
    counts = _sum(survey.training).astype(np.float64)
    weights = np.where(counts > 0, np.minimum(counts.sum() / (classes * np.maximum(counts, 1)), 10.0), 1.0)
    return replace(recipe, class_weights=tuple(round(float(weight), 4) for weight in weights))


def _make_draw(
    core: int, recipe: Recipe, survey: Survey, shapes: tuple[tuple[int, int], ...]
) -> Callable[[int], Sequence[TrainingTile]]:
    """The tiles of each step; around pixels of classes of weight 0, and for scenes of those alone, there are none.

    Raises:
        UsageError: no pixel weighs anything.
    """
    weighed = tuple(counts * (np.array(recipe.class_weights or 1.0) > 0) for counts in survey.training)
    if not _sum(weighed).any():
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
