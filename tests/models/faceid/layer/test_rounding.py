"""Stochastic rounding: one of both neighbours, right on average, also among subnormals; reproducible."""

from __future__ import annotations

import pytest
import torch
from outsize.models.faceid.layer import rounding
from outsize.models.faceid.layer.rounding import RandomBits, round_stochastic

HALVES = [torch.float16, torch.bfloat16]


def round_once(values: torch.Tensor, dtype: torch.dtype, step: int) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    round_stochastic(values.clone(), out, RandomBits(3, step, dtype), 0, 0)
    return out


def neighbours(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest half below and the smallest above, in float64; the value itself where it is one."""
    near = values.to(dtype)
    wide = near.double()
    up = torch.nextafter(near, torch.tensor(torch.inf, dtype=dtype)).double()
    down = torch.nextafter(near, torch.tensor(-torch.inf, dtype=dtype)).double()
    exact = values.double()
    return torch.where(wide <= exact, wide, down), torch.where(wide >= exact, wide, up)


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few words are drawn for each of many steps; values take several parts."""
    monkeypatch.setattr(rounding, "POOL", 1 << 12)
    monkeypatch.setattr(rounding, "PART", 64)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 1e-2, 6e-5, 1e-6, 1e-7])
def test_values_go_to_a_neighbour_and_are_right_on_average(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(200, generator=generator) * size).contiguous()
    below, above = neighbours(values, dtype)
    total = torch.zeros(200, dtype=torch.float64)
    times = 4000
    for step in range(times):
        rounded = round_once(values, dtype, step).double()
        # Among float16's subnormals it may be the next but one.
        slack = torch.where(values.abs() < 2**-14, 2.0**-24, 0.0).double() if dtype == torch.float16 else 0.0
        assert ((rounded >= below - slack) & (rounded <= above + slack)).all()
        assert ((rounded == below) | (rounded == above) | (values.abs() < 2**-14)).all()
        total += rounded
    # Five standard errors of a mean of coin tosses between neighbours, and the words' own 2^-13 of a step.
    error = (total / times - values.double()).abs()
    assert (error <= (above - below) * (5 * 0.7 / times**0.5 + 2**-13)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_type_can_hold_is_kept(dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(500), torch.tensor([0.0, 1.0, -2.0, 16.0])]).to(dtype).float()
    values = torch.cat([values, torch.arange(-50, 50) * 2.0**-24])  # subnormal in float16
    assert torch.equal(round_once(values, dtype, 0).float(), values)


def test_tiny_steps_move_rows_on_average_where_nearest_rounding_stands_still() -> None:
    row = torch.full((10_000,), 0.04, dtype=torch.float16)
    start, step = float(row[0]), 1e-7
    nearest = row.clone()
    for index in range(100):
        row = round_once(row.float() - step, torch.float16, index)
        nearest = (nearest.float() - step).half()
    assert float(nearest[0]) == start
    # Four standard errors: each step of a 300th of the distance between neighbours is a coin toss for each number.
    assert abs(float(row.double().mean()) - (start - 100 * step)) < 7e-7


def test_words_are_a_function_of_seed_step_and_place() -> None:
    def draw(seed: int, step: int, *place: int) -> torch.Tensor:
        words, shift = RandomBits(seed, step, torch.float16).draw(*place)
        assert int(words.min()) >= 0
        assert int(words.max()) < 1 << 13
        assert abs(shift) < 2.0**-25
        return torch.cat([words.double(), torch.tensor([shift], dtype=torch.float64)])

    found = draw(1, 2, 3, 4)
    assert torch.equal(found, draw(1, 2, 3, 4))
    for other in (draw(0, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 3, 5), draw(1, 2, 4, 4), draw(1, 2, 4, 3)):
        assert not torch.equal(found[:-1], other[:-1])
        assert found[-1] != other[-1]


def test_parts_of_a_block_have_words_of_their_own() -> None:
    """The same value in all places: what it becomes does not repeat from part to part."""
    rounded = round_once(torch.full((64 * 50,), 0.3001), torch.float16, 0).reshape(50, 64)
    assert len({tuple(row.tolist()) for row in rounded}) == 50
