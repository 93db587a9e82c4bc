"""Curves of a page on an embedder: rates, scores, ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..base.charts import BLUE, HEIGHT, RED, WIDTH, Chart, Curve, Line, join_points, round_ticks, round_up
from ..base.console import format_rate

BINS = 160


def draw_roc(far: Curve, tar: Curve, measured: Sequence[tuple[float, float]], pairs: int) -> Chart:
    """True accepts over false accepts, whose axis is logarithmic and ends where one pair stands."""
    marks = [(rate, true, f"FAR {format_rate(rate)}: TAR {true:.4f}") for rate, true in measured]
    return _draw_over_rates("ROC", ("false accept rate", "true accept rate"), far, tar, marks, pairs)


def draw_det(fpir: Curve, fnir: Curve, measured: Sequence[tuple[float, float]], strangers: int) -> Chart:
    """Known persons who are missed over strangers who are named, whose axis ends where one stranger stands."""
    marks = [(rate, missed, f"FPIR {format_rate(rate)}: FNIR {missed:.4f}") for rate, missed in measured]
    names = ("strangers named (FPIR)", "known missed (FNIR)")
    return _draw_over_rates("DET", names, fpir, fnir, marks, strangers)


def _draw_over_rates(
    title: str,
    names: tuple[str, str],
    rates: Curve,
    shares: Curve,
    measured: Sequence[tuple[float, float, str]],
    count: int,
) -> Chart:
    """Args:
    names: of the axes.
    rates: ascending.
    measured: (rate, share, text).
    count: of what the rates are shares.
    """
    lowest = 10.0 ** min(-1, math.floor(math.log10(1 / count)))
    decades = round(-math.log10(lowest))

    def place(rates: Curve) -> Curve:
        return WIDTH * (1 - np.log10(np.maximum(rates, lowest)) / math.log10(lowest))

    # Of thousands of bins those that the drawing can show: the last of each half pixel.
    x = place(rates)
    shown = np.flatnonzero((rates > 0) & np.append(np.diff(np.floor(2 * x)) > 0, True))
    return Chart(
        title=title,
        x_name=names[0],
        y_name=names[1],
        x_ticks=[(WIDTH * n / decades, f"1e-{decades - n}" if n < decades else "1") for n in range(decades + 1)],
        y_ticks=[(HEIGHT * (1 - share), f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)],
        lines=[Line(name="all thresholds", colour=BLUE, points=join_points(x[shown], HEIGHT * (1 - shares[shown])))],
        marks=[(float(place(np.array([rate]))[0]), HEIGHT * (1 - share), text, BLUE) for rate, share, text in measured],
    )


def draw_scores(edges: Curve, genuine: Curve, impostor: Curve) -> Chart:
    """Shares of pairs by score."""
    low, high = float(edges[0]), float(edges[-1])
    top = round_up(float(max(genuine.max(), impostor.max())), 5)
    scores = round_ticks(low, high, 8)

    def steps(shares: Curve) -> str:
        x = np.repeat((edges - low) / (high - low) * WIDTH, 2)
        y = np.concatenate([[HEIGHT], np.repeat(HEIGHT * (1 - shares / top), 2), [HEIGHT]])
        return join_points(x, y)

    return Chart(
        title="Scores",
        x_name="score",
        y_name="share of pairs",
        x_ticks=[(WIDTH * (score - low) / (high - low), f"{score:.3g}") for score in scores],
        y_ticks=[(HEIGHT * (1 - share / top), f"{100 * share:.3g} %") for share in round_ticks(0, top, 5)],
        lines=[
            Line(name="two persons", colour=RED, points=steps(impostor), filled=True),
            Line(name="one person", colour=BLUE, points=steps(genuine), filled=True),
        ],
        marks=[],
    )


def draw_cmc(match_rates: Sequence[float]) -> Chart:
    """Share of known pictures whose person is among the first."""
    count = len(match_rates)
    low = min(0.95, math.floor(20 * min(match_rates)) / 20)
    rates = np.array(match_rates)
    x = np.zeros(1) if count == 1 else WIDTH * np.arange(count) / (count - 1)
    y = HEIGHT * (1 - (rates - low) / (1 - low))
    ticks = sorted({1, count, *(rank for rank in (5, 10, 20, 50, 100) if rank < count)})
    return Chart(
        title="CMC",
        x_name="rank",
        y_name="person found",
        x_ticks=[(float(x[rank - 1]), str(rank)) for rank in ticks],
        y_ticks=[(HEIGHT * (1 - share) / (1 - low), f"{share:.3g}") for share in round_ticks(low, 1, 5)],
        lines=[Line(name="known persons", colour=BLUE, points=join_points(x, y))],
        marks=[
            (float(x[rank - 1]), float(y[rank - 1]), f"rank {rank}: {match_rates[rank - 1]:.4f}", BLUE)
            for rank in ticks
        ],
    )
