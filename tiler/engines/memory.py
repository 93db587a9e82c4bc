"""What engines add to a network's tensors, measured once with the default network."""

from __future__ import annotations

from collections.abc import Callable

from ..base.choices import EngineName, Method, Precision
from ..base.memory import CUDA_HOST_BYTES, EngineMemory
from ..base.text import MB
from .registry import ENGINES, OWN

# Measured with PSS on Linux (docs/benchmarks.md); OpenVINO workers never import torch, oneDNN copies more in eager
# torch.
WORKER_BYTES = 95 * MB
"""A worker process with Dask, Zarr and GDAL, before it loads an engine."""
ENGINE_WEIGHTS = 2.0
"""Copies of the weights that an engine makes of those that it is sent: OpenVINO lays them out anew, from a copy; torch
has them as tensors. 1.8 and 1.1 measured."""
ENGINE_MEMORY: dict[str, EngineMemory] = {
    "openvino": EngineMemory(worker_bytes=WORKER_BYTES, factor=1.2, constant_bytes=90 * MB, weights=ENGINE_WEIGHTS),
    "torch": EngineMemory(worker_bytes=WORKER_BYTES, factor=2.1, constant_bytes=210 * MB, weights=ENGINE_WEIGHTS),
}
PROGRAM_MEMORY: dict[str, EngineMemory] = {
    "openvino": EngineMemory(worker_bytes=WORKER_BYTES, factor=1.4, constant_bytes=70 * MB, weights=ENGINE_WEIGHTS),
    "torch": EngineMemory(worker_bytes=WORKER_BYTES, factor=2.1, constant_bytes=290 * MB, weights=ENGINE_WEIGHTS),
}
"""The same for programs; torch's workers trace the network by themselves."""


INT8_MEMORY = EngineMemory(worker_bytes=WORKER_BYTES, factor=0.5, constant_bytes=90 * MB, calibration_bytes=500 * MB)
"""Of OpenVINO by windows; calibration is a process of its own (tiler/engines/quantise.py)."""
CUDA_MEMORY = EngineMemory(
    worker_bytes=WORKER_BYTES,
    factor=0.0,
    constant_bytes=CUDA_HOST_BYTES,
    device_factor=2.0,
    device_constant_bytes=300 * MB,
)
"""On a CUDA device the tensors are there and not on the host. Nothing of this was measured here: the factor is that of
torch on the CPU, which holds the operands of a convolution in two orders at most."""


MemoryLookup = Callable[["EngineName", "Method", "Precision", int, str], EngineMemory]


def constant_memory(
    engine: EngineName, method: Method, precision: Precision, threads: int, device: str = "cpu"
) -> EngineMemory:
    """What was measured once with the default network, for all; of an added engine what it says of itself."""
    del threads
    if device != "cpu":
        return CUDA_MEMORY
    if precision == "int8":
        return INT8_MEMORY
    if method == "program":
        return PROGRAM_MEMORY[engine]
    return ENGINE_MEMORY[engine] if engine in OWN else ENGINES.find(engine).memory
