"""Aliasing: which tensors of a graph share memory, and what writing in place then forbids.

A traced graph may write in place (`relu_`, `add_`). Whoever reads the written memory later by another name than the
result depends on the write without an edge that says so; interval rules follow edges, so such reads are refused.
"""

from __future__ import annotations

from torch.fx import Node

from ..base.errors import UntileableError
from .graph import operation_name, where

_MAY_SHARE = {
    f"aten.{name}"
    for name in (
        *("alias", "alpha_dropout", "chunk", "contiguous", "detach", "detach_", "dropout", "expand", "feature_dropout"),
        *("narrow", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "to", "transpose"),
        *("type_as", "unbind", "unsqueeze", "view"),
    )
} | {"getitem"}


def _writes_in_place(node: Node) -> bool:
    name = operation_name(node)
    is_operation = node.op == "call_function" and name.startswith("aten.")
    return is_operation and name.endswith("_") and name != "aten.detach_"


class Aliases:
    """Follows a graph from its first node to its last."""

    def __init__(self) -> None:
        self._memory: dict[Node, Node] = {}
        self._stale: dict[Node, Node] = {}
        """Names whose memory was written under another name, and that writer."""

    def visit(self, node: Node) -> None:
        """Take in the next node.

        Raises:
            UntileableError: it reads memory that was written in place under another name, or writes into a parameter,
                a buffer or the image.
        """
        for source in node.all_input_nodes:
            if source in self._stale:
                writer = self._stale[source]
                raise UntileableError(
                    f"{operation_name(writer)} in {where(writer)} cannot be tiled: it writes in place into a tensor "
                    "that is read again under another name; use its result, or the operation without the underscore"
                )
        name = operation_name(node)
        writes = _writes_in_place(node)
        sources = [source for source in node.all_input_nodes if source in self._memory]
        if sources and (writes or name in _MAY_SHARE):
            self._memory[node] = self._memory[sources[0]]
        else:
            self._memory[node] = node
        if writes:
            owner = self._memory[node]
            if owner.op in ("placeholder", "get_attr"):
                raise UntileableError(
                    f"{name} in {where(node)} cannot be tiled: it writes in place into the image or "
                    "into the network's own state; call module.eval() first, or compute a new tensor instead"
                )
            for other, memory in self._memory.items():
                if memory is owner and other is not node:
                    self._stale[other] = node
