"""Engines: what runs a program. The protocol, and what is shipped to workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy.typing as npt

from ..base.choices import EngineName, Method, Precision
from ..base.errors import EngineError, UsageError

if TYPE_CHECKING:
    from ..base.tile import Tile

PRECISIONS: dict[EngineName, tuple[Precision, ...]] = {
    "openvino": ("float32", "int8"),
    "torch": ("float32", "bfloat16", "float16", "tf32"),
}
"""What each engine offers; tf32 on CUDA only."""
ADDED_PRECISIONS: tuple[Precision, ...] = ("float32",)
"""What engines offer that were added: the network's own numbers."""


ENGINE_EFFICIENCY: dict[str, float] = {"openvino": 0.8, "torch": 0.15, "cuda": 0.3}
"""Share of a large matrix product's speed that the default network reaches in a run; measured, on CUDA supposed; for
estimates only."""
ADDED_EFFICIENCY = 0.15
"""The same of engines that were added, which nobody has measured: as torch."""
PRECISION_SPEED: dict[Precision, float] = {"float32": 1.0, "int8": 2.0, "bfloat16": 1.0, "float16": 1.0, "tf32": 2.0}
"""How many times faster than float32 that is; measured for int8, for estimates only."""


class Engine(Protocol):
    """Runs one network on windows; one thread at a time."""

    def run(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(bands, h, w) in the network's dtype -> (channels, h', w'). The result is valid until the next call."""
        ...

    def run_with_logits(self, image: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(result, logits), each (channels, h', w'); the result twice for a network without logits."""
        ...


class TileEngine(Protocol):
    """Runs tiles of one raster; one thread at a time, unless `EngineProgram.is_shared`."""

    def run_tile(self, image: npt.NDArray[Any], tile: Tile) -> npt.NDArray[Any]:
        """(bands, h, w) of the tile's window -> (channels, h', w') of its core. The result is valid until the next
        call."""
        ...

    def run_tile_with_logits(self, image: npt.NDArray[Any], tile: Tile) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(result, logits) of the core; the result twice for a network without logits."""
        ...

    def device_peak_bytes(self) -> int:
        """Most that the engine has held on a CUDA device at once, without its context; 0 on the CPU."""
        ...


class WindowTiles:
    """Tiles by window runs: the network on the whole window, the core cut out."""

    def __init__(self, engine: Engine, *, with_logits: bool) -> None:
        self._engine, self._with_logits = engine, with_logits

    def run_tile(self, image: npt.NDArray[Any], tile: Tile) -> npt.NDArray[Any]:
        if self._with_logits:
            return self.run_tile_with_logits(image, tile)[0]
        rows, columns = tile.crop.slices()
        return self._engine.run(image)[:, rows, columns]

    def run_tile_with_logits(self, image: npt.NDArray[Any], tile: Tile) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        rows, columns = tile.crop.slices()
        finished, logits = self._engine.run_with_logits(image)
        return finished[:, rows, columns], logits[:, rows, columns]

    def device_peak_bytes(self) -> int:
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProgram:
    """A network in an engine's own form, as bytes: what a worker gets, once."""

    engine: EngineName
    payload: tuple[bytes | bytearray, ...]
    has_logits: bool
    threads: int
    """Compute threads of one worker process; 0: as many as it has anyway."""
    method: Method = "window"
    shape_yx: tuple[int, int] = (0, 0)
    """Of the raster, for programs: they depend on where its edges are."""
    precision: Precision = "float32"
    channels_last: bool = False
    """Of torch by windows: whether the module may hold its tensors with channels next to each other."""
    device: str = "cpu"
    """"cpu", "cuda" (the first that the worker sees), or "cuda:N"."""
    device_limit_bytes: int = 0
    """That torch may hold on a CUDA device; 0: all of it."""
    batch: int = 1
    """Windows of one shape that run together."""
    with_logits: bool = False
    """By windows: tiles are computed with their logits, so that all come from one compiled form of the network."""
    compiles: bool = False
    """By torch.compile, for each window shape anew."""
    place: str = ""
    """"module:name" of an added engine that other processes do not know by its name."""
    version: str = ""
    """Of an added engine; another one is refused."""

    @property
    def is_shared(self) -> bool:
        """Whether several threads may be in the engine at once: it orders them by itself."""
        return self.engine == "torch" and self.method == "window" and (self.device != "cpu" or self.batch > 1)


def choose_precision(name: str | None, engine: EngineName) -> Precision:
    """The precision that is asked for, where the engine offers it; None: float32.

    Raises:
        UsageError: no such precision.
        EngineError: the engine does not compute in it.
    """
    known = get_args(Precision)
    offered = PRECISIONS.get(engine, ADDED_PRECISIONS)
    for precision in offered:
        if precision == (name or "float32"):
            return precision
    if name not in known:
        raise UsageError(f"precision must be {', '.join(known[:-1])} or {known[-1]}, got {name!r}")
    others = [other for other, theirs in PRECISIONS.items() if name in theirs]
    remedy = "".join(f" --engine {other}, or" for other in others)
    raise EngineError(f"engine {engine} computes in {', '.join(offered)}, got {name}; use{remedy} float32")
