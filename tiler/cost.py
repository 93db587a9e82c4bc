"""What a network costs on an image of a given shape: operations and live bytes, from the traced graph."""

from __future__ import annotations

import torch
from torch.fx import Node

from .graph import TracedGraph, operation_name
from .rules import bound_arguments
from .sizes import evaluate, expression_of

_SHARING = frozenset(
    f"aten.{name}"
    for name in ("slice", "alias", "detach", "permute", "transpose", "unsqueeze", "squeeze", "select", "dropout")
)


def compute_flops(graph: TracedGraph, shape_yx: tuple[int, int]) -> int:
    """Multiplications and additions of the convolutions: 2 * output pixels * weights each."""
    total = 0
    for node in graph.nodes:
        if node.op == "call_function" and operation_name(node) in ("aten.conv2d", "aten.convolution"):
            weight = bound_arguments(node)["weight"].meta["val"].shape
            _, _, height, width = _extents(graph, node.meta["val"], shape_yx)
            total += 2 * height * width * int(weight.numel())
    return total


def compute_peak_bytes(graph: TracedGraph, shape_yx: tuple[int, int]) -> int:
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
            alive += _bytes(graph, node, shape_yx)
        peak = max(peak, alive)
        alive -= sum(_bytes(graph, owner, shape_yx) for owner in dying.get(position, ()))
    return peak


def _extents(graph: TracedGraph, value: torch.Tensor, shape_yx: tuple[int, int]) -> list[int]:
    extents: list[int] = []
    for extent in value.shape:
        expression = expression_of(extent)
        for symbol, size in zip((graph.height, graph.width), shape_yx, strict=True):
            if symbol in expression.free_symbols:
                expression = expression_of(evaluate(expression, symbol, size))
        extents.append(int(expression))
    return extents


def _bytes(graph: TracedGraph, node: Node, shape_yx: tuple[int, int]) -> int:
    value: torch.Tensor = node.meta["val"]
    total = value.dtype.itemsize
    for extent in _extents(graph, value, shape_yx):
        total *= extent
    return total
