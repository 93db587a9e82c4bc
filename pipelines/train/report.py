"""The page on a training: curves, scores, confusion matrix, worst tiles, choices, provenance."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...models.segmentation.files.sources import load_model
from ...tiler.base.geometry import Window
from ...tiler.labels.labels import UNLABELLED, Classes
from ...tiler.system.files import write_durably
from ..base.charts import Chart, draw_series
from ..base.page import describe_choice, render_page
from ..base.training_folder import read_training
from ..base.training_log import read_log
from .data import TrainingData

POINTS = 360
"""Of a curve; more steps are averaged."""
WORST = 6
"""Tiles that are shown."""
_SIDE = 220
"""Of their pictures."""
_NODATA = (225, 227, 230)


def write_training_report(folder: Path, data: TrainingData) -> int:
    """Write FOLDER/report.html from training.json, train.jsonl and best.json; returns its bytes."""
    page = render_training_report(folder, data).encode()
    write_durably(folder / "report.html", page)
    return len(page)


def render_training_report(folder: Path, data: TrainingData) -> str:
    """The page's text."""
    training = read_training(folder)
    assert training is not None
    lines = read_log(folder / "train.jsonl")
    steps = [line for line in lines if "validation" not in line]
    validations = [line["validation"] for line in lines if "validation" in line]
    best = max(validations, key=lambda entry: entry["mean_iou"], default=None)
    classes = training["data"]["classes"]
    values: dict[str, Any] = {
        "out": str(folder),
        "training": training,
        "steps": len(steps),
        "seconds": sum(line["seconds"] for line in steps),
        "pixels": sum(line["pixels"] for line in steps),
        "memory": max((line["memory_bytes"] for line in steps), default=0),
        "best": best,
        "charts": _curves(steps, validations),
        "classes": [(entry["name"], "#{:02x}{:02x}{:02x}".format(*entry["colour"])) for entry in classes],
        "matrix": _matrix(best["confusion"]) if best else [],
        "worst": _worst_tiles(folder, data, best) if best else [],
        "choices": [(key.replace("_", " "), describe_choice(value)) for key, value in training["fingerprint"].items()
                    if not key.startswith(("scene", "labels"))],
    }  # fmt: skip
    return render_page("training.html", "training", values, score=_score)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _curves(steps: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]]) -> list[Chart]:
    """Loss, scores, gradient and learning rate over the steps."""
    last = max((line["step"] for line in steps), default=1)

    def of(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in lines]

    scores = {"mean IoU": "mean_iou", "mean F1": "mean_f1", "accuracy": "accuracy"}
    named = [
        ("Loss", [("training", of(steps, "loss"))], None),
        ("Scores on validation", [(name, of(validations, key)) for name, key in scores.items()], 1.0),
        ("Norm of the gradient, before clipping", [("", of(steps, "gradient_norm"))], None),
        ("Learning rate", [("", of(steps, "rate"))], None),
    ]
    return [
        draw_series(title, lines, points=POINTS, top=top, last=last)
        for title, lines, top in named
        if any(points for _, points in lines)
    ]


def _matrix(counts: Sequence[Sequence[int]]) -> list[list[tuple[int, float]]]:
    """(pixels, share of the row) of each cell."""
    return [[(count, count / sum(row) if sum(row) else 0.0) for count in row] for row in counts]


def _worst_tiles(folder: Path, data: TrainingData, best: dict[str, Any]) -> list[dict[str, Any]]:
    """Input, labels and result of the worst tiles of the best validation, by the best model."""
    model = load_model(folder / "best.json", trust=True)
    weights = {f"network.{name}": value for name, value in model.network.state_dict().items()}
    colours = np.array([entry.colour for entry in data.classes], np.uint8)
    found: list[dict[str, Any]] = []
    for entry in best["worst"][:WORST]:
        if not entry["wrong"]:
            continue
        y, x, height, width = entry["window"]
        window = Window(y=y, x=x, height=height, width=width)
        truth = data.engine.read_validation(entry["scene"], window)
        result = data.engine.predict(entry["scene"], window, weights)
        found.append(
            {
                "name": f"{Path(data.scenes[entry['scene']].raster.path).name}, window {window}",
                "wrong": entry["wrong"] / entry["pixels"],
                "pixels": entry["pixels"],
                "pictures": [
                    ("input", _picture(_stretch(data.engine.read_image(entry["scene"], window), data))),
                    ("labels", _picture(_paint(truth, colours))),
                    ("result", _picture(_paint(result, colours))),
                    ("wrong", _picture(_mark(truth, result))),
                ],
            }
        )
    return found


def _stretch(image: npt.NDArray[Any], data: TrainingData) -> npt.NDArray[np.uint8]:
    """(height, width, 3): the first three bands, two deviations around their means."""
    bands = [min(index, len(image) - 1) for index in range(3)]
    mean = np.asarray(data.survey.means)[bands, None, None]
    deviation = np.asarray(data.survey.deviations)[bands, None, None]
    grey = np.nan_to_num((image[bands].astype(np.float64) - mean) / (4 * deviation) + 0.5)
    return np.moveaxis((grey.clip(0, 1) * 255).astype(np.uint8), 0, 2)


def _paint(classes: Classes, colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    painted = colours[np.minimum(classes, len(colours) - 1)]
    painted[classes == UNLABELLED] = _NODATA
    return painted


def _mark(truth: Classes, result: Classes) -> npt.NDArray[np.uint8]:
    """Wrong pixels red, right ones pale, others grey."""
    painted = np.full((*truth.shape, 3), (214, 238, 224), np.uint8)
    painted[truth != result] = (179, 38, 30)
    painted[truth == UNLABELLED] = _NODATA
    return painted


def _picture(pixels: npt.NDArray[np.uint8], resize: Callable[..., Image.Image] = Image.Image.resize) -> str:
    """A picture inside a page."""
    picture = Image.fromarray(pixels)
    scale = _SIDE / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = resize(picture, size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
