"""Default colours of classes."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]

# Okabe and Ito's palette, told apart with any colour vision; without black, which nodata looks like.
_FIRST = (0xE69F00, 0x56B4E9, 0x009E73, 0xF0E442, 0x0072B2, 0xD55E00, 0xCC79A7)
_LATTICE = (0, 36, 73, 109, 146, 182, 219, 255)
_MOST = 255
"""As many as a class map can have classes."""


def _oklab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """OKLab of sRGB 0..255, in which equal distances look about equally different (Ottosson 2020)."""
    signal = rgb / 255
    linear = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    to_cone = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cone.T) @ to_lab.T


@cache
def _colours() -> tuple[Colour, ...]:
    lattice = np.stack(np.meshgrid(_LATTICE, _LATTICE, _LATTICE, indexing="ij"), axis=-1).reshape(-1, 3)
    # Black and white are for nodata and paper.
    lattice = lattice[1:-1]
    first = np.array([[value >> 16, value >> 8 & 255, value & 255] for value in _FIRST])
    candidates = np.concatenate([first, lattice]).astype(np.float64)
    lab = _oklab(candidates)
    nearest = np.full(len(candidates), np.inf)
    order: list[int] = []
    while len(order) < _MOST:
        chosen = len(order) if len(order) < len(_FIRST) else int(nearest.argmax())
        order.append(chosen)
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[chosen], axis=1))
    return tuple((int(r), int(g), int(b)) for r, g, b in candidates[order])


def default_colour(index: int) -> Colour:
    """RGB of class `index`: seven known to be told apart, then always the colour farthest from all before it."""
    return _colours()[index % _MOST]
