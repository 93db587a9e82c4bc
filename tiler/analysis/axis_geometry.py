"""What programs compute along one axis: of each tensor the interval that a core needs, and the taps of resampling.

Plain arithmetic without torch, so that workers can do it too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.geometry import Interval
from .receptive import (
    AxisGraph,
    AxisRule,
    EnlargeBicubic,
    EnlargeBilinear,
    EnlargeNearest,
    Extents,
    Mirror,
    Resample,
    Shift,
    Slide,
    Spread,
    compute_taps,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAxis:
    """The network along one axis of an image of known extent."""

    graph: AxisGraph
    """Its rules are those for this extent: none depends on the image's size any more."""
    image: int
    """Extent of the (padded) image."""
    sizes: tuple[int, ...]
    """Of each tensor on the whole image."""

    def extents(self, position: int, source: int) -> Extents:
        return Extents(image=self.image, operand=self.sizes[source], result=self.sizes[position])


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """How one resampling mixes the pixels that it reads, along one axis."""

    position: int
    """Of the tensor in the graph."""
    indices: npt.NDArray[np.int64]
    """(taps, wanted pixels), counted from the first pixel that is read."""
    weights: npt.NDArray[Any] | None
    """(taps, wanted pixels); None for one tap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisGeometry:
    """Which pixels of every tensor a core's rows, or columns, are computed from."""

    axis: ImageAxis
    intervals: tuple[Interval | None, ...]
    """Computed of each tensor, clamped to it; None: nothing. The last entry is the core."""

    @property
    def window(self) -> Interval:
        """The image's pixels that are read."""
        found = self.intervals[0]
        return found if found is not None else Interval(start=0, stop=0)

    def taps(self) -> list[Taps]:
        """Of every resampling that gathers, in the graph's order: the program's inputs beside the image."""
        found: list[Taps] = []
        for position, (node, mine) in enumerate(zip(self.axis.graph.nodes, self.intervals, strict=True)):
            if mine is None or not mine.length:
                continue
            for source, rule in node.sources:
                if isinstance(rule, Resample) and block_factor(rule) is None:
                    extents = self.axis.extents(position, source)
                    indices, weights = compute_taps(rule, mine, extents)
                    found.append(Taps(position=position, indices=indices - indices.min(), weights=weights))
        return found


def compute_geometry(axis: ImageAxis, core: Interval) -> AxisGeometry:
    """Sweep a core's rows or columns backwards to the image."""
    nodes = axis.graph.nodes
    needed: list[Interval | None] = [None] * len(nodes)
    needed[-1] = core
    for position in range(len(nodes) - 1, 0, -1):
        mine = needed[position]
        if mine is None or mine.length == 0:
            continue
        for source, rule in nodes[position].sources:
            read = rule.reads(mine, axis.extents(position, source))
            have = needed[source]
            if have is None or have.length == 0:
                needed[source] = read
            elif read.length:
                needed[source] = Interval(start=min(have.start, read.start), stop=max(have.stop, read.stop))
    return AxisGeometry(axis=axis, intervals=tuple(needed))


def tap_arrays(geometry: AxisGeometry) -> list[npt.NDArray[Any]]:
    """Indices and weights of every resampling that gathers: what a program takes beside the image."""
    return [array for taps in geometry.taps() for array in (taps.indices, taps.weights) if array is not None]


def geometry_key(geometry: AxisGeometry) -> str:
    """Equal for cores that one program serves: lengths, crops and true-edge padding agree. Taps may differ: they are
    inputs."""
    digest = hashlib.sha256()
    axis = geometry.axis
    for position, (node, mine) in enumerate(zip(axis.graph.nodes, geometry.intervals, strict=True)):
        if mine is None or not mine.length:
            digest.update(b"-")
            continue
        digest.update(f"{mine.length};".encode())
        for source, rule in node.sources:
            extents = axis.extents(position, source)
            read, have = rule.reads(mine, extents), geometry.intervals[source]
            offset = read.start - have.start if have is not None else 0
            digest.update(f"{offset},{read.length},{_placement(rule, mine, read, extents)};".encode())
    return digest.hexdigest()[:16]


def beyond(under: Interval, read: Interval) -> tuple[int, int]:
    """How far the wanted windows reach beyond the operand's edges: padding before and after."""
    if read.length == 0:
        return (under.length, 0)
    return (read.start - under.start, under.stop - read.stop)


def block_factor(rule: AxisRule) -> int | None:
    """By how much a resampling enlarges where whole pixels can be enlarged wherever they lie; None: it must gather.

    torch's index is i // factor at all positions only for some factors; its weights repeat exactly only where they
    are dyadic, or rounded so finely that it does not show.
    """
    if isinstance(rule, EnlargeNearest):
        return rule.factor
    if not isinstance(rule, Resample):
        return None
    if isinstance(rule.window, EnlargeNearest):
        return rule.window.factor
    if isinstance(rule.window, (EnlargeBilinear, EnlargeBicubic)):
        factor = rule.window.factor
        return factor if rule.double or log2(factor).is_integer() else None
    return None


def _placement(rule: AxisRule, mine: Interval, read: Interval, extents: Extents) -> Any:
    """How the wanted pixels lie to those read: padding at true edges, phases."""
    if isinstance(rule, (Slide, Shift)):
        return beyond(rule.under(mine), read)
    if isinstance(rule, Spread):
        return mine.start - (read.start * rule.stride - rule.padding)
    if isinstance(rule, Mirror):
        return (rule.indices(mine, extents) - read.start).tobytes()
    factor = block_factor(rule)
    return mine.start - read.start * factor if factor is not None else 0
