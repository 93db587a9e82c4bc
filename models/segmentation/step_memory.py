"""Memory of a step: what a tile's forward pass keeps for its backward pass, and what comes on top."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...tiler.errors import BudgetError
from ...tiler.geometry import Window, align_up
from ...tiler.memory import MB, format_bytes
from ...tiler.trainable import TrainableNetwork

_FACTOR = 2.0
"""Peak of forward and backward in units of what is kept between them: 1.5 to 2.0 measured, U-Nets of several widths."""
_TRIED = (48, 96, 192)
"""Sides of the cores that are measured."""


def measure_kept_bytes(network: TrainableNetwork, side: int) -> tuple[int, int]:
    """(pixels of the window, bytes kept for backward) of a core of that side in the middle of a large image."""
    image = align_up(4 * side + 4096, network.network.size_multiple)
    core = Window(y=image // 2, x=image // 2, height=side, width=side)
    tensors = network.tensors()
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    program = network.program((image, image), core, tensors)
    window = program.window
    pixels = torch.zeros((1, network.network.bands, *window.shape), dtype=network.network.dtype)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = program(pixels)
    del outputs
    return window.pixels, sum(kept.values())


def tile_bytes_of(network: TrainableNetwork) -> Callable[[int], int]:
    """Side of a core -> predicted peak of one tile, from three small ones: kept = a side^2 + b side + c, as margins
    are equally wide at all sides."""
    kept = [measure_kept_bytes(network, tried)[1] for tried in _TRIED]
    line = np.polyfit(_TRIED, kept, 2)

    def predict(side: int) -> int:
        return int(_FACTOR * max(float(np.polyval(line, side)), kept[0]) + 20 * MB)

    return predict


def require_budget(network: TrainableNetwork, side: int, base_bytes: int, budget: int) -> int:
    """Predicted peak of the process, if the budget holds it.

    Args:
        base_bytes: what the process has before the first step, caches included.

    Raises:
        BudgetError: names a core that would fit, or the smallest budget.
    """
    predict = tile_bytes_of(network)
    need = base_bytes + predict(side)
    if need <= budget:
        return need
    smaller = next((s for s in (512, 256, 128, 64, 32) if s < side and base_bytes + predict(s) <= budget), None)
    remedy = f", or --core {smaller}" if smaller else ""
    raise BudgetError(
        f"cores of {side} px need {format_bytes(need)}, --memory is {format_bytes(budget)}; give as much{remedy}"
    )
