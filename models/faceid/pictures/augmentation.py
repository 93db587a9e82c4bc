"""Augmentation of faces: other light, other crops, poorer cameras, as a function of (seed, epoch, sample)."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from ..base.errors import HeadError

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceAugmentation:
    """What may vary from epoch to epoch; 0: nothing of that kind."""

    crop: float = 0.0
    """Up to this share of height and width is cut off, and the rest scaled to the whole."""
    flip: float = 0.0
    """Share of pictures that are mirrored."""
    colour: float = 0.0
    """Brightness, contrast and each colour's share change by up to this."""
    grey: float = 0.0
    """Share of pictures that lose their colour."""
    blur: float = 0.0
    """A Gaussian's standard deviation is up to this share of the height."""
    resolution: float = 0.0
    """Up to this share of the rows and columns of pixels is lost: scaled down, and up again."""
    jpeg: float = 0.0
    """Compressed with a quality of 100 down to 100 (1 - this)."""
    erase: float = 0.0
    """Share of pictures of which a rectangle of a fiftieth to a fifth is filled with noise."""

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            if not 0 <= getattr(self, name) <= kind.highest:
                raise HeadError(f"{name} must be in 0 ... {kind.highest:g}, got {getattr(self, name):g}")

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
                values[name] = float(strength or KINDS[name].usual)
            except ValueError:
                raise HeadError(
                    f"{name} must be a number, such as {name}={KINDS[name].usual}, got {strength!r}"
                ) from None
        return cls(**values)

    def __str__(self) -> str:
        return ",".join(f"{name}={value:g}" for name in KINDS if (value := getattr(self, name))) or "none"

    def apply(self, pixels: Pixels, seed: int, epoch: int, sample: int) -> Pixels:
        """The variant of a picture, (height, width, 3), in one epoch; always the same for the same numbers."""
        if self == FaceAugmentation():
            return pixels
        chance = Chance(seed, epoch, sample)
        for name, kind in KINDS.items():
            if strength := getattr(self, name):
                pixels = kind.vary(pixels, strength, chance)
        return np.ascontiguousarray(pixels)


class Chance:
    """A picture's random numbers in one epoch; each kind has its own, so that what is asked besides changes none."""

    def __init__(self, seed: int, epoch: int, sample: int) -> None:
        # The counter's first word counts what is drawn: no picture in no epoch draws another's numbers.
        self.noise = np.random.Generator(np.random.Philox(key=[seed, 17], counter=[0, epoch, sample, 0]))
        self.numbers: list[float] = self.noise.random(20).tolist()


def _crop(pixels: Pixels, most: float, chance: Chance) -> Pixels:
    (height, width), numbers = pixels.shape[:2], chance.numbers
    kept_y, kept_x = height * (1 - most * numbers[0]), width * (1 - most * numbers[1])
    top, left = (height - kept_y) * numbers[2], (width - kept_x) * numbers[3]
    box = (left, top, left + kept_x, top + kept_y)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box))


def _flip(pixels: Pixels, share: float, chance: Chance) -> Pixels:
    return pixels[:, ::-1] if chance.numbers[4] < share else pixels


def _colour(pixels: Pixels, most: float, chance: Chance) -> Pixels:
    swing = most * (2 * np.array(chance.numbers[5:10]) - 1)
    gain = (1 + swing[0]) * (1 + swing[2:5])
    offset = 127.5 * swing[1]
    levels = np.arange(256)[:, None] * gain + offset  # each value of each colour once, not each pixel
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return np.stack([table[pixels[..., k], k] for k in range(3)], axis=-1)


def _grey(pixels: Pixels, share: float, chance: Chance) -> Pixels:
    """As grey pictures are read."""
    return np.asarray(Image.fromarray(pixels).convert("L").convert("RGB")) if chance.numbers[16] < share else pixels


def _blur(pixels: Pixels, most: float, chance: Chance) -> Pixels:
    deviation = most * pixels.shape[0] * chance.numbers[17]
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(deviation)))


def _resolution(pixels: Pixels, most: float, chance: Chance) -> Pixels:
    """Up again as pictures that are too small are scaled when they are read."""
    (height, width), kept = pixels.shape[:2], 1 - most * chance.numbers[18]
    small = (max(1, round(width * kept)), max(1, round(height * kept)))
    picture = Image.fromarray(pixels).resize(small, Image.Resampling.BILINEAR)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _jpeg(pixels: Pixels, most: float, chance: Chance) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=round(100 * (1 - most * chance.numbers[19])))
    return np.asarray(Image.open(file))


def _erase(pixels: Pixels, share: float, chance: Chance) -> Pixels:
    (height, width), numbers = pixels.shape[:2], chance.numbers
    if numbers[10] >= share:
        return pixels
    area, ratio = 0.02 + 0.18 * numbers[11], 3.0 ** (2 * numbers[12] - 1)
    tall = min(height, max(1, round(height * (area * ratio) ** 0.5)))
    broad = min(width, max(1, round(width * (area / ratio) ** 0.5)))
    top, left = int(numbers[13] * (height - tall + 1)), int(numbers[14] * (width - broad + 1))
    pixels = pixels.copy()
    pixels[top : top + tall, left : left + broad] = chance.noise.integers(0, 256, (tall, broad, 3), np.uint8)
    return pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of augmentation."""

    usual: float
    """Strength where none is said."""
    highest: float
    vary: Callable[[Pixels, float, Chance], Pixels]
    """(picture, strength above 0, random numbers) -> its variant."""


KINDS = {
    "crop": Kind(usual=0.1, highest=0.5, vary=_crop),
    "flip": Kind(usual=0.5, highest=1.0, vary=_flip),
    "colour": Kind(usual=0.1, highest=0.5, vary=_colour),
    "grey": Kind(usual=0.1, highest=1.0, vary=_grey),
    "blur": Kind(usual=0.02, highest=0.1, vary=_blur),
    "resolution": Kind(usual=0.4, highest=0.9, vary=_resolution),
    "jpeg": Kind(usual=0.6, highest=0.95, vary=_jpeg),
    "erase": Kind(usual=0.2, highest=1.0, vary=_erase),
}
"""In the order in which they are applied: what lies before the camera, then the camera, then what becomes of its
picture."""
