"""Drawings: ticks are round, inside the axis, and as many as can be read; a line alone has a name."""

from __future__ import annotations

import numpy as np
import pytest
from outsize.pipelines.base.charts import HEIGHT, WIDTH, draw_series, round_ticks, round_up
from outsize.pipelines.base.console import format_rate
from outsize.pipelines.faces.charts import draw_cmc, draw_scores


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0, 20, 5, [0, 5, 10, 15, 20]),
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.0003, 5, [0, 0.0001, 0.0002, 0.0003]),
        (-0.66, 0.92, 8, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8]),
        (0.85, 1, 5, [0.85, 0.9, 0.95, 1]),
        (0, 97, 5, [0, 20, 40, 60, 80]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, ticks: list[float]) -> None:
    assert round_ticks(low, high, most) == pytest.approx(ticks, abs=1e-12)


def test_an_axis_ends_with_a_tick_that_nothing_exceeds() -> None:
    for value in (*np.random.default_rng(0).uniform(1e-9, 1e9, 200).tolist(), 1.0, 5e-7, 20.0, 0.3):
        top = round_up(value, 5)
        assert value * (1 - 1e-9) <= top <= 1.5 * value
        ticks = round_ticks(0, top, 5)
        assert (ticks[0], ticks[-1]) == (0, pytest.approx(top))
        assert 3 <= len(ticks) <= 6


def test_a_series_is_drawn_between_named_axes() -> None:
    chart = draw_series("Speed", [("of each step", [(1, 3.0), (97, 390.0)])], points=9, top=None, last=97)
    assert chart.y_name == "of each step"
    assert [text for _, text in chart.y_ticks] == ["0", "100", "200", "300", "400"]
    assert [text for _, text in chart.x_ticks] == ["0", "20", "40", "60", "80", "97"]
    assert chart.x_ticks[-1][0] == WIDTH
    assert chart.marks[1][:3] == (WIDTH, pytest.approx(HEIGHT * 10 / 400), "step 97: 390")
    both = draw_series("Loss", [("a", [(1, 1.0)]), ("b", [(1, 2.0)])], points=9, top=None, last=3)
    assert both.y_name == ""  # a legend names them
    assert [text for _, text in both.x_ticks] == ["0", "1", "2", "3"]


def test_scores_and_ranks_have_round_ticks_where_they_belong() -> None:
    edges = np.linspace(-0.66, 0.92, 5)
    chart = draw_scores(edges, np.array([0, 0.1, 0.2, 0.7]), np.array([0.3, 0.5, 0.2, 0]))
    assert {text: x for x, text in chart.x_ticks}["0"] == pytest.approx(WIDTH * 0.66 / 1.58)
    assert [text for _, text in chart.y_ticks] == ["0 %", "20 %", "40 %", "60 %", "80 %"]
    assert chart.y_ticks[-1][0] == 0
    ranks = draw_cmc([0.87, 0.93, 0.99])
    assert [text for _, text in ranks.y_ticks] == ["0.85", "0.9", "0.95", "1"]
    assert [round(y) for y, _ in ranks.y_ticks] == [240, 160, 80, 0]


def test_a_rate_is_shown_as_it_is() -> None:
    assert [format_rate(rate) for rate in (0.1, 0.25, 2.5e-3, 1e-6)] == ["1e-1", "2.5e-1", "2.5e-3", "1e-6"]
