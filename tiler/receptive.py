"""Receptive fields as exact interval arithmetic: which input pixels an output interval needs, axis by axis.

Positions are global and unclamped: an interval may reach outside the image, where the operation pads. A rule is a pure
function of the wanted interval; a graph of rules is swept backwards from the output to the input. Translation by the
stride is exact, so that the same rules serve every tile of an image of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Protocol

from .geometry import Interval


class AxisRule(Protocol):
    """What one operation needs of one operand along one axis."""

    @property
    def ratio(self) -> Fraction:
        """Output pixels for each input pixel."""
        ...

    def needs(self, wanted: Interval) -> Interval:
        """The smallest input interval from which every pixel of the non-empty `wanted` follows."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """A pixel needs the same pixel: pointwise operations, joins, eval batch norm."""

    @property
    def ratio(self) -> Fraction:
        return Fraction(1)

    def needs(self, wanted: Interval) -> Interval:
        return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """A sliding window: convolution and pooling. Output i needs [i*stride - padding, ... + extent)."""

    extent: int
    """dilation * (kernel - 1) + 1, in input pixels."""
    stride: int
    padding: int
    """Before the first pixel."""
    beyond: int = 0
    """As of Shift: input pixels after the last needed one that must exist."""

    @property
    def ratio(self) -> Fraction:
        return Fraction(1, self.stride)

    def needs(self, wanted: Interval) -> Interval:
        return Interval(
            start=wanted.start * self.stride - self.padding,
            stop=(wanted.stop - 1) * self.stride - self.padding + self.extent + self.beyond,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnlargeNearest:
    """Nearest upsampling by an integer: output i needs pixel i // factor."""

    factor: int

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.factor)

    def needs(self, wanted: Interval) -> Interval:
        return Interval(start=wanted.start // self.factor, stop=(wanted.stop - 1) // self.factor + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnlargeBilinear:
    """Bilinear upsampling by an integer (align_corners=False): i needs floor((i + 1/2)/factor - 1/2) and the next."""

    factor: int

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.factor)

    def _floor(self, position: int) -> int:
        return (2 * position + 1 - self.factor) // (2 * self.factor)

    def needs(self, wanted: Interval) -> Interval:
        return Interval(start=self._floor(wanted.start), stop=self._floor(wanted.stop - 1) + 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """Cropping and constant padding: output i is input i + offset.

    `beyond` pixels after the last wanted one must exist too, because the operation cuts that many off the end of
    whatever it is given: without them a window's own end would be cut where the image's is not.
    """

    offset: int
    beyond: int = 0

    @property
    def ratio(self) -> Fraction:
        return Fraction(1)

    def needs(self, wanted: Interval) -> Interval:
        return Interval(start=wanted.start + self.offset, stop=wanted.stop + self.offset + self.beyond)


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisNode:
    """One tensor of the graph, along one axis."""

    name: str
    scale: Fraction
    """Pixels of this node for each pixel of the network's input."""
    sources: tuple[tuple[int, AxisRule], ...]
    """(position of an operand in the graph, what is needed of it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisGraph:
    """The network along one axis: node 0 is the input, the last node the output, operands before their consumers."""

    nodes: tuple[AxisNode, ...]

    @property
    def scale(self) -> Fraction:
        """Output pixels for each input pixel."""
        return self.nodes[-1].scale

    @property
    def stride(self) -> int:
        """Input pixels by which the image may be moved so that every node moves by whole pixels."""
        return lcm(*(node.scale.denominator for node in self.nodes))

    def intervals(self, wanted: Interval) -> list[Interval | None]:
        """For each node what `wanted` of the output needs of it: the hull over its consumers; None where nothing."""
        needed: list[Interval | None] = [None] * len(self.nodes)
        needed[-1] = wanted
        for position in range(len(self.nodes) - 1, 0, -1):
            mine = needed[position]
            if mine is None:
                continue
            for source, rule in self.nodes[position].sources:
                needed[source] = _hull((needed[source], rule.needs(mine)))
        return needed

    def input_interval(self, wanted: Interval) -> Interval:
        """Input pixels that a window must hold so that `wanted` comes out of it as out of the whole image.

        These are the needed pixels of the input, and the pixels under every needed pixel of every other node: a pixel
        of a node exists in a window's own computation only if the window reaches as far as the pixel does.
        """
        hull = footprint(wanted, self.scale)
        for node, needed in zip(self.nodes, self.intervals(wanted), strict=True):
            if needed is not None:
                under = footprint(needed, node.scale)
                hull = Interval(start=min(hull.start, under.start), stop=max(hull.stop, under.stop))
        return hull

    def halo(self) -> tuple[int, int]:
        """(before, after): input pixels needed beyond a core that starts and ends on the stride."""
        core_input = Interval(start=0, stop=self.stride * self.scale.denominator)
        core_output = Interval(start=0, stop=int(core_input.stop * self.scale))
        needed = self.input_interval(core_output)
        return (core_input.start - needed.start, needed.stop - core_input.stop)


def footprint(wanted: Interval, scale: Fraction) -> Interval:
    """The input pixels that lie under `wanted` output pixels of a network of that scale."""
    return Interval(start=wanted.start // scale, stop=-((-wanted.stop) // scale))


def _hull(intervals: Iterable[Interval | None]) -> Interval | None:
    present: Sequence[Interval] = [interval for interval in intervals if interval is not None]
    if not present:
        return None
    return Interval(start=min(i.start for i in present), stop=max(i.stop for i in present))
