"""The work of a plan in floating-point operations, and the bytes that are live during one tile of it."""

from __future__ import annotations

from collections.abc import Sequence

from ..analysis.axis_geometry import compute_geometry
from ..analysis.cost import count_flops, count_output_bytes, count_peak_bytes, image_shapes, program_shapes
from ..analysis.network import Network
from ..base.choices import Method
from ..base.geometry import Window
from ..base.tile import Span, Tile
from .spans import Geometries


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
