"""The survey of a training: what the passes over scenes and labels found, and what must be there to train."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ...models.segmentation.networks.model import SegmentationModel
from ...models.segmentation.networks.scaling import Scaling, ScalingKind
from ...models.segmentation.training.moments import Moments
from ...models.segmentation.training.scene import TrainingScene
from ...models.segmentation.training.split import BlockSplit, choose_block, choose_split
from ...models.segmentation.training.survey import Counts, count_labels, measure_bands
from ...tiler.base.errors import OutputError, UsageError
from ...tiler.base.text import first_line
from ...tiler.labels.labels import describe_ignored
from ...tiler.system.files import write_durably
from ..base.console import Console, count_of

if TYPE_CHECKING:
    from .options import TrainOptions

SURVEY, COUNTS = "survey.json", "survey.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the passes over scenes and labels found; kept, so that going on needs none of them."""

    splits: tuple[BlockSplit | None, ...]
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

    @property
    def training_pixels(self) -> Counts:
        """(classes,): labelled pixels of each class that are trained on."""
        return sum_classes(self.training)

    @property
    def validation_pixels(self) -> Counts:
        """(classes,): labelled pixels of each class that validate."""
        return sum_classes(self.validation)

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
                splits=tuple(BlockSplit(**split) if split else None for split in values["splits"]),
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


def run_survey(
    console: Console,
    options: TrainOptions,
    scenes: Sequence[TrainingScene],
    *,
    core: int,
    reach: int,
    classes: int,
    start: SegmentationModel | None,
) -> Survey:
    """The passes over scenes and labels.

    Args:
        core: side of the training's cores; labels are counted in cells of half of it.
        reach: pixels within which the network's output depends on its input; that far validation stays away.
        start: its scaling and fill are kept; None: they follow from the pixels that train.
    """
    block = options.block or choose_block([scene.raster.shape_yx for scene in scenes], reach)
    share = 0.0 if options.validate_on else options.validation
    seed, cell = options.recipe.seed, max(1, core // 2)
    moments = Moments.none(scenes[0].raster.bands)
    splits: list[BlockSplit | None] = []
    counted: list[_Counted] = []
    with console.step("survey", _count_pixels(scenes, share)) as step:
        for index, scene in enumerate(scenes):
            split: BlockSplit | None = None
            if share:
                counts = count_labels(scene, cell=block, classes=classes, advance=step.advance)
                split = choose_split(counts, share=share, block=block, guard=reach, seed=seed, scene=index)
            splits.append(split)
            scene = replace(scene, split=split)
            counted.append(_count(scene, cell, classes, step.advance))
            if scene.trains:
                moments += measure_bands(scene, step.advance)
    for line in dict.fromkeys(entry.left_out for entry in counted if entry.left_out):
        console.remark(line)
    deviations = np.where(moments.deviation > 0, moments.deviation, 1.0)
    return Survey(
        splits=tuple(splits),
        scaling=start.scaling if start else Scaling.z_score(mean=moments.mean.tolist(), stddev=deviations.tolist()),
        fill=_choose_fill(moments, scenes[0].raster.dtype, start),
        means=tuple(moments.mean.tolist()),
        deviations=tuple(deviations.tolist()),
        cell=cell,
        training=tuple(entry.training for entry in counted),
        validation=tuple(entry.validation for entry in counted),
    )


def _count_pixels(scenes: Sequence[TrainingScene], share: float) -> int:
    """Pixels that the passes read, each as often as it is read."""
    return sum(
        (bool(share) + 2 * scene.trains + (scene.is_held_out or bool(share)))
        * scene.raster.shape_yx[0]
        * scene.raster.shape_yx[1]
        for scene in scenes
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """Labels of one scene."""

    training: Counts
    validation: Counts
    left_out: str
    """Values that are no class, in words; empty: there are none."""


def _count(scene: TrainingScene, cell: int, classes: int, advance: Callable[[int], None]) -> _Counted:
    ignored: dict[int, int] = {}
    height, width = scene.raster.shape_yx
    nothing = np.zeros((-(-height // cell), -(-width // cell), classes), np.int64)
    given: dict[str, Any] = {"cell": cell, "classes": classes, "advance": advance, "ignored": ignored}
    training = count_labels(scene, part="training", **given) if scene.trains else nothing
    validation = count_labels(scene, part="validation", **given) if scene.validates else nothing
    left_out = describe_ignored(scene.labels.path, ignored) if ignored else ""
    return _Counted(training=training, validation=validation, left_out=left_out)


def _choose_fill(moments: Moments, dtype: np.dtype[Any], start: SegmentationModel | None) -> tuple[float, ...]:
    """What stands in place of nodata, as a reader puts it into pixels of the scene's own type, so that training and
    inference see the same."""
    raw = np.asarray(start.fill if start else moments.mean)
    fill = np.rint(raw).astype(dtype) if not start and dtype.kind in "ui" else raw.astype(dtype)
    return tuple(float(value) for value in fill)


def sum_classes(counts: Sequence[Counts]) -> Counts:
    """(classes,): pixels of each class, in all cells of all scenes."""
    return np.sum([entry.sum((0, 1)) for entry in counts], axis=0)


def require_labels(options: TrainOptions, survey: Survey, names: Sequence[str]) -> None:
    """Pixels of every class that the user named, on both sides.

    Raises:
        UsageError: names what is missing and what would help.
    """
    trained, held = survey.training_pixels, survey.validation_pixels
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


def describe_survey(survey: Survey, names: Sequence[str], scenes: Sequence[TrainingScene]) -> tuple[str, ...]:
    """In words: how much there is to train and to validate on, and what is missing."""
    trained, held = survey.training_pixels, survey.validation_pixels
    lines = [
        f"{count_of(len(scenes), 'scene')}, {trained.sum() / 1e6:.3f} Mpx to train on, {held.sum() / 1e6:.3f} Mpx to "
        f"validate on; {count_of(len(names), 'class')}: {', '.join(names)}"
    ]
    for what, counts in (("trained on", trained), ("validated", held)):
        absent = [name for name, count in zip(names, counts, strict=True) if not count]
        if absent and counts.any():
            lines.append(f"no pixel of {', '.join(absent)} is {what}")
    return tuple(lines)
