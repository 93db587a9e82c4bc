"""The start check: sampled cores recomputed inside a larger window, by the reference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.errors import ExactnessError

if TYPE_CHECKING:
    pass

RELATIVE_TOLERANCE = 1e-4
"""Of the largest logit. Engines differ by 1e-6 to 1e-5 in float32; a missing row of halo by far more."""
FEWER_BITS = {"bfloat16": 4 * 2.0**-8, "float16": 4 * 2.0**-11, "tf32": 8 * 2.0**-11}
"""The same for precisions whose own rounding is coarser: two ways to add up the same products may part by a last bit at
every layer."""


MOST_TIES = 1e-3
"""Share of pixels that rounding may give another class, where a network gives class numbers and shows no logits."""


def relative_tolerance(precision: str) -> float:
    """Of the largest logit, by which tiles and larger windows of one precision may differ."""
    return FEWER_BITS.get(precision, RELATIVE_TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCheck:
    """What the start check found."""

    tiles: int
    pixels: int
    compared: str
    """"logits", "output" for a network that shows no logits, or "classes" for one that gives their numbers."""
    max_abs: float
    """Largest absolute difference, tile against larger window; of class numbers the share that differs."""
    largest: float
    """Largest absolute reference value."""
    flipped: int
    """Pixels whose finished value (class) differs."""
    tolerance: float
    by: str = "torch"
    """What computed the larger windows."""

    @property
    def passed(self) -> bool:
        return self.max_abs <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def sentence(self) -> str:
        tiles = f"{self.tiles} tile{'s' * (self.tiles != 1)}"
        if self.compared == "classes":
            return (
                f"{tiles}, {self.pixels} px recomputed in larger windows by {self.by}: {self.flipped} of another class "
                f"(at most {self.tolerance:.2%}, as ties that rounding decides)"
            )
        return (
            f"{tiles}, {self.pixels} px recomputed in larger windows by {self.by}: largest difference of "
            f"{self.compared} {self.max_abs:.2g} (tolerance {self.tolerance:.2g}), {self.flipped} flipped pixels"
        )


def compare_patches(
    pairs: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]],
    *,
    tiles: int,
    has_logits: bool,
    by: str = "torch",
    relative: float = RELATIVE_TOLERANCE,
) -> StartCheck:
    """Compare (finished, logits, reference finished, reference logits) of each patch.

    Args:
        relative: of the largest logit, by which they may differ.
    """
    max_abs, largest, flipped, pixels = 0.0, 0.0, 0, 0
    for finished, logits, expected_finished, expected in pairs:
        ours, theirs = logits.astype(np.float64), expected.astype(np.float64)
        # Equal infinities agree, and NaN with NaN; NaN against a number does not.
        agree = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        with np.errstate(invalid="ignore"):
            worst = np.where(agree, 0.0, np.abs(ours - theirs)).max(initial=0.0)
        max_abs = float("inf") if np.isnan(worst) else max(max_abs, float(worst))
        finite = expected[np.isfinite(expected)]
        largest = max(largest, float(np.abs(finite.astype(np.float64)).max(initial=0.0)))
        differs = (finished != expected_finished) & ~((finished != finished) & (expected_finished != expected_finished))
        flipped += int(differs.any(axis=0).sum()) if finished.dtype.kind != "f" else 0
        pixels += finished.shape[-2] * finished.shape[-1]
    if has_logits and all(pair[3].dtype.kind in "bui" for pair in pairs):
        # Class numbers have no distance.
        return StartCheck(
            tiles=tiles,
            pixels=pixels,
            compared="classes",
            max_abs=flipped / pixels if pixels else 0.0,
            largest=1.0,
            flipped=flipped,
            tolerance=MOST_TIES,
            by=by,
        )
    return StartCheck(
        tiles=tiles,
        pixels=pixels,
        compared="logits" if has_logits else "output",
        max_abs=max_abs,
        largest=largest,
        flipped=flipped,
        tolerance=relative * largest,
        by=by,
    )


def require_exact(check: StartCheck) -> None:
    """Stop a run whose tiles differ from larger windows.

    Raises:
        ExactnessError: beyond tolerance.
    """
    if not check.passed:
        if not np.isfinite(check.max_abs):
            raise ExactnessError(
                "the start check met NaN or infinity: tiles and larger windows differ there. If the raster holds NaN "
                "that it does not call nodata, give --nodata nan --nodata-any; nothing was written"
            )
        raise ExactnessError(
            f"the start check must agree to {check.tolerance:.2g}, tiles differ from larger windows by "
            f"{check.max_abs:.3g} ({check.flipped} of {check.pixels} pixels flipped); nothing was written. "
            "Try --engine torch, and report the network"
        )
