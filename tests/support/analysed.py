"""The networks of the zoo and of the field, each analysed once in a process, for all tests that only look at them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from outsize.tiler.analysis.network import Network, analyze_network
from torch import nn

from .architectures import ARCHITECTURES
from .zoo import ZOO, alive

NETWORKS: dict[str, Callable[[], nn.Module]] = {**ZOO, **ARCHITECTURES}


@cache
def analysed(name: str, dtype: torch.dtype = torch.float64) -> Network:
    """A network of three bands, in float64 or what is given, of the same weights always."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return analyze_network(alive(NETWORKS[name]()).to(dtype), bands=3)
