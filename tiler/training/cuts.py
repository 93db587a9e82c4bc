"""Cuts: where a program's graph is parted so that few tensors are kept between the parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from ..analysis.cost import Shapes

PARTS = (2, 3, 4, 6, 8, 12)
"""Numbers of parts that are tried."""


def choose_cuts(order: list[Node], shapes: Shapes, count_bytes: Callable[[tuple[int, ...]], int]) -> tuple[int, ...]:
    """The cuts that need least, of those at about equal distances in bytes, each where the fewest bytes cross.

    Args:
        order: the nodes, in execution order; a cut at i parts order[:i] from order[i:].
        shapes: of their tensors.
        count_bytes: what a tile with such cuts needs.
    """
    made, crossing = _count(order, shapes)
    total = sum(made)
    found: list[tuple[int, tuple[int, ...]]] = []
    for parts in PARTS:
        cuts = _cut_evenly(made, crossing, total, parts)
        if len(cuts) != parts - 1:
            break
        found.append((count_bytes(cuts), cuts))
        if len(found) >= 3 and found[-1][0] > found[-2][0] > found[-3][0]:
            break
    return min(found)[1] if found else ()


def _count(order: list[Node], shapes: Shapes) -> tuple[list[int], list[int]]:
    """(bytes that each node makes, bytes that cross a cut before each node); weights and constants apart."""
    last: dict[Node, int] = {source: at for at, node in enumerate(order) for source in node.all_input_nodes}
    made = [_bytes(node, shapes) for node in order]
    crossing = [0] * len(order)
    for at, node in enumerate(order):
        for later in range(at + 1, last.get(node, at) + 1):
            crossing[later] += made[at]
    return made, crossing


def _bytes(node: Node, shapes: Shapes) -> int:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return 0
    total = value.dtype.itemsize
    for extent in shapes(node):
        total *= extent
    return total


def _cut_evenly(made: list[int], crossing: list[int], total: int, parts: int) -> tuple[int, ...]:
    """For each share of the bytes the cheapest cut within half a part of it."""
    done: list[int] = []
    before = 0
    for size in made:
        done.append(before)  # bytes made before a cut at this node
        before += size
    cuts: list[int] = []
    for part in range(1, parts):
        low, high = (total * (part + shift) / parts for shift in (-0.5, 0.5))
        near = [at for at in range(1, len(made)) if low <= done[at] <= high and (not cuts or at > cuts[-1])]
        if near:
            middle = total * part / parts
            cuts.append(min(near, key=lambda at: (crossing[at], abs(done[at] - middle))))
    return tuple(cuts)
