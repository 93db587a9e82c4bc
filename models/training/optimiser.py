"""Optimisers, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

OptimiserName: TypeAlias = Literal["adamw", "sgd"]
MOMENTUM = 0.9


def make_optimiser(
    name: OptimiserName,
    parameters: Iterable[nn.Parameter],
    weight_decay: float,
    *,
    nesterov: bool = True,
    foreach: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; the learning rate is set before every step.

    Args:
        nesterov: SGD's momentum looks one step ahead.
        foreach: False: parameters are moved one by one, which takes no memory for all of them at once; None: as torch
            chooses. The two differ in last bits.
    """
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=1.0, momentum=MOMENTUM, nesterov=nesterov, weight_decay=weight_decay, foreach=foreach
        )
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=weight_decay, foreach=foreach)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Let the optimiser's next step have this learning rate."""
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
