"""A training opened: scenes and labels matched and compared with what its folder holds, data surveyed, state loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...models.segmentation.files.classes import LabelClasses, find_classes, parse_classes
from ...models.segmentation.networks.model import SegmentationModel, TileNetwork, meaning_of
from ...models.segmentation.networks.scaling import Scaling
from ...models.segmentation.networks.unet import UNet
from ...models.segmentation.training.checkpoint import load_state
from ...models.segmentation.training.recipe import Recipe
from ...models.segmentation.training.trainer import Trainer
from ...tiler.base.errors import UsageError
from ...tiler.labels.labels import identify_labels
from ...tiler.labels.vectors import is_vector_file
from ...tiler.output.fingerprint import fingerprint_raster
from ...tiler.rasters.band_names import is_named
from ...tiler.rasters.bands import BandMatch, match_bands
from ...tiler.rasters.notes import list_notes
from ...tiler.rasters.opening import open_with
from ...tiler.rasters.raster import Raster, ReadOptions
from ...tiler.training.cluster import TrainingCluster
from ..base.console import Console, count_of
from ..base.training_folder import describe_training, read_training, require_same_training
from .data import TrainingData, prepare_data
from .options import TrainOptions
from .workers import WorkerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedTraining:
    """A training that can make its next step."""

    options: TrainOptions
    """With the loss that goes with the network, if none was given."""
    rasters: tuple[Raster, ...]
    """The scenes, with the bands that the network takes."""
    data: TrainingData
    trainer: Trainer
    best: dict[str, Any] | None
    """Step and scores of the best validation so far."""
    validated: int
    """The last step whose validation is done."""
    remarks: tuple[str, ...]


def open_training(console: Console, options: TrainOptions, cluster: TrainingCluster | None) -> OpenedTraining:
    """Open, compare with what is there, survey, load the last state; the folder is this training's then.

    Args:
        cluster: what computes the steps; None: this process.

    Raises:
        OutputError: the folder holds another training, or a damaged one.
        UsageError: options, scenes, labels and model that do not fit each other.
        BudgetError, UntileableError, RasterError, LabelError: as `prepare_data` and readers raise them.
    """
    opened = [open_with(scene, options.reading) for scene in options.scenes]
    start = options.model.load() if options.model else None
    is_binary = _is_binary(start, options)
    if not options.recipe.loss:
        loss = "binary" if is_binary else "cross-entropy"
        options = replace(options, recipe=replace(options.recipe, loss=loss))
    matches = _match_bands(opened, start)
    rasters = tuple(match.raster for match in matches)
    _require_labels(options)
    fingerprint = _fingerprint(rasters, options, start)
    require_same_training(options.out, fingerprint, "choose another --out, or --overwrite")
    found = _find_classes(console, options, rasters, start)
    if is_binary and len(found.classes) != 2:
        raise UsageError(
            f"task binary has two classes, no and yes, got {len(found.classes)}; name two with --classes, or leave "
            "--task out"
        )
    module = _make_module(options, rasters[0].bands, 1 if is_binary else len(found.classes), start)
    data = prepare_data(console, options, rasters, found, module, start, _find_tiles(options.out))
    if cluster is not None:
        data.engine.spread_over(cluster)
    describe_training(options.out, fingerprint, data.describe())
    # After what makes the folder a training's own.
    data.survey.save(options.out)
    trainer = Trainer(module, data.recipe, data.draw, data.engine.compute)
    best, validated = _load(console, options, trainer, data, start)
    return OpenedTraining(
        options=options,
        rasters=rasters,
        data=data,
        trainer=trainer,
        best=best,
        validated=validated,
        remarks=(*_remark(opened, matches, start), *data.remarks),
    )


def _load(
    console: Console, options: TrainOptions, trainer: Trainer, data: TrainingData, start: SegmentationModel | None
) -> tuple[dict[str, Any] | None, int]:
    """(the best validation, the last step whose validation is done): of the last state, which the trainer goes on
    from; a new network gets the statistics of its norms."""
    state = load_state(options.out)
    if state is not None:
        trainer.load(state)
        console.remark(f"{options.out}: goes on after step {state.step}")
        return state.values["best"], state.values.get("validated", state.step)
    if start is None and options.norm == "frozen":
        data.calibrate()
    return None, 0


def _remark(opened: Sequence[Raster], matches: Sequence[BandMatch], start: SegmentationModel | None) -> Iterator[str]:
    """How bands were matched, and what scenes say of themselves that was not heeded."""
    for raster, match in zip(opened, matches, strict=True):
        if start or match.raster.chosen_bands != raster.chosen_bands:
            yield f"{match.raster.path}: bands {match}"
        for word, text in list_notes(match.raster):
            if word == "tags":
                yield f"{match.raster.path}: {text}"


def _make_module(options: TrainOptions, bands: int, channels: int, start: SegmentationModel | None) -> TileNetwork:
    """The network that is trained: the model's, or a new U-Net of random weights."""
    torch.manual_seed(options.recipe.seed)
    network = start.network if start else UNet(bands, channels, options.widths, options.norm)
    return TileNetwork(network, start.scaling if start else Scaling.none(bands), "logits").eval()


def _find_classes(
    console: Console, options: TrainOptions, rasters: Sequence[Raster], start: SegmentationModel | None
) -> LabelClasses:
    """Those of the model, of --classes, or of the labels.

    Raises:
        UsageError: --classes names another number of them than the model has.
    """
    values = options.label_options.values
    if start is not None:
        known = start.classes
        named = parse_classes(options.classes) or known
        if len(named) != len(known):
            raise UsageError(
                f"the model has {count_of(len(known), 'class')}, --classes names {len(named)}; name as many, or "
                "train a new network without --model"
            )
        return LabelClasses(classes=named, values=values)
    if options.classes:
        return LabelClasses(classes=parse_classes(options.classes), values=values)
    pixels = sum(raster.shape_yx[0] * raster.shape_yx[1] for raster in rasters)
    with console.step("find classes", pixels) as step:
        return find_classes(tuple(dict.fromkeys(options.labels)), options.label_options, step.advance)


def _match_bands(rasters: Sequence[Raster], model: SegmentationModel | None) -> list[BandMatch]:
    """Every scene with the bands of the model, or of the first scene, in their order.

    Raises:
        UsageError: another number of bands; names that disagree, or that differ and say nothing of the order.
    """
    if model is not None:
        return [match_bands(raster, model.bands, f"model {model.name}") for raster in rasters]
    first = rasters[0]
    matches: list[BandMatch] = []
    for raster in rasters:
        if raster.bands != first.bands:
            raise UsageError(
                f"scenes must have the same bands, {first.path} has {first.bands} and {raster.path} {raster.bands}; "
                "choose with --bands"
            )
        match = match_bands(raster, first.band_names, f"the first scene, {first.path},")
        named = zip(first.band_names, match.raster.band_names, strict=True)
        if match.how == "in order" and any(a != b and is_named(a) and is_named(b) for a, b in named):
            raise UsageError(
                f"scenes must have the same bands, {first.path} has {', '.join(first.band_names)} and {raster.path} "
                f"{', '.join(raster.band_names)}; leave one out, or choose by number with --bands"
            )
        matches.append(match)
    return matches


def _require_labels(options: TrainOptions) -> None:
    """Before anything is read.

    Raises:
        UsageError: another number of labels than of scenes, a held-out scene that is none of them.
    """
    scenes, given = len(options.scenes), options.labels
    if len(given) != scenes and not (len(given) == 1 and is_vector_file(given[0])):
        raise UsageError(
            f"{count_of(scenes, 'scene')} need --labels as often, in the same order, or one vector file; got "
            f"{len(given)}"
        )
    for scene in options.validate_on:
        if scene not in options.scenes:
            raise UsageError(f"--validate-on must be one of the scenes, got {scene}; name it among them too")
    if set(options.validate_on) == set(options.scenes):
        raise UsageError("--validate-on leaves no scene to train on; add one")


def _is_binary(start: SegmentationModel | None, options: TrainOptions) -> bool:
    """Whether one channel is trained that decides between two classes.

    Raises:
        UsageError: a model whose values are no logits of classes.
    """
    if start is None:
        return options.task == "binary"
    if options.task is not None:
        raise UsageError("--task is for a new U-Net; --model says by itself what its channels answer")
    meaning = meaning_of(start)
    if meaning.task not in ("multiclass", "binary") or meaning.activation != "none":
        raise UsageError(
            f"a training starts from a network that gives logits of classes, and {start.name} does not "
            f"({meaning.sentence()}); leave the last operation out of it, or say otherwise in its model file"
        )
    return meaning.task == "binary"


def _fingerprint(rasters: Sequence[Raster], options: TrainOptions, model: SegmentationModel | None) -> dict[str, Any]:
    """What the trajectory depends on, as plain values."""
    values = asdict(
        replace(options, model=None, out=Path(), reading=ReadOptions(), recipe=Recipe(), workers=WorkerOptions())
    )
    for name in ("out", "model", "reading", "recipe", "overwrite", "scenes", "memory", "labels", "workers"):
        del values[name]
    del values["label_options"]["trust"]  # another leave makes no other training
    if options.task is None:
        # As in trainings that were begun before there was a choice.
        del values["task"]
    recipe = asdict(options.recipe)
    found: dict[str, Any] = {
        **{f"scene {index + 1}": _describe_scene(raster) for index, raster in enumerate(rasters)},
        **{
            f"labels {index + 1}": identify_labels(labels, trust=options.label_options.trust)
            for index, labels in enumerate(options.labels)
        },
        **values,
        "validate_on": [options.scenes.index(scene) + 1 for scene in options.validate_on],
        **recipe,
        "model": f"{model.name} {model.sha256}" if model else None,
    }
    return json.loads(json.dumps(found))


def _describe_scene(raster: Raster) -> dict[str, Any]:
    """Not the state of its files: a training may outlive copies of its scenes that are put back, and no map is made of
    two contents."""
    return {name: value for name, value in fingerprint_raster(raster).items() if name != "input_state"}


def _find_tiles(out: Path) -> dict[str, Any] | None:
    """Core and cuts of the training that the folder holds; None: it says none."""
    described = read_training(out)
    return described["data"].get("tiles") if described else None
