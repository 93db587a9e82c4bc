"""Fingerprints: what must agree before two runs may write into one output."""

from __future__ import annotations

import hashlib
from typing import Any

from .graph import TracedGraph
from .network import Network
from .raster import Raster


def hash_network(network: Network) -> str:
    """SHA-256 of the traced graph and of every weight in it."""
    graph: TracedGraph = network.graph
    digest = hashlib.sha256(graph.program.graph_module.code.encode())
    tensors = {**graph.program.state_dict, **graph.program.constants}
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(name.encode())
        if hasattr(value, "detach"):
            array = value.detach().cpu().contiguous()
            digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
            digest.update(array.numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()


def make_fingerprint(
    raster: Raster, network: Network, kind: str, engine: str, fill: tuple[float, ...]
) -> dict[str, Any]:
    """What a run's result depends on, as plain values."""
    return {
        "input": raster.identity,
        "input_shape": list(raster.shape),
        "input_dtype": str(raster.dtype),
        "input_nodata": repr(raster.nodata),
        "network": hash_network(network),
        "kind": kind,
        "engine": engine,
        "fill": list(fill),
    }


def find_differences(stored: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """One phrase for each part that differs."""
    return [
        f"{name.replace('_', ' ')} {_short(stored.get(name))} there, {_short(ours.get(name))} now"
        for name in sorted({*stored, *ours})
        if stored.get(name) != ours.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
