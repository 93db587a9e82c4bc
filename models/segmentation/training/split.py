"""Training and validation pixels of a scene: blocks by position, and a guard between them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from ....tiler.analysis.axis_geometry import compute_geometry
from ....tiler.analysis.network import Network
from ....tiler.base.errors import UsageError
from ....tiler.base.geometry import Grid, Interval, Window

_PLASTIC = 1.32471795724474602596
"""The plastic number p, p^3 = p + 1: multiples of (1/p, 1/p^2) fill a square evenly (Roberts's R2 sequence)."""
_TRIED = 64
"""Offsets from which the one is chosen that leaves most classes on both sides."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSplit:
    """Which pixels of a scene validate: blocks whose place in an even sequence lies below the share.

    A block validates where frac(offset + row/p + column/p^2) < share: a pure function of seed and position, evenly
    spread, and very near the share in any part of the scene. Every pixel within `guard` of a validation block, along
    rows and along columns, is neither trained on nor validated.
    """

    share: float
    """Of blocks that validate, 0 to below 1."""
    block: int
    """Side of the blocks in pixels."""
    guard: int
    """Pixels; the network's reach, so that no training pixel's receptive field touches a validation block."""
    offset: float
    """0 to below 1: where the sequence begins."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"the share of validation must be 0 to below 1, got {self.share:g}")
        if self.block < 1 or self.guard < 0:
            raise UsageError(f"blocks must be >= 1 pixel and the guard >= 0, got {self.block} and {self.guard}")

    def validates(self, row: int, column: int) -> bool:
        """Whether the block at (row, column) validates."""
        return (self.offset + row / _PLASTIC + column / _PLASTIC**2) % 1.0 < self.share

    def find_validation(self, window: Window) -> Mask:
        """(height, width): True where a pixel of the window lies in a validation block."""
        return self._mark(window, 0)

    def find_training(self, window: Window) -> Mask:
        """(height, width): True where a pixel is farther from every validation block than the guard."""
        return ~self._mark(window, self.guard)

    def _mark(self, window: Window, margin: int) -> Mask:
        """True in validation blocks that were enlarged by a margin on all sides."""
        found = np.zeros(window.shape, np.bool_)
        if not self.share:
            return found
        for row in _touched(window.rows, margin, self.block):
            for column in _touched(window.columns, margin, self.block):
                if self.validates(row, column):
                    top, left = row * self.block - margin - window.y, column * self.block - margin - window.x
                    side = self.block + 2 * margin
                    found[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = True
        return found


def _touched(wanted: Interval, margin: int, block: int) -> range:
    """Blocks that, enlarged by the margin, touch an interval."""
    return range(max(0, (wanted.start - margin) // block), (wanted.stop + margin - 1) // block + 1)


def seed_offset(seed: int, scene: int, attempt: int = 0) -> float:
    """0 to below 1, evenly distributed over seeds, scenes and attempts."""
    digest = hashlib.sha256(f"split {seed} {scene} {attempt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def choose_split(
    counts: npt.NDArray[np.int64], *, share: float, block: int, guard: int, seed: int, scene: int
) -> BlockSplit:
    """The split of one scene: of offsets that follow from the seed, the first that leaves most classes on both sides.

    Args:
        counts: (rows, columns, classes) labelled pixels of each class in each block.
        scene: its place among the scenes.
    """
    labelled = np.argwhere(counts.any(2))
    found: list[tuple[int, float, int, BlockSplit]] = []
    for attempt in range(_TRIED):
        split = BlockSplit(share=share, block=block, guard=guard, offset=seed_offset(seed, scene, attempt))
        validating = np.array([split.validates(int(row), int(column)) for row, column in labelled], np.bool_)
        per_block = counts[labelled[:, 0], labelled[:, 1]]
        held, kept = per_block[validating].sum(0), per_block[~validating].sum(0)
        both = int(((held > 0) & (kept > 0)).sum())
        # Where labels are few, blocks of the share may hold far more of them, or fewer.
        unfair = abs(float(held.sum()) / max(1, int(counts.sum())) - share)
        found.append((-both, 0.0 if unfair < share / 2 else unfair, attempt, split))
    return min(found, key=lambda entry: entry[:3])[3]


def compute_reach(network: Network, shapes: Iterable[tuple[int, int]]) -> int:
    """Pixels between an output pixel and the farthest input pixel that it depends on, in any direction and at any place
    of scenes of these shapes, turned or not.

    Raises:
        UsageError: a network whose output is not on the scene's grid, or a scene that is too small for it.
    """
    if network.scale != (1, 1):
        raise UsageError(
            f"training needs a network with one output pixel for each input pixel, got a scale of {network.scale[0]} x "
            f"{network.scale[1]}; upsample its output inside it"
        )
    reach = 0
    for shape in {turned for height, width in shapes for turned in ((height, width), (width, height))}:
        tried = _shorten(network, shape)
        for axis, extent in zip(network.on_image(tried), tried, strict=True):
            for position in range(extent):
                seen = compute_geometry(axis, Interval(start=position, stop=position + 1)).window
                reach = max(reach, position - seen.start, seen.stop - 1 - position)
    return reach


def _shorten(network: Network, shape: tuple[int, int]) -> tuple[int, int]:
    """A shape whose pixels see as far as those of `shape`: where all that a network does moves with its stride, what
    lies between the edges repeats; where it depends on the image's size, as with aligned corners, `shape` itself."""
    if network.window_refusal:
        return shape
    halo = network.halo
    sides: list[int] = []
    for axis, (margin, extent) in enumerate(zip((halo.top + halo.bottom, halo.left + halo.right), shape, strict=True)):
        period = math.lcm(network.stride[axis], network.size_multiple)
        # Both edges with all that they change, and a period between them.
        enough = 2 * margin + 2 * period + network.smallest[axis]
        sides.append(extent - max(0, extent - enough) // period * period)
    return (sides[0], sides[1])


def choose_block(shapes: list[tuple[int, int]], guard: int) -> int:
    """Side of the blocks: 64 blocks in the smallest scene, but wide enough for their guards, and 32 to 1024 pixels."""
    side = math.sqrt(min(height * width for height, width in shapes) / 64)
    return int(min(1024, max(32, 2 * guard, side)))


def count_blocks(grid: Grid, split: BlockSplit) -> int:
    """Blocks of a scene that validate."""
    return sum(split.validates(row, column) for row, column in chain(grid))
