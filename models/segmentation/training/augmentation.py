"""Augmentation that commutes with tiling: turns, flips, and a gain and offset for each band."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ....tiler.base.errors import UsageError
from ....tiler.base.geometry import Window

KINDS = ("flips", "turns", "radiometry")

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One of the eight ways to lay a rectangle: transposed or not, then mirrored up-down, then left-right.

    `apply(whole)[w.slices()] == apply(whole[source_window(w, whole.shape).slices()])`: a window of the turned image is
    the turned window of the image.
    """

    transpose: bool = False
    mirror_y: bool = False
    mirror_x: bool = False

    def shape(self, shape_yx: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the turned image."""
        return (shape_yx[1], shape_yx[0]) if self.transpose else shape_yx

    def source_window(self, window: Window, shape_yx: tuple[int, int]) -> Window:
        """The pixels of an image of `shape_yx` that a window of the turned image shows."""
        height, width = self.shape(shape_yx)
        y = height - window.y - window.height if self.mirror_y else window.y
        x = width - window.x - window.width if self.mirror_x else window.x
        if self.transpose:
            return Window(y=x, x=y, height=window.width, width=window.height)
        return Window(y=y, x=x, height=window.height, width=window.width)

    def turned_window(self, window: Window, shape_yx: tuple[int, int]) -> Window:
        """Where a window of the image lies in the turned image."""
        height, width = self.shape(shape_yx)
        if self.transpose:
            window = Window(y=window.x, x=window.y, height=window.width, width=window.height)
        y = height - window.y - window.height if self.mirror_y else window.y
        x = width - window.x - window.width if self.mirror_x else window.x
        return Window(y=y, x=x, height=window.height, width=window.width)

    def apply(self, image: Array) -> Array:
        """The turned (..., height, width); a view."""
        turned = image.swapaxes(-2, -1) if self.transpose else image
        return turned[..., :: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How one scene, or one tile, is shown in one step."""

    turn: Turn
    gain: tuple[float, ...] = ()
    """Of each band; empty: 1."""
    offset: tuple[float, ...] = ()
    """Of each band, in raw units."""

    def adjust(self, image: Array) -> Array:
        """(bands, height, width) * gain + offset."""
        if not self.gain:
            return image
        gain, offset = (np.asarray(values, image.dtype)[:, None, None] for values in (self.gain, self.offset))
        return image * gain + offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What may vary from step to step."""

    flips: bool = True
    turns: bool = True
    """By right angles."""
    radiometry: float = 0.0
    """Gains are 1 +- this, offsets +- this standard deviations of the band; 0: none."""

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """ "flips,turns,radiometry=0.1", or "none".

        Raises:
            UsageError: another word.
        """
        words = [word.strip() for word in text.split(",")]
        values: dict[str, Any] = {"flips": False, "turns": False, "radiometry": 0.0}
        for word in words if words != ["none"] else []:
            name, _, strength = word.partition("=")
            if name not in KINDS or (strength and name != "radiometry"):
                raise UsageError(f"augmentations are {', '.join(KINDS)}, radiometry=0.2, or none alone; got {word!r}")
            values[name] = True
            if name == "radiometry":
                try:
                    values[name] = float(strength or 0.1)
                except ValueError:
                    raise UsageError(f"radiometry must be a number, such as radiometry=0.2, got {strength!r}") from None
        return cls(**values)

    def __post_init__(self) -> None:
        if not 0 <= self.radiometry < 1:
            raise UsageError(f"radiometry must be 0 to below 1, got {self.radiometry:g}")

    def draw(self, rng: np.random.Generator, deviations: tuple[float, ...]) -> Variant:
        """One variant; always as many random numbers, so that what follows does not depend on what is switched off.

        Args:
            deviations: standard deviation of each band, in raw units.
        """
        transpose, mirror_y, mirror_x = (bool(bit) for bit in rng.integers(0, 2, 3))
        gain = rng.uniform(-1, 1, len(deviations))
        offset = rng.uniform(-1, 1, len(deviations))
        if self.flips and not self.turns:
            transpose = False
        elif self.turns and not self.flips:
            # Without mirror images: none, a quarter, a half, three quarters.
            transpose, mirror_y, mirror_x = (
                (False,) * 3,
                (True, True, False),
                (False, True, True),
                (True, False, True),
            )[2 * mirror_y + mirror_x]
        elif not self.turns:
            transpose = mirror_y = mirror_x = False
        turn = Turn(transpose=transpose, mirror_y=mirror_y, mirror_x=mirror_x)
        if not self.radiometry:
            return Variant(turn=turn)
        return Variant(
            turn=turn,
            gain=tuple((1 + self.radiometry * gain).tolist()),
            offset=tuple((self.radiometry * offset * np.asarray(deviations)).tolist()),
        )
