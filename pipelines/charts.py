"""Drawings of a page, as points of SVG of 720 x 240: curves with their axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 720, 240
BLUE, RED, GREEN = COLOURS = ("#2f7de1", "#c2410c", "#1b7f4b")
Curve = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    colour: str
    points: str
    """As SVG's polyline has them."""
    filled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing with its axes."""

    title: str
    x_name: str
    y_name: str
    """Empty: the title says it."""
    x_ticks: list[tuple[float, str]]
    """(place, text)."""
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    marks: list[tuple[float, float, str, str]]
    """Points that are measured exactly: place, what they say, their line's colour."""


def join_points(x: Curve, y: Curve) -> str:
    """As SVG's polyline has them."""
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def draw_series(
    title: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    points: int,
    top: float | None,
    last: float,
) -> Chart:
    """Values over steps, from 0 on; more than `points` of a line are averaged.

    Args:
        lines: name, and (step, value) of each point.
        top: of the axis; None: a little above the highest value.
        last: step at the end of the axis.
    """
    thin: list[tuple[str, Curve]] = []
    for name, line in lines:
        if line:
            parts = np.array_split(np.asarray(line, np.float64), min(points, len(line)))
            thin.append((name, np.array([part.mean(axis=0) for part in parts])))
    highest = top or 1.08 * max(float(line[:, 1].max()) for _, line in thin) or 1.0

    def place(line: Curve) -> tuple[Curve, Curve]:
        return WIDTH * line[:, 0] / last, HEIGHT * (1 - line[:, 1] / highest)

    return Chart(
        title=title,
        x_name="step",
        y_name="",
        x_ticks=[(WIDTH * step / last, f"{step:,}") for step in sorted({round(last * n / 4) for n in range(5)})],
        y_ticks=[(HEIGHT * (1 - share), _short(highest * share)) for share in (0, 0.5, 1)],
        lines=[
            Line(name=name, colour=COLOURS[index % len(COLOURS)], points=join_points(*place(line)))
            for index, (name, line) in enumerate(thin)
        ],
        marks=[
            (float(x), float(y), f"step {step:g}: {value:.4g}", COLOURS[index % len(COLOURS)])
            for index, (_, line) in enumerate(thin)
            if len(line) <= 40
            for x, y, (step, value) in zip(*place(line), line.tolist(), strict=True)
        ],
    )


def _short(value: float) -> str:
    """Of a tick, which has room for seven signs."""
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")
