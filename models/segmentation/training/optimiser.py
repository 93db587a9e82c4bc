"""Optimisers, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

OptimiserName: TypeAlias = Literal["adamw", "sgd"]
MOMENTUM = 0.9


def make_optimiser(
    name: OptimiserName, parameters: Iterable[nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum; the learning rate is set before every step."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, momentum=MOMENTUM, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=weight_decay)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers, by parameter number and name."""
    return {
        f"{number}.{name}": value
        for number, entry in optimiser.state_dict()["state"].items()
        for name, value in entry.items()
        if value is not None
    }


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Continue from what an optimiser of the same parameters remembered."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
