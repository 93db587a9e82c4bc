"""The decisions of a run, and what follows from them without looking at single tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..base.choices import EngineName, Method, Precision
from ..base.geometry import Grid, Halo, Window
from ..base.memory import MemoryPrediction
from ..base.tile import Span
from ..engines.devices import pick_index
from ..engines.engine import ADDED_EFFICIENCY, ENGINE_EFFICIENCY, PRECISION_SPEED

SLOW_FLOPS_PER_S = 5e9
"""Less than any machine makes of a network that would be used for one: it tells a long tile from a hanging worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDecisions:
    """All decisions of a run, as plain values."""

    raster_shape: tuple[int, int, int]
    """(bands, height, width)."""
    raster_dtype: str
    region: tuple[int, int, int, int]
    """(y, x, height, width) of what is wanted, in pixels of the raster."""
    output_origin: tuple[int, int]
    """(y, x) of the output array's first pixel, in pixels of the whole result."""
    output_shape: tuple[int, int, int]
    """(channels, height, width) of the output array."""
    output_dtype: str
    core: tuple[int, int]
    chunk: tuple[int, int]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    stride: tuple[int, int]
    scale: tuple[str, str]
    """Output pixels for each input pixel, as fractions."""
    halo: Halo
    size_multiple: int
    method: Method
    engine: EngineName
    workers: int
    threads: int
    """Compute threads of each worker."""
    in_flight: int
    """Tiles that each worker holds at once."""
    memory_budget_bytes: int
    memory: MemoryPrediction
    flops: int
    """Of the convolutions, overlap included."""
    flops_bare: int
    """Of one pass over the raster without overlap."""
    read_amplification: float
    """Pixels decoded for each wanted pixel, at most, by workers that keep as many blocks as the plan allows."""
    precision: Precision = "float32"
    numbers: str = "float32"
    """What the network itself computes in; a precision of float32 leaves it as it is."""
    engine_reason: str = ""
    """Why the network runs by torch where OpenVINO would be faster; empty: it does not, or that was asked for."""
    device: str = "cpu"
    """"cpu", "cuda" (a worker for each device) or "cuda:N"."""
    device_names: tuple[str, ...] = ()
    """Of the CUDA devices, one for each worker."""
    device_bytes: int = 0
    """Predicted peak on each CUDA device."""
    device_budget_bytes: int = 0
    batch: int = 1
    """Windows of one shape that run together."""
    with_logits: bool = False
    """By windows: tiles are computed with their logits as the start check's are, which are then done already."""
    compiles: bool = False
    """By torch.compile, for each window shape anew."""
    strip_rows: int = 1
    """Rows of tiles that are done together, column by column, so that neighbours find their blocks decoded."""
    strips_first: bool = False
    """All kinds of tiles of one strip before the next strip; else all strips of one kind before the next kind."""
    cache_bytes: int = 0
    """Of decoded blocks that a worker keeps; GDAL's cache apart."""
    block: tuple[int, int] = (0, 0)
    """(height, width) of the raster's blocks; (0, 0): not known."""
    is_known: bool = True
    """Whether the halo was derived from the traced graph; else the user stated it."""
    check_margin: int = 1
    """Input pixels by which the start check's windows or cores reach further than they must, on every side."""
    receptive: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] | None = None
    """For each axis the input interval of the first result pixels, one period of them; None: nodata context is not
    marked."""

    @property
    def wanted_region(self) -> Window:
        """What is wanted, in pixels of the raster."""
        y, x, height, width = self.region
        return Window(y=y, x=x, height=height, width=width)

    @property
    def grid(self) -> Grid:
        return Grid(shape=self.output_shape[1:], cell=self.core)

    @property
    def device_indices(self) -> tuple[int, ...]:
        """Of the CUDA devices, one for each worker; empty on the CPU."""
        if self.device == "cpu":
            return ()
        first = pick_index(self.device)
        return tuple(range(first, first + self.workers))

    @property
    def output_bytes(self) -> int:
        """Of the output's arrays, uncompressed."""
        pixels = self.output_shape[1] * self.output_shape[2]
        context = pixels if self.receptive is not None else 0
        return pixels * self.output_shape[0] * np.dtype(self.output_dtype).itemsize + context

    @property
    def overlap(self) -> float:
        """Work relative to one pass without overlap; 1.1 means 10 % more."""
        if self.method == "program":
            return self.flops / self.flops_bare if self.flops_bare else 1.0
        rows = sum(span.window[1] - span.window[0] for span in self.rows)
        columns = sum(span.window[1] - span.window[0] for span in self.columns)
        return rows * columns / (self.region[2] * self.region[3])

    @property
    def slow_tile_s(self) -> float:
        """Seconds that the largest tile takes a slow machine, alone."""
        rows, columns = ([span.window[1] - span.window[0] for span in spans] for spans in (self.rows, self.columns))
        share = max(rows) * max(columns) / (sum(rows) * sum(columns))
        return self.flops * share / SLOW_FLOPS_PER_S

    @property
    def geometries(self) -> int:
        """Number of distinct window shapes or programs."""
        return len({(s.window[1] - s.window[0], s.kind) for s in self.rows}) * len(
            {(s.window[1] - s.window[0], s.kind) for s in self.columns}
        )

    @property
    def largest_window(self) -> tuple[int, int]:
        return largest_window(self.rows, self.columns)

    def estimate_s(self, flops_per_s: float) -> float:
        """Seconds of the tiles, on one machine, or on CUDA devices, of that matrix product speed."""
        if self.device != "cpu":
            efficiency = self.workers * ENGINE_EFFICIENCY["cuda"]
        else:
            efficiency = ENGINE_EFFICIENCY.get(self.engine, ADDED_EFFICIENCY)
        return self.flops / (flops_per_s * efficiency * PRECISION_SPEED[self.precision])


def largest_window(rows: Sequence[Span], columns: Sequence[Span]) -> tuple[int, int]:
    return (max(s.window[1] - s.window[0] for s in rows), max(s.window[1] - s.window[0] for s in columns))
