"""The work of a plan in floating-point operations, and the bytes that are live during one tile of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from ..analysis.axis_geometry import compute_geometry
from ..analysis.cost import count_flops, count_output_bytes, count_peak_bytes, image_shapes, program_shapes
from ..analysis.network import Network
from ..base.choices import Method
from ..base.geometry import Window, align_up
from ..base.tile import Span, Tile
from .spans import Geometries, is_uneven


def count_program_flops(
    network: Network, rows: Sequence[Span], columns: Sequence[Span], by_row: Geometries, by_column: Geometries
) -> int:
    """Of all tiles; where every tile has a program of its own, those of the longest spans stand for the others."""
    graph, pixels = network.graph, network.pixels
    if len(by_row) * len(by_column) > 64:
        row, column = (max(found.values(), key=lambda g: g.window.length) for found in (by_row, by_column))
        return len(rows) * len(columns) * count_flops(graph, program_shapes(graph, pixels, row, column))
    counts = [[span.kind for span in spans] for spans in (rows, columns)]
    return sum(
        counts[0].count(r) * counts[1].count(c) * count_flops(graph, program_shapes(graph, pixels, row, column))
        for r, row in by_row.items()
        for c, column in by_column.items()
    )


def count_window_flops(network: Network, rows: Sequence[Span], columns: Sequence[Span]) -> int:
    """Of all tiles, by windows."""
    total = 0
    heights, widths = ([s.window[1] - s.window[0] for s in spans] for spans in (rows, columns))
    for height in set(heights):
        for width in set(widths):
            total += heights.count(height) * widths.count(width) * network.count_flops((height, width))
    return total


def count_program_bytes(network: Network, shape_yx: tuple[int, int], core: Window) -> int:
    """Live bytes of the program of one core."""
    rows, columns = (
        compute_geometry(axis, interval)
        for axis, interval in zip(network.on_image(shape_yx), (core.rows, core.columns), strict=True)
    )
    return count_peak_bytes(network.graph, program_shapes(network.graph, network.pixels, rows, columns))


def count_live_bytes(network: Network, method: Method, shape_yx: tuple[int, int], tile: Tile) -> int:
    """Live bytes of the graph while one tile is computed."""
    if method == "window":
        return network.count_live_bytes(tile.window.shape)
    return count_program_bytes(network, shape_yx, tile.core)


def largest_uneven(
    network: Network, shape_yx: tuple[int, int], rows: Sequence[Span], columns: Sequence[Span]
) -> tuple[tuple[Span, Span], ...]:
    """The largest tiles of those that read up to an end of the image off the network's stride; none: empty."""
    extents, periods = network.padded_shape(shape_yx), [lcm(step, network.size_multiple) for step in network.stride]
    uneven_rows, uneven_columns = (
        [span for span in spans if is_uneven(span, extent, period)]
        for spans, extent, period in zip((rows, columns), extents, periods, strict=True)
    )
    pairs = [(uneven_rows, columns), (rows, uneven_columns)]
    return tuple((max(down, key=_length), max(across, key=_length)) for down, across in pairs if down and across)


def _length(span: Span) -> int:
    return span.window[1] - span.window[0]


def count_uneven_bytes(
    network: Network,
    shape_yx: tuple[int, int],
    rows: Sequence[Span],
    columns: Sequence[Span],
    by_row: Geometries,
    by_column: Geometries,
) -> int:
    """Live bytes of the largest of those tiles; 0: there are none.

    Args:
        by_row, by_column: of programs; empty: of windows.
    """
    found = [0]
    for row, column in largest_uneven(network, shape_yx, rows, columns):
        if by_row:
            shapes = program_shapes(network.graph, network.pixels, by_row[row.kind], by_column[column.kind])
            found.append(count_peak_bytes(network.graph, shapes))
        else:
            found.append(network.count_live_bytes((_length(row), _length(column))))
    return max(found)


def count_logit_bytes(network: Network, window: tuple[int, int]) -> int:
    """What an engine takes more for a window where it gives the logits too: them, and them in blocks of channels."""
    pixels = int(window[0] * network.scale[0] + 1) * int(window[1] * network.scale[1] + 1)
    results = network.channels * network.output_dtype.itemsize * pixels
    logits = max(0, window_output_bytes(network, window) - results)
    channels = -(-logits // (4 * pixels))
    return logits + 4 * pixels * align_up(channels, _CHANNEL_BLOCK)


_CHANNEL_BLOCK = 16
"""Channels that OpenVINO's convolutions keep together, at most."""


def window_output_bytes(network: Network, window: tuple[int, int]) -> int:
    """Of the network's result on a window, and of its logits."""
    if network.is_known:
        return count_output_bytes(network.graph, image_shapes(network.graph, window))
    pixels = int(window[0] * network.scale[0] + 1) * int(window[1] * network.scale[1] + 1)
    return network.channels * network.output_dtype.itemsize * pixels


def largest_peak(network: Network, by_row: Geometries, by_column: Geometries) -> int:
    """Live bytes of the program that reads most."""
    rows = max(by_row.values(), key=lambda geometry: geometry.window.length)
    columns = max(by_column.values(), key=lambda geometry: geometry.window.length)
    return count_peak_bytes(network.graph, program_shapes(network.graph, network.pixels, rows, columns))
