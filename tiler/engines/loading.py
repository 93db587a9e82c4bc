"""Networks made ready for an engine, and engines that run them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..base.choices import EngineName, Precision
from ..base.errors import EngineError
from .engine import Engine, EngineProgram, TileEngine, WindowTiles
from .registry import ENGINES, OWN

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
        EngineError: the engine is not installed here, or in another version than where the network was made ready.
        UsageError: it is not registered here.
    """
    engine = ENGINES.find(program.engine, program.place)
    if program.version and engine.version() != program.version:
        raise EngineError(
            f"engine {program.engine} is {engine.version()} here, and {program.version} where the network was made "
            "ready; install one version everywhere"
        )
    return engine.load(program)


def compile_program(
    network: Network, engine: EngineName, threads: int, precision: Precision = "float32"
) -> EngineProgram:
    """Convert a network for an engine, to run on windows. What was converted once on this machine is found again.

    For int8, which has to see pixels, `quantise_network` does.

    Raises:
        EngineError: the engine cannot run this network.
        UsageError: no such engine, or one that workers cannot import.
    """
    found = ENGINES.find(engine)
    program = replace(found.pack(network, threads), precision=precision)
    if engine in OWN:
        return program
    return replace(program, engine=engine, place=ENGINES.place(engine), version=found.version())
