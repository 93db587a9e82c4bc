"""Augmentation of faces: mirrored, recoloured, cropped, partly erased, as a function of (seed, epoch, sample)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import HeadError

Pixels = npt.NDArray[np.uint8]
KINDS = {"flip": 0.5, "colour": 0.1, "crop": 0.1, "erase": 0.2}
"""With the strength of each where none is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceAugmentation:
    """What may vary from epoch to epoch; 0: nothing of that kind."""

    flip: float = 0.0
    """Share of pictures that are mirrored."""
    colour: float = 0.0
    """Brightness, contrast and each colour's share change by up to this."""
    crop: float = 0.0
    """Up to this share of height and width is cut off, and the rest scaled to the whole."""
    erase: float = 0.0
    """Share of pictures of which a rectangle of a fiftieth to a fifth is filled with noise."""

    def __post_init__(self) -> None:
        for name in KINDS:
            highest = 0.5 if name in ("colour", "crop") else 1.0
            if not 0 <= getattr(self, name) <= highest:
                raise HeadError(f"{name} must be in 0 ... {highest:g}, got {getattr(self, name):g}")

    @classmethod
    def parse(cls, text: str) -> FaceAugmentation:
        """ "flip,colour=0.2", or "none".

        Raises:
            HeadError: another word.
        """
        values: dict[str, float] = {}
        for word in [word.strip() for word in text.split(",")] if text.strip() != "none" else []:
            name, _, strength = word.partition("=")
            if name not in KINDS:
                raise HeadError(f"augmentations are {', '.join(KINDS)}, such as flip,colour=0.2, or none; got {word!r}")
            try:
                values[name] = float(strength or KINDS[name])
            except ValueError:
                raise HeadError(f"{name} must be a number, such as {name}={KINDS[name]}, got {strength!r}") from None
        return cls(**values)

    def __str__(self) -> str:
        return ",".join(f"{name}={value:g}" for name in KINDS if (value := getattr(self, name))) or "none"

    def apply(self, pixels: Pixels, seed: int, epoch: int, sample: int) -> Pixels:
        """The variant of a picture, (height, width, 3), in one epoch; always the same for the same numbers."""
        if self == FaceAugmentation():
            return pixels
        random = np.random.Generator(np.random.Philox(key=[seed, 17], counter=[epoch, sample, 0, 0]))
        chance = random.random(16)
        height, width = pixels.shape[:2]
        if self.crop:
            kept_y, kept_x = height * (1 - self.crop * chance[0]), width * (1 - self.crop * chance[1])
            top, left = (height - kept_y) * chance[2], (width - kept_x) * chance[3]
            box = (left, top, left + kept_x, top + kept_y)
            resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
            pixels = np.asarray(resized)
        if chance[4] < self.flip:
            pixels = pixels[:, ::-1]
        if self.colour:
            swing = self.colour * (2 * chance[5:10] - 1)
            gain = (1 + swing[0]) * (1 + swing[2:5])
            offset = 127.5 * swing[1]
            levels = np.arange(256)[:, None] * gain + offset  # each value of each colour once, not each pixel
            table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
            pixels = np.stack([table[pixels[..., k], k] for k in range(3)], axis=-1)
        if chance[10] < self.erase:
            area, ratio = 0.02 + 0.18 * chance[11], 3.0 ** (2 * chance[12] - 1)
            tall = min(height, max(1, round(height * (area * ratio) ** 0.5)))
            broad = min(width, max(1, round(width * (area / ratio) ** 0.5)))
            top, left = int(chance[13] * (height - tall + 1)), int(chance[14] * (width - broad + 1))
            pixels = pixels.copy()
            pixels[top : top + tall, left : left + broad] = random.integers(0, 256, (tall, broad, 3), np.uint8)
        return np.ascontiguousarray(pixels)
