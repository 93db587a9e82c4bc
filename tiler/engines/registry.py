"""Engines by name: those of this package, and those that others add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ..base.memory import EngineMemory
from ..base.registry import Registry

if TYPE_CHECKING:
    from ..analysis.network import Network
    from .engine import Engine, EngineProgram

OWN = ("openvino", "torch")
"""Engines of this package. Others run windows on the CPU in the network's own numbers."""


class NamedEngine(Protocol):
    """A class of functions that make a network ready for an engine, and run it."""

    memory: EngineMemory
    """What the engine adds to the network's tensors. It counts where a probe does not measure it: on small rasters,
    and where the probe fails."""

    def version(self) -> str:
        """What changes when results may change: an output is continued with the same."""
        ...

    def pack(self, network: Network, threads: int) -> EngineProgram:
        """The network for windows of any size, as bytes.

        The result must equal `network.module` up to floating-point rounding; the start check of a run compares them.
        What the engine cannot run is an EngineError that says so.
        """
        ...

    def load(self, program: EngineProgram) -> Engine:
        """What runs those bytes, in the process of a worker."""
        ...


ENGINES: Registry[Any] = Registry(
    "engine",
    "outsize.engines",
    {"openvino": "outsize.tiler.engines.own:OpenVino", "torch": "outsize.tiler.engines.own:Torch"},
    protocol=NamedEngine,
)
"""`NamedEngine` by the names of `engine=` and `--engine`."""
