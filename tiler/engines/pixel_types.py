"""Pixel types: in which type a raster's pixels enter OpenVINO, so that it computes what the network does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..analysis.graph import operation_name
from ..base.dtypes import dtype_name
from ..base.errors import EngineError, UsageError

if TYPE_CHECKING:
    from torch.fx import Node

    from ..analysis.network import Network

NATIVE = frozenset({"uint8", "int8", "int16", "int32", "float32"})
"""Types that OpenVINO's CPU plugin holds and converts exactly. It holds 64 bits in 32."""
WIDER = {"uint16": "int32"}
"""Types that its converter does not know, and what holds all their values."""
SMALLEST_SIDE = 64
"""Height or width of rasters from which on OpenVINO pools whatever is left of them: not what is one pixel wide."""

_MOVING = frozenset(
    {
        "aten.alias",
        "aten.cat",
        "aten.clone",
        "aten.constant_pad_nd",
        "aten.contiguous",
        "aten.detach",
        "aten.expand",
        "aten.flip",
        "aten.index_select",
        "aten.movedim",
        "aten.narrow",
        "aten.pad",
        "aten.permute",
        "aten.reshape",
        "aten.select",
        "aten.slice",
        "aten.split",
        "aten.split_with_sizes",
        "aten.squeeze",
        "aten.stack",
        "aten.transpose",
        "aten.unbind",
        "aten.unsqueeze",
        "aten.view",
    }
)
"""Operations that leave pixels as they are."""
_CASTING = frozenset({"aten._to_copy", "aten.to", "aten.type_as", "aten.float"})
_PROMOTING = frozenset({"aten.add", "aten.sub", "aten.mul", "aten.div", "aten.true_divide", "aten.rsub"})
"""Operations that cast their operands to the type of their result before anything else."""


def require_entering(network: Network) -> str:
    """The type in which pixels enter OpenVINO.

    Pixels of 64 bits, of 32 without sign and of half precision are cast before they enter, where that very cast to
    float32 is the network's own first step.

    Raises:
        EngineError: it cannot compute this network as torch does.
    """
    entering = _entering(network) if network.is_known else None
    if entering is None or find_refusal(network):
        raise EngineError(f"{find_refusal(network)}; use --engine torch")
    return entering


def _entering(network: Network) -> str | None:
    name = dtype_name(network.dtype)
    if name in NATIVE:
        return name
    if name in WIDER:
        return WIDER[name]
    # Users without a tensor are torch's own assertions.
    casts = all(_becomes_float32(node) for node in network.graph.input_node.users if _dtype(node) is not None)
    return "float32" if casts else None


def fit_engine(network: Network, engine: str | None, shape_yx: tuple[int, int], precision: str | None) -> str | None:
    """The engine that is asked for; torch where one may be chosen and OpenVINO cannot run the network as torch does.

    Raises:
        EngineError: OpenVINO is asked for, and cannot.
        UsageError: for a network of which nobody knows what it computes.
    """
    if engine == "torch":
        return engine
    refusal = find_refusal(network)
    only = "openvino" if precision == "int8" else engine
    if refusal and only == "openvino":
        kind = EngineError if network.is_known else UsageError
        raise kind(f"{refusal}; use --engine torch{' and --precision float32' if precision == 'int8' else ''}")
    is_free = engine in (None, "auto") and precision != "int8"
    return "torch" if is_free and (refusal or min(shape_yx) < SMALLEST_SIDE) else engine


def find_refusal(network: Network) -> str:
    """Why OpenVINO cannot compute this network as torch does; empty: it can."""
    if not network.is_known:
        return "OpenVINO needs a traced network, and this one's halo is only stated"
    for node in network.graph.nodes:
        kind = _dtype(node)
        if node.op == "call_function" and kind is not None and kind.is_floating_point and kind != torch.float32:
            return f"the network computes in {dtype_name(kind)}, and OpenVINO in float32"
    if (arithmetic := _find_integer_arithmetic(network)) is not None:
        return (
            f"the network reckons with {dtype_name(network.dtype)} pixels ({operation_name(arithmetic)}) before it "
            "casts them, which OpenVINO does in another type"
        )
    if _entering(network) is None:
        return (
            f"the network does not begin by casting its {dtype_name(network.dtype)} pixels to float32, and OpenVINO "
            "has no such"
        )
    return ""


def find_numbers(network: Network) -> str:
    """The floating type that the network computes in; of several the widest."""
    if network.is_known:
        kinds = {_dtype(node) for node in network.graph.nodes if node.op == "call_function"}
    else:
        kinds = {parameter.dtype for parameter in network.module.parameters()}
    floats = [kind for kind in kinds if kind is not None and kind.is_floating_point]
    return dtype_name(max(floats, key=lambda kind: kind.itemsize, default=torch.float32))


def _find_integer_arithmetic(network: Network) -> Node | None:
    """The first operation whose integers come from pixels and are others than theirs."""
    graph = network.graph
    if network.dtype.is_floating_point:
        return None
    pixels = {graph.input_node}
    for node in graph.nodes:
        if node.op != "call_function" or not pixels.intersection(node.all_input_nodes):
            continue
        kind = _dtype(node)
        if kind is None or kind.is_floating_point or kind == torch.bool:
            continue
        keeps = operation_name(node) in _CASTING and kind in (network.dtype, torch.int32, torch.int64)
        if operation_name(node) not in _MOVING and not keeps:
            return node
        pixels.add(node)
    return None


def _becomes_float32(node: Node) -> bool:
    return _dtype(node) == torch.float32 and operation_name(node) in _CASTING | _PROMOTING


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
