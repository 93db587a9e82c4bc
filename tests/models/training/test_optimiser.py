"""Optimisers of both trainings against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outsize.models.training.optimiser import OptimiserName, make_optimiser, set_rate
from torch import nn


@pytest.mark.parametrize(
    ("name", "kept", "torch_s", "options"),
    [
        ("sgd", {}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("sgd", {"nesterov": False, "foreach": False}, torch.optim.SGD, {"momentum": 0.9, "foreach": False}),
        ("adamw", {}, torch.optim.AdamW, {}),
        ("adamw", {"foreach": False}, torch.optim.AdamW, {"foreach": False}),
    ],
)
def test_optimisers_move_as_torch_s_with_the_rate_of_each_step(
    name: OptimiserName, kept: dict[str, Any], torch_s: Any, options: dict[str, Any]
) -> None:
    def follow(optimiser: torch.optim.Optimizer, network: nn.Module) -> torch.Tensor:
        for step in range(4):
            set_rate(optimiser, 0.1 / (step + 1))
            optimiser.zero_grad()
            network(torch.full((2, 5), 1.0 + step)).square().sum().backward()
            optimiser.step()
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    expected = follow(torch_s(theirs.parameters(), lr=0.5, weight_decay=0.05, **options), theirs)
    assert torch.equal(follow(make_optimiser(name, ours.parameters(), 0.05, **kept), ours), expected)
