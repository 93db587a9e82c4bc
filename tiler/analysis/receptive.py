"""Receptive fields as exact interval arithmetic: which input pixels an output interval needs, axis by axis.

Positions are global and unclamped: an interval may reach outside the image, where the operation pads. A rule is a pure
function of the wanted interval; a graph of rules is swept backwards from the output to the input. Translation by the
stride is exact, so that the same rules serve every tile of an image of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..base.geometry import Interval, footprint

if TYPE_CHECKING:
    import sympy

ResampleMode = Literal["nearest", "nearest-exact", "bilinear", "bicubic"]
MirrorMode = Literal["reflect", "replicate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extents:
    """How long things are along one axis of one image."""

    image: int
    operand: int
    result: int


class AxisRule(Protocol):
    """What one operation needs of one operand along one axis."""

    @property
    def ratio(self) -> Fraction:
        """Output pixels for each input pixel."""
        ...

    def needs(self, wanted: Interval) -> Interval:
        """For window runs: an input interval from which every pixel of the non-empty `wanted` follows, unclamped."""
        ...

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        """For programs: the pixels of the operand that `wanted` is computed from; what lies beyond them is padding."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """A pixel needs the same pixel: pointwise operations, joins, eval batch norm."""

    @property
    def ratio(self) -> Fraction:
        return Fraction(1)

    def needs(self, wanted: Interval) -> Interval:
        return wanted

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        return wanted.clamp(extents.operand)


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

    def under(self, wanted: Interval) -> Interval:
        """The windows of `wanted`, padding included."""
        return Interval(
            start=wanted.start * self.stride - self.padding,
            stop=(wanted.stop - 1) * self.stride - self.padding + self.extent,
        )

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        return self.under(wanted).clamp(extents.operand)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Transposed convolution: input j adds to outputs [j*stride - padding, ... + extent)."""

    extent: int
    """dilation * (kernel - 1) + 1, in output pixels."""
    stride: int
    padding: int
    beyond: int = 0
    """As of Shift: input pixels after the last needed one that must exist."""

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.stride)

    def needs(self, wanted: Interval) -> Interval:
        start = -((self.extent - 1 - self.padding - wanted.start) // self.stride)
        stop = (wanted.stop - 1 + self.padding) // self.stride + 1
        # Between inputs that lie further apart than the kernel reaches, an output may need none.
        return Interval(start=min(start, stop), stop=stop + self.beyond)

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        needed = self.needs(wanted)
        return Interval(start=needed.start, stop=max(needed.start, needed.stop - self.beyond)).clamp(extents.operand)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnlargeNearest:
    """Nearest upsampling by an integer: output i needs pixel i // factor."""

    factor: int

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.factor)

    def needs(self, wanted: Interval) -> Interval:
        return Interval(start=wanted.start // self.factor, stop=(wanted.stop - 1) // self.factor + 1)

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        return self.needs(wanted).clamp(extents.operand)


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

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        return self.needs(wanted).clamp(extents.operand)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnlargeBicubic:
    """Bicubic upsampling by an integer (align_corners=False): as bilinear, and one pixel more on both sides."""

    factor: int

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.factor)

    def needs(self, wanted: Interval) -> Interval:
        linear = EnlargeBilinear(factor=self.factor).needs(wanted)
        return Interval(start=linear.start - 1, stop=linear.stop + 1)

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        return self.needs(wanted).clamp(extents.operand)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resample:
    """Interpolation to another size: result i mixes the operand's pixels as `taps` says, in torch's own arithmetic."""

    mode: ResampleMode
    align_corners: bool
    factor: float | None
    """As given to torch; None: result's over operand's size."""
    double: bool
    """Coordinates in float64, as torch computes them for float64 pixels."""
    growth: Fraction
    """Result's pixels for each pixel of the operand, in the limit of large images."""
    window: AxisRule | None
    """The rule for window runs; None: a pixel's weights depend on the image's size, so that windows cannot be exact."""
    direct: bool = False
    """Of nearest modes: by torch's kernel for channels-last tensors and small results, which rounds otherwise than its
    kernel for all else."""

    @property
    def ratio(self) -> Fraction:
        return self.growth

    def needs(self, wanted: Interval) -> Interval:
        assert self.window is not None
        return self.window.needs(wanted)

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        indices, _ = compute_taps(self, wanted, extents)
        return Interval(start=int(indices.min()), stop=int(indices.max()) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Cropping, padding and striding from a start that depends on the image's size; for programs only."""

    start: sympy.Expr
    symbol: sympy.Symbol
    growth: Fraction
    """Result's pixels for each pixel of the operand, in the limit of large images."""
    step: int = 1

    @property
    def ratio(self) -> Fraction:
        return self.growth

    def needs(self, wanted: Interval) -> Interval:
        raise NotImplementedError

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        raise NotImplementedError  # Network.on_image puts a Slide in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """Padding by the image's own pixels, reflected or repeated: output i is input i + offset, or one within `reach`."""

    offset: int
    mode: MirrorMode
    reach: int
    """How far from i + offset the pixel lies that stands in for one beyond the edge, at most."""
    beyond: int = 0
    """As of Shift."""

    @property
    def ratio(self) -> Fraction:
        return Fraction(1)

    def needs(self, wanted: Interval) -> Interval:
        return Interval(
            start=wanted.start + self.offset - self.reach,
            stop=wanted.stop + self.offset + max(self.reach, self.beyond),
        )

    def indices(self, wanted: Interval, extents: Extents) -> npt.NDArray[np.int64]:
        """The operand's pixel for each wanted one."""
        position = np.arange(wanted.start, wanted.stop) + self.offset
        last = extents.operand - 1
        if self.mode == "replicate":
            return position.clip(0, last)
        position = np.abs(position)
        return np.where(position > last, 2 * last - position, position)

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        indices = self.indices(wanted, extents)
        return Interval(start=int(indices.min()), stop=int(indices.max()) + 1)


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

    def under(self, wanted: Interval) -> Interval:
        """The operand's pixels of `wanted`, those beyond its edges included."""
        return Interval(start=wanted.start + self.offset, stop=wanted.stop + self.offset)

    def reads(self, wanted: Interval, extents: Extents) -> Interval:
        return self.under(wanted).clamp(extents.operand)


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
            if mine is None or not mine.length:  # between inputs of a transposed convolution that lie far apart
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


@lru_cache(maxsize=256)
def compute_taps(
    rule: Resample, wanted: Interval, extents: Extents
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any] | None]:
    """(indices, weights), both (taps, wanted pixels): the operand's pixels that each result pixel mixes, and how.

    torch's own arithmetic, roundings included (aten/src/ATen/native/UpSample.h and cpu/UpSampleKernel.cpp). Weights are
    None for one tap.
    """
    if rule.mode.startswith("nearest"):
        return _nearest(rule, wanted, extents)[None], None
    real = np.float64 if rule.double else np.float32
    last = extents.operand - 1
    position = np.arange(wanted.start, wanted.stop)
    if rule.align_corners:
        scale = real(last) / real(extents.result - 1) if extents.result > 1 else real(0)
        source = scale * position.astype(real)
    else:
        # torch divides in double and then rounds.
        scale = real(1.0 / rule.factor) if rule.factor else real(extents.operand) / real(extents.result)
        source = scale * (position.astype(real) + real(0.5)) - real(0.5)
    if rule.mode == "bilinear":
        source = np.maximum(source, real(0))
        first = np.minimum(np.floor(source).astype(np.int64), last)
        weight = np.clip(source - first.astype(real), real(0), real(1))
        return np.stack([first, np.minimum(first + 1, last)]), np.stack([real(1) - weight, weight])
    first = np.floor(source).astype(np.int64)
    t = source - first.astype(real)
    return np.stack([np.clip(first + k, 0, last) for k in (-1, 0, 1, 2)]), _cubic_weights(t)


def _nearest(rule: Resample, wanted: Interval, extents: Extents) -> npt.NDArray[np.int64]:
    """The operand's pixel of each wanted one, by either of torch's kernels."""
    position = np.arange(wanted.start, wanted.stop)
    real = np.float64 if rule.double and not rule.direct else np.float32
    scale = real(1.0 / rule.factor) if rule.factor else real(extents.operand) / real(extents.result)
    if rule.mode == "nearest":
        if rule.direct and extents.result in (extents.operand, 2 * extents.operand):
            return position // (extents.result // extents.operand)
        source = position.astype(real) * scale
    elif rule.direct:
        source = (position.astype(real) + real(0.5)) * scale
    else:
        # scale * (position + 1/2) - 1/2 is one fused operation there: rounded once, as from float64 here.
        fused = (np.float64(scale) * (position + 0.5) - 0.5).astype(real)
        source = fused + real(0.5)
    return np.minimum(np.floor(source.astype(np.float32)).astype(np.int64), extents.operand - 1)


def _cubic_weights(t: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Keys' cubic convolution with a = -0.75, for the pixels at -1, 0, 1 and 2 from the source's floor."""
    a = t.dtype.type(-0.75)

    def near(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])


def _hull(intervals: Iterable[Interval | None]) -> Interval | None:
    present: Sequence[Interval] = [interval for interval in intervals if interval is not None]
    if not present:
        return None
    return Interval(start=min(i.start for i in present), stop=max(i.stop for i in present))
