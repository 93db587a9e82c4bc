"""The loop of a training of faces on one rank, whoever started it: steps, log, measurements, generations."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.faceid.base.collectives import Ranks
from ...models.faceid.embedder.feature_norm import FeatureNorm
from ...models.faceid.embedder.step import StepResult, compute_full_loss, compute_step
from ...models.faceid.layer.checkpoint import list_generations
from ...models.faceid.layer.head import ShardedMarginHead
from ...models.faceid.layer.row_rules import RULES
from ...models.faceid.pictures.augmentation import FaceAugmentation
from ...models.faceid.pictures.batch_loader import BatchLoader, MicroBatch
from ...models.faceid.pictures.sample_order import share_of
from ...models.training.optimiser import make_optimiser, set_rate
from ...tiler.base.errors import TilerError
from ...tiler.base.text import format_bytes
from ...tiler.system.machine import one_thread, torch_threads
from ...tiler.system.meter import MemoryMeter
from ...tiler.system.process_end import end_with
from ..base.console import Console
from ..base.interrupts import StopAfterStep
from ..base.training_folder import read_training
from ..base.training_log import TrainingLog
from .checkpoint import load_face_training, save_face_training
from .init import InitialWeights, describe_start, load_rows, open_initial, require_fit
from .options import FaceTraining
from .ranks import run_as_rank
from .report import write_face_report
from .sources import OpenedFaces
from .unusable_pictures import UnusablePictures, read_unusable
from .validation import Measured, describe_scores, measure_embedder

LOG, UNREADABLE, REPORT = "train.jsonl", "unreadable.jsonl", "report.html"
MOST_SKIPPED = 10
"""Steps in a row whose loss or gradient is not finite."""


class TrainingError(TilerError):
    """A training that cannot go on."""


def train_rank(console: Console, training: FaceTraining, faces: OpenedFaces) -> dict[str, Any] | None:
    """One rank: go on from the newest whole generation, train, save, measure; rank 0 returns what came of it.

    Raises:
        KeyboardInterrupt: stopped by a signal, and saved.
        TrainingError: no picture of a batch can be used, or the loss is not finite again and again.
    """
    with torch_threads(training.threads), MemoryMeter() as meter:
        run = _Run(console, training, faces, meter)
        run.train()
        return run.finish()


class _Run:
    """One rank's part of one call of the command."""

    def __init__(self, console: Console, training: FaceTraining, faces: OpenedFaces, meter: MemoryMeter) -> None:
        self.console, self.training, self.faces, self.meter = console, training, faces, meter
        self.out, self.ranks = Path(training.out), Ranks.of(None)
        torch.manual_seed(training.seed)
        self.description = training.describe_embedder(faces.training.size)
        self.model = self.description.build(recompute=training.recompute).train()
        self.head = ShardedMarginHead(
            faces.training.identities,
            training.dim,
            margin=training.margin,
            margin_value=training.margin_value,
            scale=training.scale,
            storage=getattr(torch, training.storage),
            rule=RULES[training.rule](lr=training.head_lr),
            sample=training.sample,
            denominator=training.denominator,
            seed=training.seed,
        )
        self.optimiser = make_optimiser(
            training.optimiser, self.model.parameters(), training.weight_decay, nesterov=False, foreach=False
        )
        self.first = load_face_training(self.head, self.model, self.optimiser, self.out, console)
        self.step = self.saved = self.first
        self.is_first = self.ranks.rank == 0
        if training.init is not None and not list_generations(self.out):
            self._start_from(open_initial(Path(training.init)))
        # A finished training is only measured, once more.
        validated = self.first - (self.first == training.steps)
        self.log = TrainingLog(self.out / LOG, self.first, validated) if self.is_first else None
        self.unusable = UnusablePictures(console, self.out / UNREADABLE)
        if self.is_first:
            self.unusable.add(faces.left_out)
        self.stop, self.skipped, self.seconds = StopAfterStep(), 0, 0.0
        self.losses: list[float] = []
        self.grey: set[str] = set()

    def _start_from(self, initial: InitialWeights) -> None:
        """Of another training or a file: the embedder, and rows of identities that have some there."""
        begun = read_training(self.out)
        if begun is None or begun["fingerprint"].get("init") != initial.to_fingerprint():
            raise TrainingError(f"{initial.source} has changed while the training began; give the same command again")
        require_fit(initial, self.model, self.description)
        names = list(self.faces.training.names)
        new = load_rows(self.head, initial, names, self.training.source)
        if self.is_first:
            self.console.remark(f"{self.out}: {describe_start(initial, names, new)}")

    def train(self) -> None:
        """Step after step; all ranks stop after the same one."""
        training = self.training
        loader = self._make_loader(FaceAugmentation.parse(training.augment))
        quiet = Console() if self.is_first else _Silent()
        label = f"train {self.out.name}"
        with quiet.step(label, training.steps, counts_pixels=False, done=self.first) as bar, self.stop.heeded():
            if self.first:
                bar.advance(0, f"goes on after step {self.first}")
            lacks = self.log is not None and not self.log.has_validation(self.step)
            if self._is_measured_now() and int(self.ranks.add(torch.tensor([int(lacks)]))):
                self._measure()  # which a kill cut off
            began = time.perf_counter()
            for batches in loader.run(self.first, training.steps, training.threads):
                result, norm = self._make_step(batches, loader.micro_batches)
                seconds = time.perf_counter() - began
                if self._tell(bar, batches, result, norm, seconds):
                    self._save()
                    raise KeyboardInterrupt
                if self.step % training.save_every == 0:
                    self._save()
                if self._is_measured_now():
                    self._measure()
                began = time.perf_counter()
            self._save()

    def _make_step(self, batches: Sequence[MicroBatch], micro_batches: int) -> tuple[StepResult, float | None]:
        """(what came of the next step, the norm of its gradient; None: it was not finite, and nothing moved)."""
        training = self.training
        feature_norm = self.model.feature_norm
        assert isinstance(feature_norm, FeatureNorm)
        assert self.head.rule is not None
        share = training.rates.share(self.step)
        set_rate(self.optimiser, training.lr * share)
        self.head.rule.lr = training.head_lr * share
        for batch in batches:
            self.unusable.add(batch.failed)
        result = compute_step(
            self.model,
            feature_norm,
            self.head,
            batches,
            micro_batches=micro_batches,
            mean=self.description.mean,
            scale=self.description.scale,
            precision=getattr(torch, training.precision),
        )
        norm = self._follow(result.is_finite)
        self.step += 1
        return result, norm

    def _tell(
        self, bar: Any, batches: Sequence[MicroBatch], result: StepResult, norm: float | None, seconds: float
    ) -> bool:
        """Log and show the step that was made; whether a rank was asked to stop.

        Raises:
            TrainingError: it had no picture, or the loss is not finite again and again.
        """
        training = self.training
        self.seconds += seconds
        loss = result.loss if math.isfinite(result.loss) else None
        self.losses = [*self.losses[-49:], loss] if loss is not None else self.losses
        grey = sum(batch.grey for batch in batches)
        shared = torch.tensor([int(self.stop.is_asked), self.meter.current_bytes, result.samples, grey])
        asked, memory, samples, grey = self.ranks.add(shared).tolist()
        if grey and self.is_first:
            self._remark_grey("trained on", f"{grey} of the {samples} pictures of step {self.step}")
        entry = {
            "step": self.step,
            "loss": loss,
            "rate": training.lr * training.rates.share(self.step - 1),
            "gradient_norm": norm,
            "skipped": not result.is_finite,
            "samples": samples,
            "seconds": round(seconds, 4),
            "memory_bytes": memory,
        }
        if self.log:
            self.log.add(entry)
        detail = (
            f"step {self.step}/{training.steps}, loss {sum(self.losses) / max(1, len(self.losses)):.3f}, "
            f"{(self.step - self.first) * training.batch / self.seconds:.0f} images/s, memory {format_bytes(memory)}"
        )
        bar.advance(1, detail)
        self._require_progress(samples, result.is_finite)
        return bool(asked)

    def _is_measured_now(self) -> bool:
        every = self.training.evaluate_every
        return every > 0 and self.step % every == 0 and 0 < self.step < self.training.steps

    def _make_loader(self, augmentation: FaceAugmentation) -> BatchLoader:
        return BatchLoader(
            source=self.faces.training,
            augmentation=augmentation,
            batch=self.training.batch,
            micro_batch=self.training.micro_batch,
            seed=self.training.seed,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
        )

    def _follow(self, is_finite: bool) -> float | None:
        """Move the embedder; the norm of its gradient."""
        if not is_finite:
            return None
        with one_thread():  # a norm by several threads has other last bits
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip or torch.inf)
        self.optimiser.step()
        return float(norm)

    def _remark_grey(self, use: str, pictures: str) -> None:
        """Once in a call for each use."""
        if use not in self.grey:
            self.console.remark(f"{pictures} are without colour: grey is taken for red, green and blue, here and later")
        self.grey.add(use)

    def _require_progress(self, samples: int, is_finite: bool) -> None:
        if not samples:
            raise TrainingError(
                f"no picture of step {self.step} can be used; {self.out / UNREADABLE} says what is wrong with each"
            )
        self.skipped = 0 if is_finite else self.skipped + 1
        if self.skipped == MOST_SKIPPED:
            raise TrainingError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps up to step {self.step}; lower --lr "
                "or --head-lr"
            )

    def _measure(self) -> Measured:
        """All ranks have the full loss; rank 0 alone measures with identities never seen. Its line in the log."""
        self.model.eval()
        scores: dict[str, Any] = {"full_loss": self._compute_full_loss()}
        measured = Measured(scores=scores, verification=None, failed=[], grey=0)
        if self.is_first:
            if self.faces.held_out is not None:
                found = measure_embedder(self.model, self.description, self.faces.held_out, self.training.seed)
                measured = replace(found, scores={**scores, **found.scores})
            self.unusable.add(measured.failed)
            if measured.grey:
                pictures = f"{measured.grey} of the {measured.scores['pictures']} pictures of identities never seen"
                self._remark_grey("measured with", pictures)
            assert self.log is not None
            self.log.add({"validation": {"step": self.step, **measured.scores}})
            if self.step < self.training.steps:
                self.console.remark(f"step {self.step}: {describe_scores(measured.scores)}")
        self.model.train()
        return measured

    def _compute_full_loss(self) -> float | None:
        """Of the samples of the training's first step, as they are without augmentation: one batch for all times."""
        loader = self._make_loader(FaceAugmentation())
        mine = share_of(self.ranks.rank, self.ranks.size, loader.micro_batches)
        return compute_full_loss(
            self.model,
            self.head,
            [loader.load(0, number) for number in mine],
            mean=self.description.mean,
            scale=self.description.scale,
            precision=getattr(torch, self.training.precision),
        )

    def _save(self) -> None:
        if self.saved == self.step and list_generations(self.out):
            return
        cursor = {"step": self.step, "samples": self.step * self.training.batch}
        save_face_training(self.head, self.model, self.optimiser, self.description, self.out, cursor)
        self.saved = self.step

    def finish(self) -> dict[str, Any] | None:
        """Measure, write the report; the values of the result, on rank 0."""
        measured = self._measure()
        peak = int(self.ranks.add(torch.tensor([self.meter.peak_bytes])))
        if not self.is_first:
            return None
        unusable = read_unusable(self.out / UNREADABLE)
        steps = self.step - self.first
        values = {
            "out": str(self.out),
            "steps": self.step,
            "first_step": self.first,
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            **measured.scores,
            "images_per_s": round(steps * self.training.batch / self.seconds, 1) if steps else None,
            "peak_bytes": peak,
            "unusable": len(unusable),
            "report": str(self.out / REPORT),
        }
        write_face_report(self.out, values, measured, unusable)
        return values


class _Silent(Console):
    """Of the ranks that show nothing of their own but what is wrong with pictures."""

    @contextmanager
    def step(self, label: str, pixels: int, *, counts_pixels: bool = True, done: int = 0) -> Iterator[Any]:  # noqa: ARG002 - Console's
        yield self

    def advance(self, pixels: int, detail: str = "") -> None:
        pass


def _work(spec: dict[str, Any]) -> dict[str, Any] | None:
    """What a rank does that `outsize face train` started."""
    training = FaceTraining.from_json(spec["training"])
    return train_rank(Console(), training, training.open())


if __name__ == "__main__":
    end_with(lambda: run_as_rank(sys.argv[1:], _work))
