"""`outsize train`: a segmentation model from scenes and labels, exactly, within memory, and safe to kill."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import rasterio
import torch

from ...models.segmentation.files.classes import LabelClasses, find_classes, parse_classes
from ...models.segmentation.files.sources import save_model
from ...models.segmentation.networks.model import SegmentationModel, TileNetwork, meaning_of
from ...models.segmentation.networks.scaling import Scaling
from ...models.segmentation.networks.unet import UNet
from ...models.segmentation.training.augmentation import Augmentation
from ...models.segmentation.training.checkpoint import load_state, save_state
from ...models.segmentation.training.metrics import Confusion
from ...models.segmentation.training.recipe import Recipe, parse_step
from ...models.segmentation.training.trainer import StepRecord, Trainer
from ...models.segmentation.training.validation import Validation, ValidationTile, validate
from ...tiler.base.errors import OutputError, UsageError
from ...tiler.base.text import MB, format_bytes, format_seconds
from ...tiler.labels.labels import identify_labels
from ...tiler.labels.vectors import is_vector_file
from ...tiler.output.fingerprint import fingerprint_raster
from ...tiler.rasters.band_names import is_named
from ...tiler.rasters.bands import BandMatch, match_bands
from ...tiler.rasters.notes import list_notes
from ...tiler.rasters.opening import open_with
from ...tiler.rasters.raster import Raster, ReadOptions
from ...tiler.rasters.reading import GDAL_CACHE_BYTES
from ...tiler.system.machine import map_large_blocks
from ...tiler.system.meter import MemoryMeter
from ...tiler.training.cluster import TrainingCluster
from ..base.console import Console, Step, count_of, describe_memory, format_table
from ..base.training_folder import LOCK, describe_training, owning_folder, read_training, require_same_training
from ..base.training_log import TrainingLog
from .data import TrainingData, prepare_data
from .options import TrainOptions
from .report import write_training_report
from .workers import WorkerOptions, open_training_cluster

LOG, REPORT = "train.jsonl", "report.html"
SAVE_EVERY_S = 60.0
"""A kill costs at most this, and a step."""
_PARTS = 1_000_000
"""Of the progress bar."""


def run_train(console: Console, options: TrainOptions) -> None:
    """Train, or go on, and leave best.json, last.json, train.jsonl and report.html in the folder."""
    map_large_blocks()
    # GDAL would keep up to a twentieth of the machine's memory in decoded blocks.
    with (
        owning_folder(options.out, "holds {name} and no training; choose another folder"),
        rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES // MB),
        MemoryMeter() as meter,
        open_training_cluster(console, options.workers) as cluster,
    ):
        if options.overwrite:
            _empty(options.out)
        run = _Run(console, options, meter, cluster)
        run.start()
        try:
            run.train()
        except BaseException as error:
            run.interrupt(error)
            raise
        run.finish()


def _empty(out: Path) -> None:
    for path in out.iterdir():
        if path.is_file() and path.name != LOCK:
            path.unlink()


class _Run:
    """One call of the command."""

    def __init__(
        self, console: Console, options: TrainOptions, meter: MemoryMeter, cluster: TrainingCluster | None
    ) -> None:
        self.console, self.options, self.meter, self.cluster = console, options, meter, cluster
        self.out = options.out
        self.began = time.perf_counter()
        self.best: dict[str, Any] | None = None
        """Step and scores of the best validation so far."""
        self.validated = 0
        """The last step whose validation is done."""
        self.saved_at = time.monotonic()

    def start(self) -> None:
        """Open, compare with what is there, survey, load the last state."""
        options = self.options
        opened = [open_with(scene, options.reading) for scene in options.scenes]
        self.start_model = options.model.load() if options.model else None
        is_binary = _is_binary(self.start_model, options)
        if not options.recipe.loss:
            loss = "binary" if is_binary else "cross-entropy"
            self.options = options = replace(options, recipe=replace(options.recipe, loss=loss))
        matches = _match_bands(opened, self.start_model)
        self.rasters = [match.raster for match in matches]
        _require_labels(options)
        self.fingerprint = _fingerprint(self.rasters, options, self.start_model)
        require_same_training(self.out, self.fingerprint, "choose another --out, or --overwrite")
        found = self._find_classes()
        if is_binary and len(found.classes) != 2:
            raise UsageError(
                f"task binary has two classes, no and yes, got {len(found.classes)}; name two with --classes, or leave "
                "--task out"
            )
        torch.manual_seed(options.recipe.seed)
        network = (
            self.start_model.network
            if self.start_model
            else UNet(self.rasters[0].bands, 1 if is_binary else len(found.classes), options.widths, options.norm)
        )
        scaling = self.start_model.scaling if self.start_model else Scaling.none(self.rasters[0].bands)
        self.module = TileNetwork(network, scaling, "logits").eval()
        self.data: TrainingData = prepare_data(
            self.console, options, self.rasters, found, self.module, self.start_model, _find_tiles(self.out)
        )
        if self.cluster is not None:
            self.data.engine.spread_over(self.cluster)
        describe_training(self.out, self.fingerprint, self.data.describe())
        # After what makes the folder a training's own.
        self.data.survey.save(self.out)
        self.trainer = Trainer(self.module, self.data.recipe, self.data.draw, self.data.engine.compute)
        state = load_state(self.out)
        if state is not None:
            self.trainer.load(state)
            self.best, self.validated = state.values["best"], state.values.get("validated", state.step)
            self.console.remark(f"{self.out}: goes on after step {state.step}")
        elif not self.start_model and options.norm == "frozen":
            self.data.calibrate(network)
        self.log = TrainingLog(self.out / LOG, self.trainer.step, self.validated)
        for raster, match in zip(opened, matches, strict=True):
            if self.start_model or match.raster.chosen_bands != raster.chosen_bands:
                self.console.remark(f"{match.raster.path}: bands {match}")
            for word, text in list_notes(match.raster):
                if word == "tags":
                    self.console.remark(f"{match.raster.path}: {text}")
        for line in self.data.remarks:
            self.console.remark(line)

    def _find_classes(self) -> LabelClasses:
        options = self.options
        values = options.label_options.values
        if self.start_model is not None:
            known = self.start_model.classes
            named = parse_classes(options.classes) or known
            if len(named) != len(known):
                raise UsageError(
                    f"the model has {count_of(len(known), 'class')}, --classes names {len(named)}; name as many, or "
                    "train a new network without --model"
                )
            return LabelClasses(classes=named, values=values)
        if options.classes:
            return LabelClasses(classes=parse_classes(options.classes), values=values)
        pixels = sum(raster.shape_yx[0] * raster.shape_yx[1] for raster in self.rasters)
        with self.console.step("find classes", pixels) as step:
            return find_classes(tuple(dict.fromkeys(options.labels)), options.label_options, step.advance)

    def train(self) -> None:
        """Step after step, with validations, states and lines of the log between them."""
        trainer = self.trainer
        label = f"train {self.out.name}"
        with self.console.step(label, _PARTS, counts_pixels=False) as bar:
            shown = self._show(bar, None, 0)
            # That of the last step, if the training was stopped in it.
            self._validate_if_due()
            while not trainer.is_done:
                record = trainer.make_step()
                self.log.add(_step_line(record, self.meter))
                self._validate_if_due()
                if time.monotonic() - self.saved_at > SAVE_EVERY_S:
                    self._save()
                shown = self._show(bar, record, shown)

    def _show(self, bar: Step, record: StepRecord | None, shown: int) -> int:
        now = int(_PARTS * self.trainer.progress)
        total = f"/{self.data.recipe.steps}" if self.data.recipe.steps else ""
        parts = [f"step {self.trainer.step}{total}"]
        parts += [f"loss {record.loss:.4f}"] if record else []
        parts += [f"best mean IoU {self.best['mean_iou']:.3f}"] if self.best else []
        bar.advance(now - shown, ", ".join([*parts, describe_memory(self.meter.current_bytes)]))
        return now

    def _validate_if_due(self) -> None:
        """At every so many steps, and at the end; then the state is saved."""
        step = self.trainer.step
        if step > self.validated and (step % self.options.validate_every == 0 or self.trainer.is_done):
            if self.data.validation_tiles:
                self._validate()
            self.validated = step
            self._save()

    def _validate(self) -> None:
        """Scores of the averaged weights; the best ones are kept as best.json."""
        began = time.perf_counter()
        validation = self.validate()
        scores = _scores(validation.confusion)
        line = {
            "step": self.trainer.step,
            **scores,
            "confusion": validation.confusion.counts.tolist(),
            "worst": [
                {
                    "scene": entry.tile.scene,
                    "window": [entry.tile.core.y, entry.tile.core.x, entry.tile.core.height, entry.tile.core.width],
                    "pixels": entry.pixels,
                    "wrong": entry.wrong,
                }
                for entry in validation.worst[:8]
            ],
            "seconds": round(time.perf_counter() - began, 3),
        }
        if self.best is None or scores["mean_iou"] > self.best["mean_iou"]:
            best = {key: line[key] for key in ("step", *scores)}
            self._save_model("best", best)
            # Not before it is there.
            self.best = best
        self.log.add({"validation": line})

    def validate(self) -> Validation:
        """With the averaged weights."""
        engine, average = self.data.engine, self.trainer.average.values

        def predict(tile: ValidationTile) -> Any:
            return engine.predict(tile.scene, tile.core, average)

        def read_labels(tile: ValidationTile) -> Any:
            return engine.read_validation(tile.scene, tile.core)

        return validate(self.data.validation_tiles, len(self.data.classes), predict, read_labels)

    def _save(self) -> None:
        save_state(self.out, self.trainer.state({"best": self.best, "validated": self.validated}))
        self.saved_at = time.monotonic()

    def model(self) -> SegmentationModel:
        """The averaged weights as a model."""
        prefix = "network."
        weights = {
            name.removeprefix(prefix): value
            for name, value in self.trainer.average.values.items()
            if name.startswith(prefix)
        }
        return self.data.make_model(self.out.absolute().name, weights)

    def _save_model(self, name: str, best: dict[str, Any] | None) -> None:
        card = {
            "trained_on": [raster.path for raster in self.rasters],
            "labels": list(self.options.labels),
            "steps": self.trainer.step,
            "minutes": round(self.trainer.seconds / 60, 2),
            "validation": best,
            "command": shlex.join(["outsize", *sys.argv[1:]]),
        }
        save_model(self.model(), self.out / name, card)

    def interrupt(self, error: BaseException) -> None:
        """Keep what was done, whatever ended it."""
        if self.trainer.is_between_steps:
            try:
                self._save()
            except OutputError:
                # Of a full disk that ended it, say: the first error is the one to tell.
                if isinstance(error, KeyboardInterrupt):
                    raise
        self.console.remark(f"{self.out}: stopped after step {self.trainer.step}")

    def finish(self) -> None:
        """The last model, the report, the result."""
        self._save()
        self._save_model("last", self.best)
        if self.best is None:
            self._save_model("best", None)
        self.data.engine.close()
        size = write_training_report(self.out, self.data)
        self.console.result(self._summary(), self._values(size))

    def _summary(self) -> str:
        trainer = self.trainer
        head = (
            f"{self.out / 'best.json'}: {count_of(trainer.step, 'step')} in {format_seconds(trainer.seconds)}, peak "
            f"memory {format_bytes(self.meter.peak_bytes)}; last.json, {LOG} and {REPORT} lie beside it"
        )
        if self.best is None:
            return f"{head}\nno validation: best.json is the last one"
        lines = [
            f"best at step {self.best['step']}: mean IoU {self.best['mean_iou']:.4f}, mean F1 "
            f"{self.best['mean_f1']:.4f}, accuracy {self.best['accuracy']:.4f} over {self.best['pixels'] / 1e6:.2f} Mpx"
        ]
        rows = [
            [entry.name, *(f"{self.best[key][index]:.4f}" if self.best[key][index] is not None else "-" for key in
                           ("iou", "f1", "precision", "recall"))]
            for index, entry in enumerate(self.data.classes)
        ]  # fmt: skip
        return "\n".join([head, *lines, format_table(("class", "IoU", "F1", "precision", "recall"), rows)])

    def _values(self, report_bytes: int) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "model": str(self.out / "best.json"),
            "steps": self.trainer.step,
            "training_s": round(self.trainer.seconds, 3),
            "seconds": round(time.perf_counter() - self.began, 3),
            "best": self.best,
            "classes": [entry.name for entry in self.data.classes],
            "peak_bytes": self.meter.peak_bytes,
            "predicted_peak_bytes": self.data.predicted_bytes * self.options.workers.processes,
            "report_bytes": report_bytes,
        }


def _scores(confusion: Confusion) -> dict[str, Any]:
    """As plain JSON values; None where a class does not occur."""

    def plain(values: Sequence[float]) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values]

    return {
        "pixels": confusion.pixels,
        "accuracy": confusion.accuracy,
        "mean_iou": confusion.mean_iou,
        "mean_f1": confusion.mean_f1,
        "iou": plain(confusion.iou),
        "f1": plain(confusion.f1),
        "precision": plain(confusion.precision),
        "recall": plain(confusion.recall),
    }


def _step_line(record: StepRecord, meter: MemoryMeter) -> dict[str, Any]:
    return {**asdict(record), "seconds": round(record.seconds, 4), "memory_bytes": meter.current_bytes}


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


def make_recipe(step: str, augment: str, **values: Any) -> Recipe:
    """The recipe that options of the command line mean."""
    kind, tiles = parse_step(step)
    return Recipe(step=kind, tiles=tiles, augmentation=Augmentation.parse(augment), **values)
