"""The hash by which a network is known: its graph and its weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .network import Network


def hash_network(network: Network) -> str:
    """SHA-256 of the traced graph and of every weight in it."""
    if network.is_known:
        program = network.graph.program
        digest = hashlib.sha256(program.graph_module.code.encode())
        tensors = {**program.state_dict, **program.constants}
    else:
        digest = hashlib.sha256(f"{network.module}{network.halo}{network.stride}".encode())
        tensors = network.module.state_dict()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(name.encode())
        if hasattr(value, "detach"):
            array = value.detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()
