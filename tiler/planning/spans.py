"""The tiles along one axis: cores, and the windows or programs that each needs."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from ..analysis.axis_geometry import AxisGeometry, compute_geometry, geometry_key
from ..analysis.network import Network
from ..base.geometry import Halo, Interval, align_up
from ..base.tile import Span


def compute_spans(
    network: Network, axis: int, raster_shape_yx: tuple[int, int], core: int, wanted: Interval | None = None
) -> tuple[Span, ...]:
    """The tiles along one axis that cover `wanted` result pixels (None: all).

    Windows at the first edge are extended to the length of an inner one: some pixels more to compute, one shape fewer.
    """
    extent = network.padded_shape(raster_shape_yx)[axis]
    wanted = wanted or Interval(start=0, stop=network.output_shape(raster_shape_yx)[axis])
    spans: list[Span] = []
    for start in range(wanted.start, wanted.stop, core):
        part = Interval(start=start, stop=min(start + core, wanted.stop))
        needed = network.needed_interval(axis, part).clamp(extent)
        window = network.align(axis, needed, extent)
        # Ended on the stride too, every level of the network has whole pixels, and enlarged tensors need no crop.
        stop = min(align_up(window.stop, lcm(network.stride[axis], network.size_multiple)), extent)
        spans.append(Span(core=(part.start, part.stop), window=(window.start, stop)))
    longest = max(span.window[1] - span.window[0] for span in spans)
    return tuple(
        Span(core=span.core, window=(0, min(longest, extent))) if span.window[0] == 0 else span for span in spans
    )


def is_uneven(span: Span, extent: int, period: int) -> bool:
    """Whether a tile reads up to the image's end, which lies off the network's period there."""
    return span.window[1] == extent and extent % period != 0


Geometries = dict[str, AxisGeometry]
"""Of programs along one axis, by the kind of span that they serve."""


def compute_program_spans(
    network: Network, axis: int, raster_shape_yx: tuple[int, int], core: int, wanted: Interval
) -> tuple[tuple[Span, ...], Geometries]:
    """The tiles along one axis, each with the pixels that its program reads."""
    on_image = network.on_image(raster_shape_yx)[axis]
    spans: list[Span] = []
    geometries: Geometries = {}
    for start in range(wanted.start, wanted.stop, core):
        part = Interval(start=start, stop=min(start + core, wanted.stop))
        geometry = compute_geometry(on_image, part)
        window = geometry.window
        key = geometry_key(geometry)
        geometries.setdefault(key, geometry)
        spans.append(Span(core=(part.start, part.stop), window=(window.start, window.stop), kind=key))
    return tuple(spans), geometries


def span_halo(network: Network, rows: Sequence[Span], columns: Sequence[Span]) -> Halo:
    """Pixels that programs read beyond their cores, at most, on each side."""
    sides: list[int] = []
    for spans, scale in zip((rows, columns), network.scale, strict=True):
        sides.append(max(0, *(int(span.core[0] / scale // 1) - span.window[0] for span in spans)))
        sides.append(max(0, *(span.window[1] - int(-(-span.core[1] / scale // 1)) for span in spans)))
    return Halo(top=sides[0], bottom=sides[1], left=sides[2], right=sides[3])
