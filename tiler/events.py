"""Events: what a run tells whoever listens. The engine room never prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import StartCheck
    from .plan import TilePlan
    from .precision_loss import PrecisionLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRecord:
    """What is kept of a finished or failed tile."""

    row: int
    column: int
    state: str
    """"done" or "failed"."""
    pixels: int
    """Of the core."""
    read_s: float
    compute_s: float
    write_s: float
    worker: str
    error: str = ""
    at: float = 0.0
    """When it ended, in seconds since 1970."""
    chunks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By path in the store: bytes and hash, as they were flushed to the disk before this record was made."""
    decoded_bytes: int = 0
    """Of all blocks that its process decoded since its last record; 0 where the plan keeps none, and nobody counts."""
    checked_bytes: int = 0
    """Of those that it decoded for the start check, apart."""
    undeclared_pixels: int = 0
    """Pixels of the raster under the core that are nodata for NaN or infinity which it does not declare."""
    not_finite_pixels: int = 0
    """Pixels of the core whose result is NaN or infinity though they are no nodata."""

    @classmethod
    def failure(cls, row: int, column: int, pixels: int, error: str, worker: str = "") -> TileRecord:
        return cls(
            row=row,
            column=column,
            state="failed",
            pixels=pixels,
            read_s=0,
            compute_s=0,
            write_s=0,
            worker=worker,
            error=error,
            at=round(time.time(), 3),
        )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlanned:
    """The plan is made, the output open."""

    plan: TilePlan
    resumed: int
    """Tiles that are already there."""
    pixels: int
    """Core pixels of the tiles that this run has to do."""
    died: str | None = None
    """The run before this one, where it did not end by itself."""
    ignored: str = ""
    """Options of this call that an output which is continued does not take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProbed:
    """The engine's memory for this network is about to be measured, before there is a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramsMade:
    """Programs are being converted, or read from the cache, while workers start; told from another thread."""

    made: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrating:
    """A network's ranges are being found on windows of the raster, while workers start; told from another thread."""

    windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMeasured:
    """What fewer bits than float32 cost is known; told from another thread."""

    loss: PrecisionLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterReady:
    """Workers are connected."""

    workers: int
    dashboard: str | None
    unplanned: str = ""
    """How they differ from the plan's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartChecked:
    check: StartCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class TileFinished:
    """A tile is done or has failed."""

    record: TileRecord
    finished: int
    """Tiles finished so far in this run, this one included."""
    total: int
    """Tiles that this run has to do."""
    pixels: int
    """Core pixels finished so far in this run."""
    elapsed_s: float
    memory_bytes: int
    """All processes together, now."""


Event = (
    MemoryProbed | RunPlanned | ProgramsMade | Calibrating | LossMeasured | ClusterReady | StartChecked | TileFinished
)
Listener = Callable[[Event], None]
