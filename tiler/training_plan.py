"""The plan of training steps: tiles, cuts and predicted memory, frozen and printable."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError
from .geometry import Grid, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How a network is trained on images of one shape; the gradients are the same for every plan."""

    image_shape: tuple[int, int, int]
    """(bands, height, width)."""
    output_shape: tuple[int, int, int]
    """(channels, height, width) of the network's floating result."""
    core: tuple[int, int]
    """(height, width) of the cores, in output pixels."""
    cuts: tuple[int, ...] = ()
    """Where a tile's graph is cut so that its parts are computed again in backward; empty: everything is kept."""

    def __post_init__(self) -> None:
        if min(self.core) < 1:
            raise UsageError(f"a core must be >= 1 in height and width, got {self.core}")

    @property
    def grid(self) -> Grid:
        return Grid(shape=self.output_shape[1:], cell=self.core)

    @property
    def cores(self) -> list[Window]:
        """Of all tiles, in the order in which their gradients are added."""
        grid = self.grid
        return [grid.window(*at) for at in grid]
