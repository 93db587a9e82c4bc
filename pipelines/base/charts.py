"""Drawings of a page, as points of SVG of 720 x 240: curves with their axes."""

from __future__ import annotations

import math
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
    """Values over steps, from 0 on; more than `points` of a line are averaged. A line alone is named at its axis.

    Args:
        lines: name, and (step, value) of each point.
        top: of the axis; None: a round number that no value exceeds.
        last: step at the end of the axis.
    """
    thin: list[tuple[str, Curve]] = []
    for name, line in lines:
        if line:
            parts = np.array_split(np.asarray(line, np.float64), min(points, len(line)))
            thin.append((name, np.array([part.mean(axis=0) for part in parts])))
    highest = top or round_up(max(float(line[:, 1].max()) for _, line in thin), 5) or 1.0
    ends = round_ticks(0, last, 5)
    if last - ends[-1] > 0.6 * (ends[-1] - ends[-2]):
        ends.append(last)

    def place(line: Curve) -> tuple[Curve, Curve]:
        return WIDTH * line[:, 0] / last, HEIGHT * (1 - line[:, 1] / highest)

    return Chart(
        title=title,
        x_name="step",
        y_name=thin[0][0] if len(thin) == 1 else "",
        x_ticks=[(WIDTH * step / last, f"{step:,.0f}") for step in ends if step == int(step)],
        y_ticks=[(HEIGHT * (1 - value / highest), _short(value)) for value in round_ticks(0, highest, 5)],
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


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten between low and high, so fine that there are no more than `most`
    and one."""
    step = _round_step(high - low, most)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def round_up(value: float, most: int) -> float:
    """The first tick that `value` does not exceed, on an axis from 0 with up to `most` and one."""
    return math.ceil(value / _round_step(value, most) - 1e-9) * _round_step(value, most) if value > 0 else 0.0


def _round_step(length: float, most: int) -> float:
    power = 10.0 ** math.floor(math.log10(length / most))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * most >= length * (1 - 1e-9))


def _short(value: float) -> str:
    """Of a tick, which has room for seven signs."""
    return f"{value:,.5g}".replace("e+0", "e").replace("e-0", "e-")
