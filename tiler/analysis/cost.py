"""What a network costs: operations and live bytes of its traced graph, on a whole image or in a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from .graph import TracedGraph, operation_name
from .rules import Pixels, bound_arguments
from .sizes import evaluate_at, expression_of

if TYPE_CHECKING:
    from .axis_geometry import AxisGeometry

Shapes = Callable[[Node], list[int]]
"""The shape of a tensor of the graph."""

_SHARING = frozenset(
    f"aten.{name}"
    for name in (
        *("slice", "alias", "detach", "permute", "transpose", "unsqueeze", "squeeze", "select", "dropout", "view"),
        *("reshape", "expand", "narrow", "feature_dropout", "chunk", "split", "unbind"),
    )
)


def image_shapes(graph: TracedGraph, shape_yx: tuple[int, int]) -> Shapes:
    """Shapes where the graph runs on an image of that size."""

    def shape(node: Node) -> list[int]:
        return [evaluate_at(expression_of(e), (graph.height, graph.width), shape_yx) for e in node.meta["val"].shape]

    return shape


def program_shapes(
    graph: TracedGraph, pixels: Mapping[Node, Pixels], rows: AxisGeometry, columns: AxisGeometry
) -> Shapes:
    """Shapes where a program computes only what it needs.

    Args:
        pixels: what is known of each tensor that has pixels, in the order of the axes' nodes.
    """
    whole = image_shapes(graph, (rows.axis.image, columns.axis.image))
    position = {node: index for index, node in enumerate(pixels)}

    def shape(node: Node) -> list[int]:
        extents = whole(node)
        if node in position:
            for axis, dim in zip((rows, columns), pixels[node].dims, strict=True):
                interval = axis.intervals[position[node]]
                extents[dim] = interval.length if interval is not None else 0
        return extents

    return shape


def count_flops(graph: TracedGraph, shapes: Shapes) -> int:
    """Multiplications and additions of convolutions and linear layers: 2 * output pixels * weights each."""
    total = 0
    for node in graph.nodes:
        name = operation_name(node) if node.op == "call_function" else ""
        if name not in ("aten.conv2d", "aten.convolution", "aten.conv_transpose2d", "aten.linear"):
            continue
        arguments = bound_arguments(node)
        weight: Node = arguments["weight"]
        # A transposed convolution multiplies its weights once for each pixel that goes in.
        spreads = name == "aten.conv_transpose2d" or bool(arguments.get("transposed"))
        pixels = arguments["input"] if spreads else node
        extents = shapes(pixels)
        places = extents[:-1] if name == "aten.linear" else extents[2:]
        product = 1
        for extent in places:
            product *= extent
        total += 2 * product * int(weight.meta["val"].numel())
    return total


def compute_flops(graph: TracedGraph, shape_yx: tuple[int, int]) -> int:
    """`count_flops` on an image of that size."""
    return count_flops(graph, image_shapes(graph, shape_yx))


def count_peak_bytes(graph: TracedGraph, shapes: Shapes) -> int:
    """Largest sum of tensors alive at once when the graph runs node by node.

    A tensor lives from the node that makes it to its last reader; views and in-place results share their operand's.
    """
    nodes = [node for node in graph.nodes if node.op in ("placeholder", "call_function")]
    owner_of: dict[Node, Node] = {}
    last_use: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if node.op == "placeholder" and node is not graph.input_node:
            continue
        sources = [source for source in node.all_input_nodes if source in owner_of]
        name = operation_name(node)
        shares = bool(sources) and (name.endswith("_") or name in _SHARING)
        owner_of[node] = owner_of[sources[0]] if shares else node
        for source in (node, *sources):
            last_use[owner_of[source]] = position
    for node in graph.output_nodes:
        last_use[owner_of[node]] = len(nodes)
    dying: dict[int, list[Node]] = {}
    for owner, position in last_use.items():
        dying.setdefault(position, []).append(owner)
    alive, peak = 0, 0
    for position, node in enumerate(nodes):
        if owner_of.get(node) is node:
            alive += _bytes(node, shapes)
        peak = max(peak, alive)
        alive -= sum(_bytes(owner, shapes) for owner in dying.get(position, ()))
    return peak


def count_output_bytes(graph: TracedGraph, shapes: Shapes) -> int:
    """Of what the graph returns: the result, and the logits where it has them."""
    return sum(_bytes(node, shapes) for node in graph.output_nodes)


def compute_peak_bytes(graph: TracedGraph, shape_yx: tuple[int, int]) -> int:
    """`count_peak_bytes` on an image of that size."""
    return count_peak_bytes(graph, image_shapes(graph, shape_yx))


def _bytes(node: Node, shapes: Shapes) -> int:
    total = node.meta["val"].dtype.itemsize
    for extent in shapes(node):
        total *= extent
    return total
