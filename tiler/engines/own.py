"""The engines of this package, as the registry has them; neither is imported before it is used."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from .memory import ENGINE_MEMORY

if TYPE_CHECKING:
    from ..analysis.network import Network
    from .engine import Engine, EngineProgram


class OpenVino:
    """OpenVINO on the CPU."""

    memory = ENGINE_MEMORY["openvino"]

    @staticmethod
    def version() -> str:
        """Of the installed package."""
        return version("openvino")

    @staticmethod
    def pack(network: Network, threads: int) -> EngineProgram:
        """The network as OpenVINO's graph, from this machine's cache or converted."""
        from .programs import pack_windows

        return pack_windows(network, threads)

    @staticmethod
    def load(program: EngineProgram) -> Engine:
        """OpenVINO with that graph; torch is not imported."""
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(program)


class Torch:
    """torch, with the module itself."""

    memory = ENGINE_MEMORY["torch"]

    @staticmethod
    def version() -> str:
        """Of the installed package."""
        return version("torch")

    @staticmethod
    def pack(network: Network, threads: int) -> EngineProgram:
        """The pickled module."""
        from .torch import pack_network

        return pack_network(network, threads)

    @staticmethod
    def load(program: EngineProgram) -> Engine:
        """The module on the CPU of this process."""
        from .torch import TorchEngine

        return TorchEngine.from_program(program)
