"""`outsize train`: a segmentation model from scenes and labels, exactly, within memory, and safe to kill."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rasterio

from ...models.segmentation.files.sources import save_model
from ...models.segmentation.networks.model import SegmentationModel
from ...models.segmentation.training.augmentation import Augmentation
from ...models.segmentation.training.checkpoint import save_state
from ...models.segmentation.training.metrics import Confusion
from ...models.segmentation.training.recipe import Recipe, parse_step
from ...models.segmentation.training.trainer import StepRecord
from ...models.segmentation.training.validation import Validation, ValidationTile, validate
from ...tiler.base.errors import OutputError
from ...tiler.base.text import MB, format_bytes, format_seconds
from ...tiler.rasters.reading import GDAL_CACHE_BYTES
from ...tiler.system.machine import map_large_blocks
from ...tiler.system.meter import MemoryMeter
from ..base.console import Console, Step, count_of, describe_memory, format_table
from ..base.training_folder import LOCK, owning_folder
from ..base.training_log import TrainingLog
from .opening import OpenedTraining, open_training
from .options import TrainOptions
from .report import write_training_report
from .workers import open_training_cluster

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
        began = time.perf_counter()
        opened = open_training(console, options, cluster)
        run = _Run(console, opened, meter, began)
        for line in opened.remarks:
            console.remark(line)
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

    def __init__(self, console: Console, opened: OpenedTraining, meter: MemoryMeter, began: float) -> None:
        self.console, self.options, self.meter, self.began = console, opened.options, meter, began
        self.rasters, self.data, self.trainer = opened.rasters, opened.data, opened.trainer
        self.best, self.validated = opened.best, opened.validated
        self.out = self.options.out
        self.log = TrainingLog(self.out / LOG, self.trainer.step, self.validated)
        self.saved_at = time.monotonic()

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


def make_recipe(step: str, augment: str, **values: Any) -> Recipe:
    """The recipe that options of the command line mean."""
    kind, tiles = parse_step(step)
    return Recipe(step=kind, tiles=tiles, augmentation=Augmentation.parse(augment), **values)
