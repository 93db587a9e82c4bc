"""The page on a training of faces: curves, scores of identities never seen, pictures that could not be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...tiler.system.files import write_durably
from ..base.charts import Chart, draw_series
from ..base.console import format_rate
from ..base.page import describe_choice, render_page
from ..base.training_folder import read_training
from ..base.training_log import read_log
from .charts import BINS, draw_roc, draw_scores
from .validation import Measured

POINTS = 360
"""Of a curve; more steps are averaged."""


def write_face_report(
    folder: Path, values: dict[str, Any], measured: Measured | None, unusable: dict[str, str]
) -> None:
    """Write FOLDER/report.html from training.json and train.jsonl.

    Args:
        values: the command's result.
    """
    training = read_training(folder)
    assert training is not None
    lines = read_log(folder / "train.jsonl")
    steps = [line for line in lines if "validation" not in line]
    validations = [line["validation"] for line in lines if "validation" in line]
    verification = measured.verification if measured else None
    content = {
        "out": str(folder),
        "values": values,
        "training": training,
        "steps": len(steps),
        "seconds": sum(line["seconds"] for line in steps),
        "images": sum(line["samples"] for line in steps),
        "skipped": sum(line["skipped"] for line in steps),
        "curves": _curves(steps, validations),
        "roc": None,
        "scores": None,
        "points": verification.points if verification else [],
        "pairs": (verification.genuine_pairs, verification.impostor_pairs) if verification else None,
        "unusable": list(unusable.items()),
        "choices": [(key.replace("_", " "), describe_choice(value)) for key, value in training["fingerprint"].items()],
    }
    if verification is not None:
        exact = [(p.rate, p.true_accept_rate) for p in verification.points if p.true_accept_rate is not None]
        content["roc"] = draw_roc(*verification.curve(), exact, verification.impostor_pairs)
        content["scores"] = draw_scores(*verification.histogram(BINS))
    page = render_page("face_training.html", "training of faces", content, rate=format_rate)
    write_durably(folder / "report.html", page.encode())


def _curves(steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> list[Chart]:
    def of(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in lines if line.get(key) is not None]

    ends = [line["step"] for line in steps]
    tar = [(line["step"], line["tar"]["1e-3"]) for line in validations if line.get("tar", {}).get("1e-3") is not None]
    full = of(validations, "full_loss")
    speed = [(line["step"], line["samples"] / line["seconds"]) for line in steps if line["seconds"]]
    memory = [(step, bytes_ / 1e9) for step, bytes_ in of(steps, "memory_bytes")]
    charts = [
        ("Loss", [("of each step", of(steps, "loss")), ("over all classes, of one batch", full)], None),
        ("Identities never seen", [("rank-1", of(validations, "rank_1")), ("TAR at FAR 1e-3", tar)], 1.0),
        ("Norm of the gradient, before clipping", [("", of(steps, "gradient_norm"))], None),
        ("Learning rate", [("embedder", of(steps, "rate"))], None),
        ("Images a second", [("of each step", speed)], None),
        ("Memory of all ranks, GB", [("after each step", memory)], None),
    ]
    return [
        draw_series(title, lines, points=POINTS, top=top, last=max(ends))
        for title, lines, top in charts
        if ends and any(points for _, points in lines)
    ]
