"""Endings: what made a network's result, found by watching it run, and what that says of the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

EndingKind = Literal["affine", "softmax", "log-softmax", "sigmoid", "log-sigmoid", "classes", "other"]

_CARRYING = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "unsqueeze",
        "squeeze",
        "permute",
        "transpose",
        "t",
        "alias",
        "detach",
        "clone",
        "contiguous",
        "_to_copy",
        "to",
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "expand",
        "pixel_shuffle",
        "lift_fresh",
        "lift_fresh_copy",
        "upsample_nearest2d",
        "_upsample_nearest_exact2d",
        "upsample_bilinear2d",
        "avg_pool2d",
    ]
)
"""Operations that leave values of the kind that they were: moved, picked, converted, or means of each other."""
_AFFINE = frozenset(
    [
        "convolution",
        "_convolution",
        "conv2d",
        "conv_transpose2d",
        "mkldnn_convolution",
        "addmm",
        "mm",
        "bmm",
        "baddbmm",
        "linear",
        "matmul",
        "native_batch_norm",
        "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "batch_norm",
    ]
)
_ARGMAX = frozenset(("argmax", "argmin", "max.1", "min.1"))
_ACTIVATIONS: dict[str, EndingKind] = {
    "_softmax": "softmax",
    "softmax": "softmax",
    "_log_softmax": "log-softmax",
    "log_softmax": "log-softmax",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "log_sigmoid_forward": "log-sigmoid",
    "log_sigmoid": "log-sigmoid",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What made a network's result, operations left out that only move or pick values."""

    kind: EndingKind
    """"classes": whole numbers; "other": anything else, of which nothing is known."""
    operation: str = ""
    """torch's name of it."""
    count: int | None = None
    """Of classes: how many there are, where an argmax or a comparison made them. Of a softmax: over how many."""


@dataclass(slots=True, kw_only=True)
class _Made:
    """How a tensor came about."""

    operation: str
    dtype: torch.dtype
    sources: tuple[_Made | None, ...] = ()
    extent: int | None = None
    """Along the dimension that it worked on, where it has one."""


class _Watch(TorchDispatchMode):
    """Notes of every tensor what made it, and keeps no tensor alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in _flatten((args, kwargs or {})) if isinstance(value, Tensor)]
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        note = _Made(
            operation=name,
            dtype=torch.float32,
            sources=tuple(self.made.get(tensor) for tensor in given),
            extent=_extent(func, given, args, kwargs or {}),
        )
        outputs = [value for value in _flatten(result) if isinstance(value, Tensor)]
        if func._schema.is_mutable:
            # Written in place: whatever shares this memory is not what its own operation made any more.
            shared = {tensor.untyped_storage().data_ptr() for tensor in outputs}
            for tensor in list(self.made):
                if tensor.untyped_storage().data_ptr() in shared:
                    self.made[tensor] = _Made(operation="", dtype=tensor.dtype)
        for index, tensor in enumerate(outputs):
            part = f"{name}.{index}" if len(outputs) > 1 and name in ("max", "min", "topk", "sort") else name
            self.made[tensor] = _Made(operation=part, dtype=tensor.dtype, sources=note.sources, extent=note.extent)
        return result


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for entry in value for leaf in _flatten(entry)] if isinstance(value, (list, tuple)) else [value]


def _extent(func: Any, given: Sequence[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """Along the argument `dim` of an operation."""
    names = [argument.name for argument in func._schema.arguments]
    if "dim" not in names or not given:
        return None
    position = names.index("dim")
    dim = args[position] if position < len(args) else kwargs.get("dim")
    return given[0].shape[dim] if isinstance(dim, int) and -given[0].dim() <= dim < given[0].dim() else None


def watch(network: nn.Module, image: Tensor) -> tuple[Any, Ending]:
    """What a network gives for an image, and the operation that it ends in."""
    watcher = _Watch()
    with torch.no_grad(), watcher:
        result = network(image)
    made = watcher.made.get(result) if isinstance(result, Tensor) else None
    return result, _read(made)


def _read(made: _Made | None) -> Ending:
    is_whole, count = False, None
    while made is not None:
        # Once whole, values stay so, whatever type they are moved to.
        is_whole = is_whole or not made.dtype.is_floating_point
        if made.dtype == torch.bool:
            count = 2
        if made.operation not in _CARRYING or not made.sources:
            break
        made = made.sources[0]
    if is_whole:
        if made is not None and made.operation in _ARGMAX:
            count = made.extent
        return Ending(kind="classes", operation=made.operation if made else "", count=count)
    if made is None:
        return Ending(kind="other")
    if made.operation in _AFFINE:
        return Ending(kind="affine", operation=made.operation)
    return Ending(kind=_ACTIVATIONS.get(made.operation, "other"), operation=made.operation, count=made.extent)
