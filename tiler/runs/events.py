"""Events: what a run tells whoever listens. The engine room never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..output.tile_record import TileRecord

if TYPE_CHECKING:
    from ..engines.precision_loss import PrecisionLoss
    from ..planning.plan import TilePlan
    from .check import StartCheck


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
