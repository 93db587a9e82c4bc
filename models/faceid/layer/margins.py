"""Margins: how the cosine between a sample and its own class is lowered, so that classes keep apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.errors import HeadError
from .margin_registry import MARGINS, MarginLike

EPSILON = 1e-12
"""Of 1 - t^2, below which the sine is taken as constant: its derivative is infinite at t = 1."""
_TRIED = 257
"""Cosines, evenly over -1..1, that an added margin is tried with."""
_SLOPE_TOLERANCE = 1e-6


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutSlope:
    """A margin whose phi' is taken as 1: not the gradient of the loss that is shown."""

    margin: MarginLike

    def apply(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """(phi, 1) of target cosines."""
        phi, slope = self.margin.apply(cosine)
        return phi, torch.ones_like(slope)


def make_arcface(value: float | None) -> Margin:
    """ArcFace, m2 = `value`; None: 0.5."""
    return Margin(m2=0.5 if value is None else value)


def make_cosface(value: float | None) -> Margin:
    """CosFace, m3 = `value`; None: 0.35."""
    return Margin(m3=0.35 if value is None else value)


def make_softmax(value: float | None) -> Margin:
    """The cosine as it is.

    Raises:
        HeadError: a value, of which it has none.
    """
    if value is not None:
        raise HeadError(f"softmax has no margin, got a value of {value}; leave it out, or take arcface or cosface")
    return Margin()


def margin_from(
    margin: str | tuple[float, float, float], value: float | None = None, *, exact_gradient: bool = True
) -> MarginLike:
    """A margin by its name and value, or by (m1, m2, m3).

    Raises:
        HeadError: no such margin; an added one whose phi is greater than 1 or not finite, or whose phi' is not its
            derivative.
    """
    if not isinstance(margin, str):
        m1, m2, m3 = margin
        return Margin(m1=m1, m2=m2, m3=m3, exact_gradient=exact_gradient)
    found = MARGINS.make(margin, value)
    if isinstance(found, Margin):
        return replace(found, exact_gradient=exact_gradient)
    _require_lawful(margin, found)
    return found if exact_gradient else WithoutSlope(margin=found)


def _require_lawful(name: str, margin: MarginLike) -> None:
    """Try an added margin on cosines over the whole range.

    Raises:
        HeadError: its phi or phi' is not what `MarginLike` says.
    """
    with torch.enable_grad():
        cosines = torch.linspace(-1, 1, _TRIED, dtype=torch.float64, requires_grad=True)
        phi, slope = margin.apply(cosines)
        if phi.shape != cosines.shape or slope.shape != cosines.shape or phi.dtype != cosines.dtype:
            raise HeadError(f"margin {name} must give phi and phi' of the cosines' shape and dtype")
        if not phi.requires_grad:
            raise HeadError(f"margin {name} must be made of torch's differentiable operations; its phi has no gradient")
        # The sum over all: where phi of one cosine depends on another, this is not phi' either.
        (derivative,) = torch.autograd.grad(phi.sum(), cosines)
    if not (phi.isfinite() & (phi <= 1)).all():
        raise HeadError(f"margin {name} must give a finite phi of at most 1, got {float(phi.detach().max()):g}")
    # At the two ends a derivative may be infinite; a margin bounds it there as it likes.
    apart = (slope.detach() - derivative).abs()[1:-1]
    if not (apart <= _SLOPE_TOLERANCE * derivative.abs()[1:-1].clamp_min(1)).all():
        worst = int(apart.nan_to_num(torch.inf).argmax()) + 1
        raise HeadError(
            f"margin {name} must give the derivative of its phi, {float(derivative[worst]):g} at a cosine of "
            f"{float(cosines.detach()[worst]):g}, got {float(slope.detach()[worst]):g}"
        )
