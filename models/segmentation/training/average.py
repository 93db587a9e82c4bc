"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after each step; buffers are taken as they are.

    The decay of the step after n others is at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in network.state_dict().items()
        }
        # Under all names of those that are shared, or an average would depend on which name is read last.
        self._learnt = {name for name, _ in network.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def update(self, network: nn.Module, steps: int) -> None:
        """Take in the weights after `steps` steps."""
        decay = min(self.decay, steps / (9 + steps)) if self.decay else 0.0
        for name, tensor in network.state_dict().items():
            if name in self._learnt and tensor.is_floating_point():
                self.values[name].lerp_(tensor, 1 - decay)
            else:
                self.values[name].copy_(tensor)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue from an average that was kept."""
        for name, tensor in self.values.items():
            tensor.copy_(values[name])
