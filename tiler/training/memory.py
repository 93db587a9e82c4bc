"""Training memory: what a tile holds while it is computed forward and backward, found by running it without numbers.

The program of a tile runs once on torch's meta device, where tensors have shapes and no pixels, through the same
autograd as a step does. Every storage that is made and let go on the way is counted: what is kept for backward, views,
parts that are computed again, gradients. So the figure holds for every network, without a table of operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..base.geometry import Window
from ..base.text import MB
from .trainable import TrainableNetwork

PROCESS_BYTES = 500 * MB
"""A process that trains, with torch, Dask, rasterio, the traced network and what they load in the first step; measured,
see docs/benchmarks.md."""
WARM_UP_BYTES = 30 * MB
"""Of that, what the first step loads."""
TILE_FACTOR = 1.12
"""Of the live bytes of a tile, and the constant beside them: what torch and oneDNN hold in fact; docs/benchmarks.md."""
TILE_CONSTANT_BYTES = 15 * MB

BLOCK_CHANNELS = 16
"""oneDNN computes convolutions on channels in blocks of so many, which it copies from and to torch's layout."""


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        # What is freed inside an operation is there at its end, beside its operands and its result.
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + _scratch_bytes(func, args, result))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self.live_bytes += size
            self._known[key] = weakref.ref(storage, partial(self._let_go, key, size))

    def _let_go(self, key: int, size: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        self.live_bytes -= size
        del self._known[key]


def _scratch_bytes(func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> int:
    """Copies that a convolution makes for itself."""
    if func is torch.ops.aten.convolution.default:
        return _copied_bytes(args[0], args[1]) + _copied_bytes(result, args[1])
    if func is torch.ops.aten.convolution_backward.default:
        # Gradients of input and weights are computed one after the other; each copies two tensors.
        return _copied_bytes(args[0], args[2]) + _copied_bytes(args[1], args[2])
    return 0


def _copied_bytes(image: Tensor, weight: Tensor) -> int:
    channels = image.shape[1]
    if image.dtype == torch.float64:
        # Without oneDNN: one row of a matrix for each pixel and tap.
        taps = weight[0, 0].numel()
        return channels * taps * image[0, 0].numel() * image.element_size() // 2
    blocked = -(-channels // BLOCK_CHANNELS) * BLOCK_CHANNELS
    return blocked * image[:, 0].numel() * image.element_size()


def predict_tile_bytes(live_bytes: int) -> int:
    """What a process takes for a tile of so many live bytes."""
    return round(TILE_FACTOR * live_bytes) + TILE_CONSTANT_BYTES


def count_tile_bytes(
    network: TrainableNetwork,
    shape_yx: tuple[int, int],
    core: Window,
    cuts: tuple[int, ...] = (),
    *,
    with_gradients: bool = True,
) -> int:
    """Largest sum of tensors alive at once while a tile of an image of that shape is computed forward and backward.

    Its head is a cross-entropy of the logits; other losses of pixels hold about as much.

    Args:
        with_gradients: False: forward only, as a validation does.
    """
    tensors = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in network.tensors().items()
    }
    program = network.program(shape_yx, core, tensors, cuts)
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    with torch.set_grad_enabled(with_gradients), _LiveBytes() as live:
        shape = (1, network.network.bands, *program.window.shape)
        image = torch.empty(shape, dtype=network.network.dtype, device="meta")
        (output,) = program(image)
        wide = output if output.dtype == torch.float64 else output.float()
        value = wide.log_softmax(dim=1).square().sum(dtype=torch.float64)
        del output, wide
        if wanted and value.requires_grad:
            torch.autograd.grad(value, wanted, allow_unused=True)
    return live.peak_bytes
