"""Synthetic identities: patterns that are a function of (seed, identity), seen in samples that never repeat.

Each identity is a sum of waves in three channels. A sample moves, scales and shades it, covers a part, and adds noise.
Nothing needs a disk, and there are as many identities as whole numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SIZE = 32
"""Height and width of a sample."""
PIXEL_MEAN, PIXEL_SCALE = 128.0, 40.0
"""A value v becomes the pixel 128 + 40 v, rounded, of 0 ... 255."""
WAVES = 6
"""Of each channel."""


def _pattern(seed: int, identity: int) -> npt.NDArray[np.float64]:
    """(waves, 4, channels): frequencies along height and width, phase, amplitude."""
    random = np.random.Generator(np.random.Philox(key=[seed, identity]))
    waves = np.empty((WAVES, 4, 3))
    waves[:, :2] = random.uniform(-3.0, 3.0, (WAVES, 2, 3))
    waves[:, 2] = random.uniform(0, 2 * np.pi, (WAVES, 3))
    waves[:, 3] = random.normal(size=(WAVES, 3))
    return waves


def make_sample(seed: int, identity: int, sample: int) -> npt.NDArray[np.float32]:
    """(3, SIZE, SIZE): one view of an identity, about zero with variance about one."""
    waves = _pattern(seed, identity)
    random = np.random.Generator(np.random.Philox(key=[seed + 1, identity], counter=[sample, 0, 0, 0]))
    move, zoom = random.uniform(-0.12, 0.12, 2), random.uniform(0.9, 1.1)
    axis = np.linspace(-0.5, 0.5, SIZE) * zoom
    y, x = axis[:, None] + move[0], axis[None, :] + move[1]
    image = np.zeros((3, SIZE, SIZE))
    for channel in range(3):
        for fy, fx, phase, amplitude in waves[:, :, channel]:
            image[channel] += amplitude * np.cos(2 * np.pi * (fy * y + fx * x) + phase)
    image *= random.uniform(0.7, 1.3)
    image += random.uniform(-0.5, 0.5) * (x + y) + random.uniform(-0.3, 0.3)
    if random.random() < 0.3:
        top, left = random.integers(0, SIZE - 8, 2)
        image[:, top : top + 8, left : left + 8] = random.normal()
    image += random.normal(scale=0.3, size=image.shape)
    return (image / np.sqrt(WAVES / 2)).astype(np.float32)


def make_batch(seed: int, identities: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(batch, 3, SIZE, SIZE)."""
    return np.stack([make_sample(seed, int(i), int(s)) for i, s in zip(identities, samples, strict=True)])


def to_pixels(image: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """(3, height, width) of values -> (height, width, 3) of 0 ... 255."""
    pixels = np.rint(PIXEL_MEAN + PIXEL_SCALE * image.transpose(1, 2, 0))
    return np.clip(pixels, 0, 255).astype(np.uint8)
