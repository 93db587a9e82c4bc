"""Networks made ready for an engine, and engines that run them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..base.choices import EngineName, Precision
from .engine import Engine, EngineProgram, TileEngine, WindowTiles

if TYPE_CHECKING:
    from ..analysis.network import Network


def load_tiles(program: EngineProgram) -> TileEngine:
    """The engine with a program's network, for tiles.

    Raises:
        EngineError: the engine is not installed here.
    """
    if program.method == "program":
        if program.engine == "openvino":
            from .openvino import OpenVinoPrograms

            return OpenVinoPrograms.from_program(program)
        from .programs import load_torch_programs

        return load_torch_programs(program)
    if program.is_shared:
        from .cuda import load_batches

        return load_batches(program)
    return WindowTiles(load_windows(program), with_logits=program.with_logits)


def load_windows(program: EngineProgram) -> Engine:
    """The engine with a program's network, for windows one by one, on the CPU.

    Raises:
        EngineError: the engine is not installed here.
    """
    if program.engine == "openvino":
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(program)
    from .torch import TorchEngine

    return TorchEngine.from_program(program)


def compile_program(
    network: Network, engine: EngineName, threads: int, precision: Precision = "float32"
) -> EngineProgram:
    """Convert a network for an engine, to run on windows. What was converted once on this machine is found again.

    For int8, which has to see pixels, `quantise_network` does.

    Raises:
        EngineError: the engine cannot run this network.
    """
    if engine == "openvino":
        from .programs import pack_windows

        return replace(pack_windows(network, threads), precision=precision)
    from .torch import pack_network

    return replace(pack_network(network, threads), precision=precision)
