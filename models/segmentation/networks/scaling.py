"""Scaling: the affine map from raw pixels to what a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, TypeAlias, get_args

from ....tiler.base.errors import UsageError

ScalingKind: TypeAlias = Literal["z-score", "min-max", "offset", "scale", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """y = (x - subtract) / divide for each band; constants of the model, never of a tile.

    Raises:
        UsageError: constants that do not fit each other, or that a band cannot be divided by.
    """

    kind: ScalingKind | tuple[ScalingKind, ...]
    """How each band's constants are named in a description; one word where all bands agree.
    z-score: (x - mean) / stddev; min-max: (x - minimum) / (maximum - minimum); offset: x - value; scale: x / value;
    none: x."""
    subtract: tuple[float, ...]
    divide: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.subtract) != len(self.divide) or not self.subtract:
            raise UsageError(
                f"scaling needs one pair of constants a band, got {len(self.subtract)} and {len(self.divide)}"
            )
        kinds = (self.kind,) * len(self.subtract) if isinstance(self.kind, str) else tuple(self.kind)
        if len(kinds) != len(self.subtract):
            raise UsageError(f"scaling needs one kind a band, got {len(kinds)} for {len(self.subtract)} bands")
        kinds = tuple(_checked(*band) for band in zip(kinds, self.subtract, self.divide, strict=True))
        object.__setattr__(self, "kind", kinds[0] if len(set(kinds)) == 1 else kinds)

    @property
    def kinds(self) -> tuple[ScalingKind, ...]:
        """The kind of each band."""
        return (self.kind,) * len(self.subtract) if isinstance(self.kind, str) else self.kind

    @classmethod
    def z_score(cls, *, mean: Sequence[float], stddev: Sequence[float]) -> Scaling:
        """y = (x - mean) / stddev."""
        return cls(kind="z-score", subtract=tuple(mean), divide=tuple(stddev))

    @classmethod
    def min_max(cls, *, minimum: Sequence[float], maximum: Sequence[float]) -> Scaling:
        """y = (x - minimum) / (maximum - minimum)."""
        extents = tuple(high - low for low, high in zip(minimum, maximum, strict=True))
        return cls(kind="min-max", subtract=tuple(minimum), divide=extents)

    @classmethod
    def offset_scale(cls, *, offset: Sequence[float], scale: Sequence[float]) -> Scaling:
        """y = (x - offset) / scale.

        MLM gives a band an offset or a scale; a band with both is called a z-score, which is the same equation.
        """
        pairs = list(zip(offset, scale, strict=True))
        kinds: list[ScalingKind] = ["offset" if s == 1 else "scale" if o == 0 else "z-score" for o, s in pairs]
        return cls(kind=tuple(kinds), subtract=tuple(offset), divide=tuple(scale))

    @classmethod
    def none(cls, bands: int) -> Scaling:
        """y = x."""
        return cls(kind="none", subtract=(0.0,) * bands, divide=(1.0,) * bands)


def _checked(kind: ScalingKind, subtract: float, divide: float) -> ScalingKind:
    """The kind, "none" for an offset or a scale that changes nothing."""
    if kind not in get_args(ScalingKind):
        raise UsageError(f"scaling's kind must be one of {', '.join(get_args(ScalingKind))}, got {kind!r}")
    if not (isfinite(subtract) and isfinite(divide)):
        raise UsageError(f"scaling must have finite constants, got {subtract} and {divide}")
    if kind == "scale":
        if divide == 0:
            raise UsageError("scaling must divide by numbers other than 0")
    elif divide <= 0:
        # A negative deviation, or a minimum above the maximum, is a mix-up.
        raise UsageError(f"scaling must divide by numbers > 0, got {divide}")
    if (kind in ("scale", "none") and subtract != 0) or (kind in ("offset", "none") and divide != 1):
        raise UsageError(f'scaling of kind "{kind}" cannot subtract {subtract} and divide by {divide}; say "z-score"')
    return "none" if kind in ("offset", "scale") and subtract == 0 and divide == 1 else kind
