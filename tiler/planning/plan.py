"""The plan: every decision of a run, made before the first pixel is read, frozen and printable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ..base.choices import EngineName, Method, Precision
from ..base.geometry import Grid, Halo, Interval, Window, order_cells
from ..base.memory import MemoryPrediction
from ..base.text import MB, format_bytes, format_seconds, one_line
from ..base.tile import Span, Tile
from ..engines.devices import pick_index
from ..engines.engine import ENGINE_EFFICIENCY, PRECISION_SPEED
from ..rasters.reading import MUCH_READ, kind_of

SLOW_FLOPS_PER_S = 5e9
"""Less than any machine makes of a network that would be used for one: it tells a long tile from a hanging worker."""
STORE_BYTES = 70 * MB
"""Of the libraries that talk to an object store, in each process that does; measured, see docs/explanation/memory.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """All decisions of a run; a pure function of (raster, network, budget, options)."""

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

    def tile(self, row: int, column: int) -> Tile:
        """The tile at (row, column)."""
        target = self.grid.window(row, column)
        rows, columns = self.rows[row], self.columns[column]
        core = Window(
            y=target.y + self.output_origin[0],
            x=target.x + self.output_origin[1],
            height=target.height,
            width=target.width,
        )
        window = Window.from_intervals(
            Interval(start=rows.window[0], stop=rows.window[1]),
            Interval(start=columns.window[0], stop=columns.window[1]),
        )
        if self.method == "program":
            top, left = core.y, core.x
        else:
            # Windows start on the stride, so their first pixel is a whole number of output pixels.
            top, left = (
                int(start * Fraction(scale)) for start, scale in zip((window.y, window.x), self.scale, strict=True)
            )
        crop = Window(y=core.y - top, x=core.x - left, height=core.height, width=core.width)
        return Tile(row=row, column=column, core=core, target=target, window=window, crop=crop)

    def order(self) -> Iterator[tuple[int, int]]:
        """Tiles in the order of the run: those of one program or window shape together, so that few are compiled; see
        `geometry.order_cells`. Where a block has all columns, kinds may be done in turn without dropping blocks."""
        return order_cells(
            [kind_of(span) for span in self.rows],
            [kind_of(span) for span in self.columns],
            self.strip_rows,
            strips_first=self.strips_first,
            turning=self.block[1] >= self.raster_shape[2],
        )

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
            efficiency = ENGINE_EFFICIENCY[self.engine]
        return self.flops / (flops_per_s * efficiency * PRECISION_SPEED[self.precision])

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same plan."""
        return json.loads(json.dumps(asdict(self)))

    def summarise(self) -> dict[str, Any]:
        """What a list of runs says of a plan; the whole plan stands in the output."""
        return {
            "raster_shape": list(self.raster_shape),
            "region": list(self.region),
            "core": list(self.core),
            "halo": str(self.halo),
            "method": self.method,
            "engine": self.engine,
            "precision": self.precision,
            "device": self.device,
            "workers": self.workers,
            "threads": self.threads,
            "tiles": len(self.grid),
            "memory_budget_bytes": self.memory_budget_bytes,
            "predicted_peak_bytes": self.memory.total_bytes,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TilePlan:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for axis in ("rows", "columns"):
            fields[axis] = tuple(
                Span(core=(s["core"][0], s["core"][1]), window=(s["window"][0], s["window"][1]), kind=s["kind"])
                for s in values[axis]
            )
        if values.get("receptive"):
            fields["receptive"] = tuple(tuple((lo, hi) for lo, hi in axis) for axis in values["receptive"])
        fields["halo"] = Halo(**values["halo"])
        fields["memory"] = MemoryPrediction(**values["memory"])
        return cls(**fields)

    def _numbers_text(self) -> str:
        return self.numbers if self.precision == "float32" else self.precision

    def _device_text(self) -> str:
        """Where the engine runs: cpu, cuda:1 (NAME), cuda (2 x NAME)."""
        if not self.device_names:
            return self.device
        names = [f"{self.device_names.count(name)} x {name}" for name in dict.fromkeys(self.device_names)]
        return f"{self.device} ({', '.join(names)})"

    def explain(self, flops_per_s: float | None = None) -> str:
        """The plan in words, with an estimated time where the machine's speed is given."""
        bands, height, width = self.raster_shape
        rows, columns = self.grid.counts
        wanted = self.region[2] * self.region[3]
        window_h, window_w = self.largest_window
        memory = self.memory
        done = "work" if self.method == "program" else "pixels computed"
        lines = [
            (
                "raster",
                f"{height} x {width} px, {bands} band{'s' if bands != 1 else ''} {self.raster_dtype}, "
                f"{height * width / 1e6:.1f} Mpx",
            ),
            (
                "output",
                " x ".join(map(str, self.output_shape[1:]))
                + f" px, {self.output_shape[0]} x {self.output_dtype}, chunks {self.chunk[0]} x {self.chunk[1]}",
            ),
            (
                "halo",
                f"{self.halo}, {'derived from the traced graph' if self.is_known else 'as stated, not derived'}; "
                + (
                    "each operation computes only the pixels that a core needs"
                    if self.method == "program"
                    else f"windows start on a stride of {_pair(self.stride)} px"
                ),
            ),
            (
                "tiles",
                f"{rows * columns} ({rows} x {columns}), core {_pair(self.core)}, largest window {window_h} x "
                f"{window_w}, {self.geometries} {'program' if self.method == 'program' else 'window shape'}"
                f"{'s' if self.geometries != 1 else ''}",
            ),
            (
                "overhead",
                f"{100 * (self.overlap - 1):.1f} % more {done} than wanted; "
                f"blocks read {self.read_amplification:.2f} x",
            ),
            (
                "engine",
                f"{self.engine}{', compiled,' if self.compiles else ''} in {self._numbers_text()} on "
                f"{self._device_text()}, "
                f"{self.workers} worker process"
                f"{'es' if self.workers != 1 else ''} x {self.threads} "
                f"thread{'s' if self.threads != 1 else ''}, {self.in_flight} tiles in flight each"
                f"{f': {self.engine_reason}' if self.engine_reason else ''}",
            ),
            (
                "memory",
                f"{format_bytes(memory.total_bytes)} predicted peak of all processes, budget "
                f"{format_bytes(self.memory_budget_bytes)} (client {format_bytes(memory.client_bytes)}, workers "
                f"{format_bytes(memory.worker_bytes)}, programs {format_bytes(memory.program_bytes)}, buffers "
                f"{format_bytes(memory.buffer_bytes)})",
            ),
            (
                "work",
                f"{self.flops / 1e12:.3g} TFLOP, {self.flops_bare / wanted / 1e3:.1f} kFLOP a pixel",
            ),
        ]
        if self.read_amplification > MUCH_READ and self.block != (0, 0):
            fewer = ", fewer --workers (they share no blocks)" if self.workers > 1 else ""
            lines.insert(
                5,
                (
                    "reading",
                    f"blocks of {self.block[0]} x {self.block[1]} px are decoded up to {self.read_amplification:.1f} "
                    f"times; to decode them about once: more --memory{fewer}, or `outsize ingest` first, which stores "
                    "squares of 512 px",
                ),
            )
        if self.device_names:
            together = f"batches of {self.batch} windows" if self.batch > 1 else "one window at a time"
            lines.insert(
                -1,
                (
                    "device",
                    f"{format_bytes(self.device_bytes)} predicted peak on each device, budget "
                    f"{format_bytes(self.device_budget_bytes)}, {together}",
                ),
            )
        if self.region != (0, 0, height, width):
            y, x, region_height, region_width = self.region
            lines.insert(1, ("region", f"{region_height} x {region_width} px from row {y}, column {x}"))
        if self.precision == "int8":
            lines.insert(
                -2,
                (
                    "precision",
                    "int8: ranges fixed once on windows of this raster; tiles equal the whole image under that "
                    "network, and its loss against float32 is measured",
                ),
            )
        if self.receptive is not None:
            lines.insert(-1, ("context", "pixels whose receptive field touches nodata are marked in nodata_context"))
        if self.size_multiple > 1:
            lines.insert(
                1,
                (
                    "padding",
                    f"sizes padded to multiples of {self.size_multiple} at bottom and right with the model's fill "
                    "value, the result cropped: the network takes others not, or not to their last pixel",
                ),
            )
        if flops_per_s:
            lines.append(
                (
                    "time",
                    f"about {format_seconds(self.estimate_s(flops_per_s))} and start-up (matrix product here: "
                    f"{flops_per_s / 1e9:.0f} GFLOP/s)",
                )
            )
        return "\n".join(f"{name:<9} {one_line(text)}" for name, text in lines)


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}" if values[0] == values[1] else f"{values[0]} x {values[1]}"


def largest_window(rows: Sequence[Span], columns: Sequence[Span]) -> tuple[int, int]:
    return (max(s.window[1] - s.window[0] for s in rows), max(s.window[1] - s.window[0] for s in columns))
