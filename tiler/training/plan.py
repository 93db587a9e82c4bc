"""The plan of training steps: tiles, cuts and predicted memory, frozen and printable."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.errors import UsageError
from ..base.geometry import Grid, Window
from ..base.text import format_bytes


def require_cuts(cuts: tuple[int, ...]) -> None:
    """Raises:
    UsageError: they are no cuts of a graph.
    """
    if list(cuts) != sorted(set(cuts)) or min(cuts, default=1) < 1:
        raise UsageError(f"cuts must be positions > 0 in rising order, got {cuts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Peak bytes of a process that trains."""

    process_bytes: int
    """Python, torch, the traced network."""
    weight_bytes: int
    """Parameters, their gradients, sums of gradients, and the optimiser's state."""
    tile_bytes: int
    """One tile forward and backward."""
    held_bytes: int
    """Images and outputs in memory, or block caches of those on disk."""

    @property
    def total_bytes(self) -> int:
        return self.process_bytes + self.weight_bytes + self.tile_bytes + self.held_bytes

    def __str__(self) -> str:
        return (
            f"process {format_bytes(self.process_bytes)}, weights {format_bytes(self.weight_bytes)}, tile "
            f"{format_bytes(self.tile_bytes)}, images {format_bytes(self.held_bytes)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How a network is trained on images of one shape. Loss and gradients are the same for every plan."""

    image_shape: tuple[int, int, int]
    """(bands, height, width)."""
    output_shape: tuple[int, int, int]
    """(channels, height, width) of the network's floating result."""
    core: tuple[int, int]
    """(height, width) of the cores, in output pixels."""
    cuts: tuple[int, ...] = ()
    """Where a tile's graph is cut so that its parts are computed again in backward; empty: everything is kept."""
    memory: TrainingMemory | None = None
    """Predicted; None: the plan was made without a budget."""
    memory_budget_bytes: int | None = None
    overlap: float = 1.0
    """Work of a forward pass relative to one without tiles; 1.1 means 10 % more."""
    largest_window: tuple[int, int] = (0, 0)
    """(height, width) of the largest window that a tile reads."""

    def __post_init__(self) -> None:
        if min(self.core) < 1:
            raise UsageError(f"a core must be >= 1 in height and width, got {self.core}")
        require_cuts(self.cuts)

    @property
    def grid(self) -> Grid:
        return Grid(shape=self.output_shape[1:], cell=self.core)

    @property
    def cores(self) -> list[Window]:
        """Of all tiles, in the order in which their gradients are added."""
        grid = self.grid
        return [grid.window(*at) for at in grid]

    def explain(self) -> str:
        """The plan in words."""
        bands, height, width = self.image_shape
        rows, columns = self.grid.counts
        lines = [
            ("image", f"{height} x {width} px, {bands} bands, {height * width / 1e6:.1f} Mpx"),
            ("output", f"{self.output_shape[1]} x {self.output_shape[2]} px, {self.output_shape[0]} channels"),
            ("tiles", f"{rows * columns} ({rows} x {columns}), {self.explain_tile()}"),
            ("overhead", f"{100 * (self.overlap - 1):.1f} % more work than without tiles"),
        ]
        if self.memory is not None:
            lines.append(("memory", self.explain_memory()))
        return "\n".join(f"{name:<9} {text}" for name, text in lines)

    def explain_tile(self) -> str:
        """One tile in words."""
        kept = (
            f"computed in {len(self.cuts) + 1} parts, each again in backward"
            if self.cuts
            else "everything kept for backward"
        )
        return (
            f"core {self.core[0]} x {self.core[1]}, largest window {self.largest_window[0]} x "
            f"{self.largest_window[1]}, {kept}"
        )

    def explain_memory(self) -> str:
        """The prediction in words; empty without a budget."""
        if self.memory is None or self.memory_budget_bytes is None:
            return ""
        return (
            f"{format_bytes(self.memory.total_bytes)} predicted peak, budget {format_bytes(self.memory_budget_bytes)} "
            f"({self.memory})"
        )
