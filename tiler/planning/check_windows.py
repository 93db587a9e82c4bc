"""Windows of the start check: patches of cores, and larger windows around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base.geometry import Interval, Window

if TYPE_CHECKING:
    from ..analysis.network import Network
    from .plan import TilePlan


PATCH = 64
"""Side of a compared patch, in output pixels; patches lie at the corners of cores, where a short halo shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPatch:
    """A part of a core that is computed twice."""

    row: int
    column: int
    window: Window
    """In output pixels, inside the core of tile (row, column)."""


def sample_patches(plan: TilePlan, attempt: int = 0) -> list[CheckPatch]:
    """Top-left and bottom-right corner of the first, the middle and the last tile; at later attempts of others."""
    rows, columns = plan.grid.counts
    tiles = dict.fromkeys([(0, 0), (rows // 2, columns // 2), (rows - 1, columns - 1)])
    if attempt:
        # Golden-ratio steps: spread evenly, never the same again soon.
        picks = range(3 * attempt, 3 * attempt + 3)
        tiles = dict.fromkeys((int(rows * (i * 0.618034 % 1)), int(columns * (i * 0.754878 % 1))) for i in picks)
    patches: list[CheckPatch] = []
    for row, column in tiles:
        core = plan.tile(row, column).core
        height, width = min(PATCH, core.height), min(PATCH, core.width)
        corners = dict.fromkeys([(core.y, core.x), (core.y + core.height - height, core.x + core.width - width)])
        patches.extend(
            CheckPatch(row=row, column=column, window=Window(y=y, x=x, height=height, width=width)) for y, x in corners
        )
    return patches


def larger_window(network: Network, patch: Window, shape_yx: tuple[int, int], margin: int) -> Window:
    """An input window for `patch` that reaches at least `margin` px further than it must, on every side."""
    needed, padded = network.input_window(patch, shape_yx), network.padded_shape(shape_yx)
    intervals: list[Interval] = []
    for axis, interval in enumerate((needed.rows, needed.columns)):
        wider = Interval(start=interval.start - margin, stop=interval.stop + margin)
        intervals.append(network.align(axis, wider.clamp(padded[axis]), padded[axis]))
    return Window.from_intervals(*intervals)


def larger_core(network: Network, patch: Window, shape_yx: tuple[int, int], margin: int) -> Window:
    """A core around `patch` that reaches `margin` input px further, on every side."""
    intervals: list[Interval] = []
    for axis, (interval, size) in enumerate(
        zip((patch.rows, patch.columns), network.output_shape(shape_yx), strict=True)
    ):
        reach = int(margin * network.scale[axis]) + 1
        intervals.append(Interval(start=interval.start - reach, stop=interval.stop + reach).clamp(size))
    return Window.from_intervals(*intervals)
