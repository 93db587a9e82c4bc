"""Deterministic noise: random numbers that are a pure function of (seed, global coordinates)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..tiler.base.geometry import Interval, Window

Floats = npt.NDArray[np.floating[Any]]
"""float32 throughout; numpy's stubs do not follow."""


def hash_unit(seed: int, iy: npt.NDArray[np.int64], ix: npt.NDArray[np.int64]) -> Floats:
    """Uniform numbers in [0, 1), one for each pair of integer coordinates (broadcast).

    Only 32-bit integer arithmetic and one exact scaling, so that every machine gives the same bits.
    Mixing: the finaliser of MurmurHash3 (Appleby, public domain) over a linear combination of the coordinates.
    """
    with np.errstate(over="ignore"):
        h = iy.astype(np.uint32) * np.uint32(0x85EBCA77) + ix.astype(np.uint32) * np.uint32(0x9E3779B1)
        h = h ^ np.uint32((seed * 0x27D4EB2F) & 0xFFFFFFFF)
        h ^= h >> np.uint32(16)
        h *= np.uint32(0x85EBCA6B)
        h ^= h >> np.uint32(13)
        h *= np.uint32(0xC2B2AE35)
        h ^= h >> np.uint32(16)
    # 24 bits fit float32 exactly, so the product is exact.
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def white_noise(seed: int, window: Window) -> Floats:
    """(height, width) independent uniform numbers in [0, 1), one a pixel."""
    return hash_unit(seed, *pixel_coordinates(window))


def pixel_coordinates(window: Window) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Global row (height, 1) and column (1, width) numbers of the window's pixels."""
    y = np.arange(window.y, window.y + window.height, dtype=np.int64)[:, None]
    x = np.arange(window.x, window.x + window.width, dtype=np.int64)[None, :]
    return y, x


def _lattice_weights(axis: Interval, period: int) -> tuple[npt.NDArray[np.int64], Floats]:
    position = np.arange(axis.start, axis.stop, dtype=np.int64)
    cell = position // period
    t = ((position - cell * period).astype(np.float32) + np.float32(0.5)) / np.float32(period)
    return cell, t * t * (np.float32(3) - np.float32(2) * t)


def value_noise(seed: int, window: Window, period: int) -> Floats:
    """(height, width) smooth noise in [0, 1]: random lattice values every `period` pixels, smoothstep between.

    Rows are blended first, then columns, element by element: a window's values do not depend on its extent.
    """
    rows, ty = _lattice_weights(window.rows, period)
    columns, tx = _lattice_weights(window.columns, period)
    iy = np.arange(rows[0], rows[-1] + 2, dtype=np.int64)[:, None]
    ix = np.arange(columns[0], columns[-1] + 2, dtype=np.int64)[None, :]
    lattice = hash_unit(seed, iy, ix)
    top, below = lattice[rows - rows[0]], lattice[rows - rows[0] + 1]
    blended = top + (below - top) * ty[:, None]
    left, right = blended[:, columns - columns[0]], blended[:, columns - columns[0] + 1]
    return left + (right - left) * tx[None, :]


def fractal_noise(seed: int, window: Window, period: int, octaves: int) -> Floats:
    """(height, width) noise in [0, 1]: `octaves` layers of value noise, each of half the period and half the weight."""
    total = np.zeros(window.shape, np.float32)
    weight, weights = np.float32(1), np.float32(0)
    for octave in range(octaves):
        total += weight * value_noise(seed + 7919 * octave, window, max(1, period >> octave))
        weights += weight
        weight *= np.float32(0.5)
    return total / weights
