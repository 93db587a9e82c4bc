"""`outsize evaluate`: class maps against labels, a raster on the same grid or polygons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...models.segmentation.training.metrics import Confusion
from ...tiler.base.dtypes import output_nodata
from ...tiler.base.errors import UsageError
from ...tiler.base.geometry import Grid
from ...tiler.base.text import format_bytes
from ...tiler.labels.labels import UNLABELLED, LabelOptions, Labels, describe_ignored, open_labels
from ...tiler.output.store import open_array, plan_of, read_header
from ...tiler.rasters.opening import open_raster
from ...tiler.system.meter import MemoryMeter
from ..base.console import Console, count_of, describe_memory, format_table

_BLOCK = 2048
_MOST_COUNTED = 4096
"""Classes of a map that does not name them; the table has their square."""
_MOST_SHOWN = 20
"""Classes up to which the confusion matrix is printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A map, its labels, and how they agree."""

    out: Path
    labels: Labels
    names: tuple[str, ...]
    """Of the classes; empty: the map does not say them."""
    count: int
    """Of classes that are counted."""
    shape: tuple[int, int]
    confusion: Confusion | None = field(default=None, repr=False)

    @property
    def classes(self) -> str:
        """In words."""
        return ", ".join(self.names) or f"numbers below {self.count} without names"


def run_evaluate(console: Console, pairs: Sequence[tuple[Path, str]], options: LabelOptions) -> None:
    """Count every pixel where both a map and its labels hold a class, block by block."""
    opened = [_open_pair(out, labels, options) for out, labels in pairs]
    for entry in opened:
        if entry.labels.note:
            console.remark(entry.labels.note)
    first = opened[0]
    for other in opened[1:]:
        if (other.names, other.count) != (first.names, first.count):
            raise UsageError(
                f"maps must have the same classes to be scored together: {first.out} has {first.classes}; "
                f"{other.out} {other.classes}; score them one by one"
            )
    done: list[tuple[Comparison, Confusion]] = []
    left_out: list[str] = []
    pixels = sum(entry.shape[0] * entry.shape[1] for entry in opened)
    with MemoryMeter() as meter, console.step("evaluate", pixels) as step:
        for entry in opened:
            confusion, ignored = _count(entry, step, meter)
            done.append((entry, confusion))
            left_out += [describe_ignored(entry.labels.path, ignored)] if ignored else []
    for line in left_out:
        console.remark(line)
    total = sum((confusion for _, confusion in done[1:]), done[0][1])
    names = [*first.names] or [str(value) for value in range(len(total.counts))]
    text = _describe(total, names, meter.peak_bytes)
    if len(done) > 1:
        rows = [
            [
                str(entry.out),
                *(f"{value:.4f}" for value in (one.accuracy, one.mean_iou, one.mean_f1)),
                f"{one.pixels:,}",
            ]
            for entry, one in done
        ]
        text += "\n\n" + format_table(("map", "accuracy", "mean IoU", "mean F1", "pixels"), rows)
    values = score_values(total, names)
    values["peak_bytes"] = meter.peak_bytes
    values["maps"] = [
        {"out": str(entry.out), "labels": entry.labels.path, **score_values(one, names)} for entry, one in done
    ]
    console.result(text, values)


def _open_pair(out: Path, labels: str, options: LabelOptions) -> Comparison:
    header = read_header(out)
    if header["kind"] != "class":
        raise UsageError(f"evaluate needs a class map, {out} holds {header['kind']}; segment with --output class")
    height, width = open_array(out, "class").shape
    plan = plan_of(out, header)
    names = tuple(entry["name"] for entry in header["classes"])
    count = len(names) or min(_MOST_COUNTED, int(output_nodata(open_array(out, "class").dtype)))
    if count > _MOST_COUNTED:
        raise UsageError(f"evaluate counts up to {_MOST_COUNTED} classes, {out} has {count}; group them first")
    # Labels of the whole raster serve a map of a part of it too.
    part = plan.scale == ("1", "1")
    found = open_labels(
        labels,
        open_raster(out / "class").place,
        (height, width),
        of=str(out),
        names=names or [str(value) for value in range(count)],
        options=options,
        whole=(plan.raster_shape[1:], plan.output_origin) if part else None,
    )
    return Comparison(out=out, labels=found, names=names, count=count, shape=(height, width))


def _count(entry: Comparison, step: Any, meter: MemoryMeter) -> tuple[Confusion, Mapping[int, int]]:
    """How map and labels agree, and pixels of each value of the labels that means no class."""
    count = entry.count
    total = Confusion(counts=np.zeros((count, count), np.int64))
    predicted = open_array(entry.out, "class")
    nodata = output_nodata(predicted.dtype)
    grid = Grid(shape=entry.shape, cell=(_BLOCK, _BLOCK))
    reader = entry.labels.open_reader()
    for at in grid:
        window = grid.window(*at)
        found = np.asarray(predicted[window.slices()])
        truth = reader.read(window)
        mapped = np.where(found == nodata, np.uint16(UNLABELLED), found)
        if (strange := mapped[(mapped != UNLABELLED) & (mapped >= count)]).size:
            raise UsageError(
                f"{entry.out} holds class {strange.max()}, and {count} classes are counted; name them in a model file"
            )
        total += Confusion.count(truth, mapped, count, UNLABELLED)
        step.advance(window.pixels, describe_memory(meter.current_bytes))
    ignored = dict(reader.ignored)
    reader.close()
    if not total.pixels:
        raise UsageError(
            f"{entry.out} and {entry.labels.path} have no pixel in common that both know; are they of one scene?"
        )
    return total, ignored


def score_values(total: Confusion, names: Sequence[str]) -> dict[str, Any]:
    """Scores as plain JSON values; of classes that occur, by name; None where a score is not defined."""
    present = _find_present(total)
    last = present[-1] + 1

    def by_name(scores: Sequence[float]) -> dict[str, float | None]:
        return {names[value]: None if math.isnan(scores[value]) else scores[value] for value in present}

    return {
        "pixels": total.pixels,
        "accuracy": total.accuracy,
        "mean_iou": total.mean_iou,
        "mean_f1": total.mean_f1,
        "iou": by_name(total.iou),
        "f1": by_name(total.f1),
        "precision": by_name(total.precision),
        "recall": by_name(total.recall),
        "classes": list(names[:last]),
        "confusion": total.counts[:last, :last].tolist(),
    }


def _find_present(total: Confusion) -> list[int]:
    """Classes that are labelled or mapped anywhere."""
    return [int(value) for value in np.flatnonzero(total.counts.sum(0) + total.counts.sum(1))]


def _describe(total: Confusion, names: Sequence[str], peak_bytes: int) -> str:
    present = _find_present(total)

    def score(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.4f}"

    rows = [
        [
            names[value],
            *(score(scores[value]) for scores in (total.iou, total.f1, total.precision, total.recall)),
            f"{total.counts[value].sum() / total.pixels:.2%}",
            f"{total.counts[:, value].sum() / total.pixels:.2%}",
        ]
        for value in present
    ]
    text = (
        f"accuracy {total.accuracy:.4f}, mean IoU {total.mean_iou:.4f}, mean F1 {total.mean_f1:.4f}, "
        f"{total.pixels:,} pixels compared, peak memory {format_bytes(peak_bytes)}\n"
        + format_table(("class", "IoU", "F1", "precision", "recall", "labelled", "mapped"), rows)
    )
    if len(present) > _MOST_SHOWN:
        return text + f"\n\n(the confusion matrix of {count_of(len(present), 'class')} is in --json)"
    matrix = [[names[row], *(f"{total.counts[row, column]:,}" for column in present)] for row in present]
    return text + "\n\n" + format_table(("labelled \\ mapped", *(names[column] for column in present)), matrix)
