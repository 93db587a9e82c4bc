"""Synthetic identities: faces drawn from (seed, identity), samples of them from (seed, identity, sample).

A face is some forty terms, each a function of the row times one of the column times a colour: soft spots for eyes,
brows, nose, mouth, cheeks, hair and marks at places in three dimensions, and waves on the skin. Where they are, how
large and in which colours is the identity's. A sample turns the head, moves and lights it, covers a part, and adds
noise. So an image is one small product of matrices, and ten million identities need no disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

SIZE = 32
"""Height and width where nothing else is asked."""
PIXEL_MEAN, PIXEL_SCALE = 127.5, 127.5
"""A pixel p of 0 ... 255 is best shown to a network as (p - mean) / scale."""

Floats = npt.NDArray[Any]
"""float32."""
Whole = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

_MARKS, _WAVES = 6, 4
_CHUNK = 64
"""Images of one product; keeps what it reads in the processor's cache."""
_NOISE = 1 << 18
"""Normal numbers that all images take theirs from, each from a place of its own."""
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Nuisances:
    """What differs between two samples of an identity; 0: nothing of that kind."""

    pose: float = 0.5
    """1: the head turns by up to 29 degrees to the sides, 17 up and down, 9 in the picture; moves and comes nearer by
    up to a twelfth."""
    light: float = 0.5
    """1: a third brighter or darker, and as much from one side to the other; a twelfth for each colour."""
    occlusion: float = 0.1
    """Share of samples with dark glasses, a mask, or a bar somewhere."""
    noise: float = 1.0
    """1: a standard deviation of 8 of 255 in each pixel."""

    def __post_init__(self) -> None:
        for name in ("pose", "light", "noise"):
            if not 0 <= getattr(self, name) <= 3:
                raise ValueError(f"{name} must be in 0 ... 3, got {getattr(self, name)}")
        if not 0 <= self.occlusion <= 1:
            raise ValueError(f"occlusion is a share of the samples, 0 ... 1, got {self.occlusion}")


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draw_uniform(seed: int, stream: int, first: Whole, second: Whole, count: int) -> Floats:
    """(n, count) numbers in [0, 1), a function of (seed, stream, first, second) of each row alone."""
    with np.errstate(over="ignore"):
        state = _mix(np.array([(seed * 1024 + stream) & (1 << 64) - 1], np.uint64))
        for key in (first, second):
            state = _mix(state + (key.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        bits = _mix(state[:, None] + steps)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def draw_faces(
    seed: int,
    identities: Whole,
    samples: Whole,
    height: int = SIZE,
    width: int = SIZE,
    nuisances: Nuisances = Nuisances(),
) -> Pixels:
    """(n, height, width, 3) of red, green, blue: a sample of each identity, whatever else is in the batch."""
    if height < 8 or width < 8:
        raise ValueError(f"faces must be 8 x 8 or larger, got {height} x {width}")
    images = np.empty((len(identities), height, width, 3), np.uint8)
    for start in range(0, len(identities), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(seed, identities[part], samples[part], height, width, nuisances)
    return images


def _draw(seed: int, identities: Whole, samples: Whole, height: int, width: int, nuisances: Nuisances) -> Floats:
    count = len(identities)
    face = _Face.of(draw_uniform(seed, 0, identities, np.zeros_like(identities), 160))
    chance = draw_uniform(seed, 1, identities, samples, 40)
    swing = 2 * chance - 1

    # Pose: the spots' places on the head, turned; a turned head is narrower.
    yaw, pitch, roll = (nuisances.pose * reach * swing[:, k, None] for k, reach in enumerate((0.5, 0.3, 0.16)))
    zoom = 1 + 0.08 * nuisances.pose * swing[:, 3, None]
    shift_x, shift_y = (0.08 * nuisances.pose * swing[:, k, None] for k in (4, 5))
    x = face.x * np.cos(yaw) + face.z * np.sin(yaw)
    depth = face.z * np.cos(yaw) - face.x * np.sin(yaw)
    y = face.y * np.cos(pitch) - depth * np.sin(pitch)
    x, y = x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll)
    x, y = zoom * x + shift_x, zoom * y + shift_y
    wide = zoom * face.wide * np.maximum(0.3, np.cos(yaw) - 0.5 * face.x * np.sin(yaw))
    high = zoom * face.high * np.cos(pitch)

    # Each term: columns (n, terms, width) and rows (n, terms, height).
    u, v = (np.linspace(-1, 1, size, dtype=np.float32) for size in (width, height))
    columns = np.exp(-np.square((u - x[..., None]) / wide[..., None]))
    rows = np.exp(-np.square((v - y[..., None]) / high[..., None]))
    for spots in (columns, rows):
        spots[:, 0] = np.square(spots[:, 0])  # the head itself has a firmer edge
        spots[:, 0] = 1 - np.square(1 - spots[:, 0])
    skin_x = (u - shift_x) / (zoom * np.cos(yaw))
    skin_y = (v - shift_y) / zoom
    angle_x = face.wave_x[..., None] * skin_x[:, None]
    angle_y = face.wave_y[..., None] * skin_y[:, None] + face.phase[..., None]
    head_x, head_y = columns[:, :1], rows[:, :1]
    one_x, one_y = np.ones((count, 1, width), np.float32), np.ones((count, 1, height), np.float32)
    slope_x, slope_y = u + 0 * one_x, v + 0 * one_y
    # cos(a + b) = cos a cos b - sin a sin b: a wave of any direction is two terms.
    columns = np.concatenate(
        [columns, head_x * np.cos(angle_x), head_x * np.sin(angle_x), one_x, slope_x, one_x], axis=1
    )
    rows = np.concatenate([rows, head_y * np.cos(angle_y), -head_y * np.sin(angle_y), one_y, one_y, slope_y], axis=1)
    behind = 60 + 120 * chance[:, None, 6:9]
    colours = np.concatenate(
        [
            face.colour,
            face.wave_colour,
            face.wave_colour,
            behind,
            25 * swing[:, None, 9:12],
            25 * swing[:, None, 12:15],
        ],
        axis=1,
    )
    colours[:, 0] -= behind[:, 0]  # the head stands before what is behind

    # Light: a gain for each colour, and slopes, that multiply rows and columns.
    lit = nuisances.light
    gain = (1 + 0.33 * lit * swing[:, 15, None]) * (1 + 0.08 * lit * swing[:, 16:19])
    columns *= (1 + 0.3 * lit * swing[:, 19, None] * u)[:, None]
    rows *= (1 + 0.2 * lit * swing[:, 20, None] * v)[:, None]
    painted = (columns[..., None] * (colours * gain[:, None])[:, :, None]).reshape(count, -1, width * 3)
    images = np.matmul(rows.transpose(0, 2, 1), painted).reshape(count, height, width, 3)

    _cover(images, chance[:, 24:], y, nuisances.occlusion)
    if nuisances.noise:
        bank = _noise_bank(height * width * 3)
        places = (chance[:, 23] * _NOISE).astype(np.int64)
        for image, place in zip(images, places, strict=True):
            image += np.float32(8 * nuisances.noise) * bank[place : place + image.size].reshape(image.shape)
    return np.clip(np.rint(images, out=images), 0, 255, out=images)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Face:
    """Spots and waves of identities, (n, spots) and (n, waves)."""

    x: Floats
    """Places on the head: to the right, down, to the viewer."""
    y: Floats
    z: Floats
    wide: Floats
    high: Floats
    colour: Floats
    """(n, spots, 3) of what is added."""
    wave_x: Floats
    wave_y: Floats
    phase: Floats
    wave_colour: Floats
    """(n, waves, 3)."""

    @classmethod
    def of(cls, chance: Floats) -> _Face:
        """From 160 uniform numbers of each identity."""
        numbers = iter(range(chance.shape[1]))

        def between(low: float, high: float, count: int = 0) -> Floats:
            if not count:
                return low + (high - low) * chance[:, next(numbers)]
            return low + (high - low) * chance[:, [next(numbers) for _ in range(count)]]

        zero = np.zeros(len(chance), np.float32)
        tone, warmth = between(110, 225), between(0.55, 0.9)
        skin = np.stack([tone, tone * (0.5 + 0.5 * warmth), tone * warmth * between(0.75, 1.0)], axis=1)
        hair, iris, lips = -between(30, 190, 3), -between(30, 170, 3), between(-70, 60, 3) - [0, 40, 30]
        spots: list[tuple[Floats, Floats, Floats, Floats, Floats]] = []

        def spot(x: Floats, y: Floats, wide: Floats, high: Floats, colour: Floats, lift: float = 0.0) -> None:
            # On an ellipsoid, but for what stands out of it.
            z = 0.55 * np.sqrt(np.maximum(0.05, 1 - np.square(x / 0.85) - np.square(y / 1.05))) + lift
            spots.append((np.stack([x, y, z], axis=1), wide, high, colour, zero))

        def both(x: Floats, y: Floats, wide: Floats, high: Floats, colour: Floats) -> None:
            spot(x, y, wide, high, colour)
            spot(-x, y, wide, high, colour)

        head_wide, head_high = between(0.62, 0.82), between(0.8, 1.0)
        spots.append((np.stack([zero, zero + 0.04, zero], axis=1), head_wide, head_high, skin, zero))
        apart, eye_y = between(0.24, 0.4), between(-0.28, -0.06)
        eye_wide, eye_high = between(0.09, 0.17), between(0.045, 0.1)
        both(apart, eye_y, eye_wide, eye_high, between(20, 80, 3))
        both(apart + between(-0.02, 0.02), eye_y, 0.5 * eye_wide, 1.1 * eye_high, iris)
        brow_y, tilt, brow_high = eye_y - between(0.12, 0.24), between(-0.06, 0.06), between(0.025, 0.07)
        both(apart - 0.08, brow_y + tilt, between(0.07, 0.14), brow_high, hair)
        both(apart + 0.08, brow_y - tilt, between(0.07, 0.14), brow_high, hair)
        nose_y, nose_wide = eye_y + between(0.28, 0.46), between(0.05, 0.12)
        bridge = between(10, 55, 3)
        spot(zero, 0.5 * (eye_y + nose_y), 0.6 * nose_wide, 0.5 * (nose_y - eye_y), bridge, 0.1)
        spot(zero, nose_y - 0.05, nose_wide, between(0.05, 0.1), bridge, 0.2)
        both(between(0.5, 0.9) * nose_wide, nose_y, 0.4 * nose_wide, between(0.02, 0.05), -between(30, 110, 3))
        mouth_y, mouth_wide = nose_y + between(0.16, 0.3), between(0.14, 0.32)
        spot(zero, mouth_y - 0.04, mouth_wide, between(0.03, 0.07), lips)
        spot(zero, mouth_y + 0.05, 0.85 * mouth_wide, between(0.03, 0.09), lips)
        spot(zero, mouth_y, 1.05 * mouth_wide, zero + 0.02, -between(20, 90, 3))
        both(
            between(0.3, 0.5), nose_y + between(-0.1, 0.1), between(0.1, 0.22), between(0.1, 0.22), between(-35, 35, 3)
        )
        spot(zero, mouth_y + between(0.2, 0.34), between(0.1, 0.3), between(0.06, 0.16), between(-70, 40, 3))
        spot(zero, zero - between(0.45, 0.6), between(0.2, 0.5), between(0.08, 0.2), between(-25, 35, 3))
        spot(between(-0.25, 0.25), zero - between(0.82, 1.1), between(0.5, 1.0), between(0.2, 0.42), hair)
        both(between(0.62, 0.85), between(-0.5, 0.1), between(0.1, 0.25), between(0.25, 0.8), hair)
        for _ in range(_MARKS):
            spot(between(-0.5, 0.5), between(-0.6, 0.7), between(0.03, 0.13), between(0.03, 0.13), between(-80, 70, 3))
        places = np.stack([place for place, *_ in spots], axis=1)
        return cls(
            x=places[..., 0],
            y=places[..., 1],
            z=places[..., 2],
            wide=np.stack([spot[1] for spot in spots], axis=1),
            high=np.stack([spot[2] for spot in spots], axis=1),
            colour=np.stack([spot[3] for spot in spots], axis=1).astype(np.float32),
            wave_x=between(-9, 9, _WAVES),
            wave_y=between(-9, 9, _WAVES),
            phase=between(0, 2 * np.pi, _WAVES),
            wave_colour=np.stack([between(-18, 18, 3) for _ in range(_WAVES)], axis=1),
        )


def _cover(images: Floats, chance: Floats, spot_y: Floats, share: float) -> None:
    """Cover a part of some images: the eyes, the mouth, or a bar anywhere."""
    height, width = images.shape[1:3]
    for index in np.flatnonzero(chance[:, 0] < share):
        kind, colour = int(3 * chance[index, 1]), 255 * chance[index, 2:5]
        if kind < 2:
            centre, half = (spot_y[index, 1], 0.13) if kind == 0 else (spot_y[index, 1] + 0.75, 0.32)
            top, bottom = ((1 + centre + side * half) * height / 2 for side in (-1, 1))
            left, right = 0.15 * width, 0.85 * width
        else:
            tall, broad = 0.15 + 0.3 * chance[index, 5:7]
            top, left = chance[index, 7] * (1 - tall) * height, chance[index, 8] * (1 - broad) * width
            bottom, right = top + tall * height, left + broad * width
        images[index, max(0, round(top)) : max(0, round(bottom)), round(left) : round(right)] = colour


@lru_cache(maxsize=2)
def _noise_bank(pixels: int) -> Floats:
    random = np.random.Generator(np.random.Philox(key=[5, 3]))
    return random.standard_normal(_NOISE + pixels, dtype=np.float32)
