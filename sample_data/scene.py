"""A believable 4-band scene with dense labels, as a pure function of (seed, size, window).

Six classes share their colours on purpose: asphalt is also a roof, a garden is also a meadow and a green crop, a garden
tree is also forest, a building's shadow is also water, bare soil is also a brown roof. Only shape and
neighbourhood tell them apart, so a classifier that sees one pixel must fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..tiler.base.errors import UsageError
from ..tiler.base.geometry import Window
from .noise import Floats, fractal_noise, hash_unit, pixel_coordinates, value_noise, white_noise

BANDS = ("red", "green", "blue", "nir")
NODATA = 0
"""Value of all four bands in the nodata corner; valid pixels are 1..255."""
LABEL_NODATA = 255
CRS = "EPSG:32632"
PIXEL_METRES = 1.0
ORIGIN_XY = (640000.0, 5330000.0)

WATER, FOREST, CROPLAND, GRASS, BUILT_UP, ROAD = range(6)
CLASSES = ("water", "forest", "cropland", "grass", "built-up", "road")
COLOURS = ((38, 103, 178), (33, 102, 48), (230, 190, 80), (150, 200, 90), (200, 60, 60), (70, 70, 75))
"""RGB of each class in maps."""

# Colours (R, G, B, NIR) before texture, illumination and sensor noise.
_WATER = (34, 52, 66, 18)
_FOREST = (48, 76, 42, 122)
_MEADOW = (92, 122, 64, 152)
_ASPHALT = (122, 119, 116, 98)
_SOIL = (146, 116, 88, 104)
_SHADOW = (36, 44, 52, 26)
_CROPS = (_MEADOW, (174, 156, 96, 124), _SOIL, (112, 126, 72, 138))
_ROOFS = (_ASPHALT, _ASPHALT, (156, 92, 74, 106), _SOIL, (196, 194, 190, 168))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What determines every pixel of a sample scene."""

    height: int
    width: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.height <= 200_000 and 1 <= self.width <= 200_000):
            raise UsageError(f"a scene's sides must be 1..200000 pixels, got {self.height} x {self.width}")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"a scene's seed must be 0..2147483647, got {self.seed}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.height, self.width)


def _cells(position: Floats, period: float) -> tuple[npt.NDArray[np.int64], Floats]:
    """Number of the cell of length `period` that each position is in, and the distance from its start."""
    scaled = np.floor(position / np.float32(period))
    return scaled.astype(np.int64), position - scaled * np.float32(period)


def _paint(image: Floats, where: npt.NDArray[np.bool_], colour: tuple[int, ...]) -> None:
    for band, value in enumerate(colour):
        image[band][where] = value


def _paint_choice(
    image: Floats, where: npt.NDArray[np.bool_], choice: npt.NDArray[np.int64], palette: tuple[tuple[int, ...], ...]
) -> None:
    """Paint `where` with the palette entry that `choice` (same shape as the image plane) names."""
    table = np.asarray(palette, np.float32)
    picked = choice[where]
    for band in range(image.shape[0]):
        image[band][where] = table[picked, band]


def render_window(scene: Scene, window: Window) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Image (4, h, w) uint8 and labels (h, w) uint8 of a window.

    Guarantee: every pixel is a function of (scene, its own row and column), so any windows fit together without a seam.
    """
    if not Window.whole(scene.shape).contains(window):
        raise UsageError(f"window {window} is not inside the scene of {scene.height} x {scene.width}")
    seed = scene.seed * 1009 + 1
    rows, columns = pixel_coordinates(window)
    y, x = rows.astype(np.float32), columns.astype(np.float32)

    terrain = fractal_noise(seed + 1, window, 640, 4)
    river = np.abs(fractal_noise(seed + 2, window, 1100, 3) - np.float32(0.5))
    use = fractal_noise(seed + 3, window, 520, 3)
    wood = fractal_noise(seed + 4, window, 360, 4)
    fine = value_noise(seed + 5, window, 5)
    grain = white_noise(seed + 6, window)

    labels = np.full(window.shape, CROPLAND, np.uint8)
    image = np.empty((4, *window.shape), np.float32)

    # Parcels: slanted strips of fields, each strip with its own field length.
    along, across = x * np.float32(0.96) + y * np.float32(0.28), y * np.float32(0.96) - x * np.float32(0.28)
    strip, _ = _cells(across, 92)
    length = np.float32(70) + np.float32(130) * hash_unit(seed + 7, strip, strip * 0)
    field = np.floor(along / length).astype(np.int64)
    crop = (hash_unit(seed + 8, strip, field) * np.float32(len(_CROPS))).astype(np.int64)
    meadow = hash_unit(seed + 9, strip, field) < np.float32(0.3)
    everywhere = np.ones(window.shape, np.bool_)
    _paint_choice(image, everywhere, crop, _CROPS)
    # Rows of a crop: a 6-pixel triangle wave across the strip. Meadows are smooth.
    _, phase = _cells(across, 6)
    row_texture = np.abs(phase - np.float32(3)) * np.float32(9) - np.float32(13)
    texture = np.where(meadow, (fine - np.float32(0.5)) * np.float32(10), row_texture)
    labels[meadow] = GRASS
    _paint(image, meadow, _MEADOW)

    forest = wood > np.float32(0.56)
    labels[forest] = FOREST
    _paint(image, forest, _FOREST)
    texture = np.where(forest, (fine - np.float32(0.5)) * np.float32(64), texture)

    lake = terrain < np.float32(0.33)
    water = lake | (river < np.float32(0.011))

    # Settlements: blocks between streets, lots in blocks, a roof in most lots; all but the streets is built-up.
    town = (use > np.float32(0.6)) & ~water
    labels[town] = BUILT_UP
    _paint(image, town, _MEADOW)
    block_y, in_block_y = _cells(along, 118)
    block_x, in_block_x = _cells(across, 86)
    lot_y, in_lot_y = _cells(in_block_y - np.float32(9), 27)
    lot_x, in_lot_x = _cells(in_block_x - np.float32(9), 25)
    lot_id_y, lot_id_x = block_y * 8 + lot_y, block_x * 8 + lot_x
    draw = hash_unit(seed + 10, lot_id_y, lot_id_x)
    roof_length = np.float32(11) + np.float32(11) * hash_unit(seed + 11, lot_id_y, lot_id_x)
    roof_width = np.float32(9) + np.float32(10) * hash_unit(seed + 12, lot_id_y, lot_id_x)
    has_roof = town & (draw < np.float32(0.82))
    roof = has_roof & (in_lot_y >= 3) & (in_lot_y < 3 + roof_length) & (in_lot_x >= 3) & (in_lot_x < 3 + roof_width)
    shadow = (
        has_roof
        & ~roof
        & (in_lot_y >= 5)
        & (in_lot_y < 6 + roof_length)
        & (in_lot_x >= 5)
        & (in_lot_x < 6 + roof_width)
    )
    garden_tree = town & (value_noise(seed + 13, window, 11) > np.float32(0.66))
    _paint(image, garden_tree, _FOREST)
    texture = np.where(town, (fine - np.float32(0.5)) * np.float32(12), texture)
    texture = np.where(garden_tree, (fine - np.float32(0.5)) * np.float32(64), texture)
    _paint(image, shadow, _SHADOW)
    roof_kind = (hash_unit(seed + 14, lot_id_y, lot_id_x) * np.float32(len(_ROOFS))).astype(np.int64)
    _paint_choice(image, roof, roof_kind, _ROOFS)
    texture = np.where(roof | shadow, np.float32(0), texture)

    labels[water] = WATER
    _paint(image, water, _WATER)
    texture = np.where(water, (fine - np.float32(0.5)) * np.float32(4), texture)

    # Roads: the settlements' streets, and country roads along a warped grid, on bridges over rivers but not over lakes.
    street = town & ((in_block_y < 7) | (in_block_x < 7))
    bend = np.float32(150)
    _, from_row = _cells(y + bend * value_noise(seed + 15, window, 310), 430)
    _, from_column = _cells(x + bend * value_noise(seed + 16, window, 290), 510)
    road = street | (~lake & ((from_row < 8) | (from_column < 8)))
    labels[road] = ROAD
    _paint(image, road, _ASPHALT)
    texture = np.where(road, np.float32(0), texture)

    # Paved surfaces, roofs and roads alike, vary over tens of pixels: wear, and nothing that tells the two apart.
    wear = (value_noise(seed + 17, window, 24) - np.float32(0.5)) * np.float32(34)
    texture = np.where(roof | road, texture + wear, texture)
    light = np.float32(0.88) + np.float32(0.24) * value_noise(seed + 18, window, 900)
    noise = (grain - np.float32(0.5)) * np.float32(11)
    image += texture[None]
    image *= light[None]
    image += noise[None]
    pixels = np.clip(np.rint(image), 1, 255).astype(np.uint8)

    # The corner that a swath did not cover.
    missing = x + y * np.float32(0.4) < np.float32(0.07 * scene.width)
    pixels[:, missing] = NODATA
    labels[missing] = LABEL_NODATA
    return pixels, labels
