"""Margins: how the cosine between a sample and its own class is lowered, so that classes keep apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.errors import HeadError

EPSILON = 1e-12
"""Of 1 - t^2, below which the sine is taken as constant: its derivative is infinite at t = 1."""
NAMES = ("arcface", "cosface", "softmax")


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """phi(cos theta) = cos(m1 theta + m2) - m3 of the target's cosine; others keep theirs.

    m1 = 1, m2 = 0.5 is ArcFace (Deng et al. 2019), m3 = 0.35 CosFace (Wang et al. 2018), m1 > 1 SphereFace (Liu et al.
    2017), (1, 0, 0) plain softmax over cosines. Where the angle passes pi, phi goes on falling: linearly in t for
    m1 = 1, as t - m2 sin(m2) - m3; by (-1)^k cos - 2k for other m1.
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    exact_gradient: bool = True
    """False: phi' is taken as 1, as InsightFace does since 2022: not the gradient of the loss that is shown."""

    def __post_init__(self) -> None:
        if not (1 <= self.m1 < math.inf and 0 <= self.m2 < math.pi and 0 <= self.m3 < math.inf):
            raise HeadError(f"margins must be m1 >= 1, 0 <= m2 < pi, m3 >= 0, got {self.m1}, {self.m2}, {self.m3}")

    def apply(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """(phi, phi') of target cosines, in their own dtype."""
        t = cosine.clamp(-1, 1)
        if self.m1 == 1:
            phi, slope = self._additive(t)
        else:
            phi, slope = self._multiplicative(t)
        return phi - self.m3, slope if self.exact_gradient else torch.ones_like(slope)

    def _additive(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.m2 == 0:
            return t, torch.ones_like(t)
        cos_m, sin_m = math.cos(self.m2), math.sin(self.m2)
        sine_squared = 1 - t * t
        free = sine_squared > EPSILON
        sine = sine_squared.clamp_min(EPSILON).sqrt()
        rotated, slope = t * cos_m - sine * sin_m, torch.where(free, cos_m + t * sin_m / sine, cos_m)
        beyond = t <= math.cos(math.pi - self.m2)
        return torch.where(beyond, t - self.m2 * sin_m, rotated), torch.where(beyond, 1.0, slope)

    def _multiplicative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.m1 * torch.acos(t) + self.m2
        turns = torch.floor(angle / math.pi)
        sign = 1 - 2 * (turns % 2)
        # d cos(m1 theta + m2) / d cos theta = m1 sin(m1 theta + m2) / sin theta
        sine = (1 - t * t).clamp_min(EPSILON).sqrt()
        return sign * torch.cos(angle) - 2 * turns, sign * self.m1 * torch.sin(angle) / sine


def margin_from(
    margin: str | tuple[float, float, float], value: float | None = None, *, exact_gradient: bool = True
) -> Margin:
    """A margin by its name and value, or by (m1, m2, m3).

    Raises:
        HeadError: no such margin.
    """
    if not isinstance(margin, str):
        m1, m2, m3 = margin
        return Margin(m1=m1, m2=m2, m3=m3, exact_gradient=exact_gradient)
    if margin == "arcface":
        return Margin(m2=0.5 if value is None else value, exact_gradient=exact_gradient)
    if margin == "cosface":
        return Margin(m3=0.35 if value is None else value, exact_gradient=exact_gradient)
    if margin == "softmax":
        return Margin()
    raise HeadError(f"margin must be one of {', '.join(NAMES)} or (m1, m2, m3), got {margin!r}")
