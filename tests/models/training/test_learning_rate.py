"""Learning rates against their formulas."""

from __future__ import annotations

import math

import pytest
from outsize.models.training.learning_rate import ProgressRate, StepRate
from outsize.tiler.base.errors import UsageError


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = ProgressRate(highest=0.2, warm_up=4)
    assert [rates.rate(step, 0.0) for step in range(5)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    assert rates.rate(50, 0.5) == pytest.approx(0.1)
    assert rates.rate(99, 1.0) == pytest.approx(0.0)


def test_rates_rise_and_fall_as_the_schedule_says() -> None:
    cosine = StepRate(kind="cosine", steps=110, warm_up=10)
    assert [cosine.share(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [cosine.share(step) for step in (10, 60, 110)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    falls = StepRate(kind="steps", steps=100, warm_up=0, falls=(0.5, 0.8))
    assert [falls.share(step) for step in (0, 49, 50, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert StepRate(kind="constant", steps=9, warm_up=0).share(8) == 1.0
    with pytest.raises(UsageError, match=r"the warm-up must be 0 \.\.\. 5 steps"):
        StepRate(kind="cosine", steps=5, warm_up=6)
    with pytest.raises(UsageError, match="falls are shares"):
        StepRate(kind="steps", steps=5, warm_up=0, falls=(1.5,))
    with pytest.raises(UsageError, match="schedule must be one of cosine, steps, constant, got 'step'"):
        StepRate(kind="step", steps=5, warm_up=0)


def test_rates_keep_the_bits_of_their_formulas_so_that_trainings_are_continued() -> None:
    rates = ProgressRate(highest=0.0123, warm_up=7)
    steps = StepRate(kind="cosine", steps=97, warm_up=7)
    for step in range(97):
        progress = step / 97
        assert rates.rate(step, progress) == (
            0.0123 * min(1.0, (step + 1) / 7) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        )
        if step >= 7:
            assert steps.share(step) == 0.5 * (1 + math.cos(math.pi * (step - 7) / max(1, 97 - 7)))
