"""The plan: every decision of a run, made before the first pixel is read, frozen and printable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .cost import compute_flops, compute_peak_bytes
from .engine import ENGINE_EFFICIENCY, ENGINE_MEMORY, EngineName, choose_engine
from .errors import BudgetError, UsageError
from .geometry import Grid, Interval, Window
from .machine import cpu_count
from .memory import MB, MemoryPrediction, format_bytes, parse_bytes, predict_memory
from .network import Halo, Network
from .raster import Raster

CORES = (4096, 3072, 2048, 1024, 512, 256, 128, 64)
"""Sides of a core that a plan may choose, in output pixels."""
LARGEST_CHUNK = 1024
IN_FLIGHT = 2
"""Tiles that a worker holds at once: one computes while the other is read or written."""
TILES_PER_WORKER = 8
"""Cores above one chunk are used only where every worker gets at least this many, so that the work divides well."""
CORES_PER_WORKER = 8
"""CPU cores of one worker process; more are slower in one convolution than in two."""
GDAL_CACHE_BYTES = 64 * MB
CLIENT_BYTES = {"openvino": 520 * MB, "torch": 450 * MB}
"""The planning process with torch and Dask loaded, and the traced network; measured, see docs/memory.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A row or column of tiles along one axis."""

    core: tuple[int, int]
    """[start, stop) in output pixels."""
    window: tuple[int, int]
    """[start, stop) in pixels of the (padded) raster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A core and the window that it is computed from."""

    row: int
    column: int
    core: Window
    """In output pixels; a run writes just these."""
    window: Window
    """In pixels of the (padded) raster."""
    crop: Window
    """The core in the pixels of the program's output on the window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """All decisions of a run; a pure function of (raster, network, budget, options)."""

    raster_shape: tuple[int, int, int]
    """(bands, height, width)."""
    raster_dtype: str
    output_shape: tuple[int, int, int]
    """(channels, height, width)."""
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
    """Pixels decoded for each pixel of the raster, if no block is kept from one tile to the next."""

    @property
    def grid(self) -> Grid:
        return Grid(shape=self.output_shape[1:], cell=self.core)

    @property
    def overlap(self) -> float:
        """Work relative to one pass without overlap; 1.1 means 10 % more."""
        rows = sum(span.window[1] - span.window[0] for span in self.rows)
        columns = sum(span.window[1] - span.window[0] for span in self.columns)
        return rows * columns / (self.raster_shape[1] * self.raster_shape[2])

    def tile(self, row: int, column: int) -> Tile:
        """The tile at (row, column)."""
        core = self.grid.window(row, column)
        rows, columns = self.rows[row], self.columns[column]
        window = Window.from_intervals(
            Interval(start=rows.window[0], stop=rows.window[1]),
            Interval(start=columns.window[0], stop=columns.window[1]),
        )
        # Windows start on the stride, so their first pixel is a whole number of output pixels.
        top, left = (
            int(start * Fraction(scale)) for start, scale in zip((window.y, window.x), self.scale, strict=True)
        )
        crop = Window(y=core.y - top, x=core.x - left, height=core.height, width=core.width)
        return Tile(row=row, column=column, core=core, window=window, crop=crop)

    def order(self) -> list[tuple[int, int]]:
        """Tiles in the order of the run: those of one window shape together, so that few programs are built."""
        heights = [span.window[1] - span.window[0] for span in self.rows]
        widths = [span.window[1] - span.window[0] for span in self.columns]
        return sorted(self.grid, key=lambda at: (-heights[at[0]], -widths[at[1]], at))

    @property
    def geometries(self) -> int:
        """Number of distinct window shapes, that is of programs."""
        return len({s.window[1] - s.window[0] for s in self.rows}) * len(
            {s.window[1] - s.window[0] for s in self.columns}
        )

    @property
    def largest_window(self) -> tuple[int, int]:
        return _largest_window(self.rows, self.columns)

    def estimate_s(self, flops_per_s: float) -> float:
        """Seconds of the tiles, on one machine of that matrix product speed."""
        return self.flops / (flops_per_s * ENGINE_EFFICIENCY[self.engine])

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same plan."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TilePlan:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for axis in ("rows", "columns"):
            fields[axis] = tuple(
                Span(core=(s["core"][0], s["core"][1]), window=(s["window"][0], s["window"][1])) for s in values[axis]
            )
        fields["halo"] = Halo(**values["halo"])
        fields["memory"] = MemoryPrediction(**values["memory"])
        return cls(**fields)

    def explain(self, flops_per_s: float | None = None) -> str:
        """The plan in words, with an estimated time where the machine's speed is given."""
        bands, height, width = self.raster_shape
        rows, columns = self.grid.counts
        window_h, window_w = self.largest_window
        memory = self.memory
        lines = [
            ("raster", f"{height} x {width} px, {bands} bands {self.raster_dtype}, {height * width / 1e6:.1f} Mpx"),
            (
                "output",
                " x ".join(map(str, self.output_shape[1:]))
                + f" px, {self.output_shape[0]} x {self.output_dtype}, chunks {self.chunk[0]} x {self.chunk[1]}",
            ),
            (
                "halo",
                f"{self.halo}, derived from the traced graph; windows start on a stride of {_pair(self.stride)} px",
            ),
            (
                "tiles",
                f"{rows * columns} ({rows} x {columns}), core {_pair(self.core)}, largest window {window_h} x "
                f"{window_w}, {self.geometries} window shape{'s' if self.geometries != 1 else ''}",
            ),
            (
                "overhead",
                f"{100 * (self.overlap - 1):.1f} % more pixels computed than the raster has; "
                f"blocks read {self.read_amplification:.2f} x",
            ),
            (
                "engine",
                f"{self.engine}, {self.workers} worker process{'es' if self.workers != 1 else ''} x {self.threads} "
                f"thread{'s' if self.threads != 1 else ''}, {self.in_flight} tiles in flight each",
            ),
            (
                "memory",
                f"{format_bytes(memory.total_bytes)} predicted peak of all processes, budget "
                f"{format_bytes(self.memory_budget_bytes)} (client {format_bytes(memory.client_bytes)}, workers "
                f"{format_bytes(memory.worker_bytes)}, programs {format_bytes(memory.program_bytes)}, buffers "
                f"{format_bytes(memory.buffer_bytes)})",
            ),
            ("work", f"{self.flops / 1e12:.3g} TFLOP, {self.flops_bare / (height * width) / 1e3:.1f} kFLOP a pixel"),
        ]
        if self.size_multiple > 1:
            lines.insert(
                1,
                (
                    "padding",
                    f"the network takes sizes divisible by {self.size_multiple}: padded at bottom and right with the "
                    "model's fill value, the result cropped",
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
        return "\n".join(f"{name:<9} {text}" for name, text in lines)


def format_seconds(seconds: float) -> str:
    """A duration for people: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}" if values[0] == values[1] else f"{values[0]} x {values[1]}"


def _largest_window(rows: Sequence[Span], columns: Sequence[Span]) -> tuple[int, int]:
    return (max(s.window[1] - s.window[0] for s in rows), max(s.window[1] - s.window[0] for s in columns))


def compute_spans(network: Network, axis: int, raster_shape_yx: tuple[int, int], core: int) -> tuple[Span, ...]:
    """The tiles along one axis.

    Windows at the first edge are extended to the length of an inner one: some pixels more to compute, one shape fewer.
    """
    extent = network.padded_shape(raster_shape_yx)[axis]
    output = network.output_shape(raster_shape_yx)[axis]
    spans: list[Span] = []
    for start in range(0, output, core):
        wanted = Interval(start=start, stop=min(start + core, output))
        needed = network.axes[axis].input_interval(wanted).clamp(extent)
        window = network.align(axis, needed, extent)
        spans.append(Span(core=(wanted.start, wanted.stop), window=(window.start, window.stop)))
    longest = max(span.window[1] - span.window[0] for span in spans)
    return tuple(
        Span(core=span.core, window=(0, min(longest, extent))) if span.window[0] == 0 else span for span in spans
    )


def plan_tiles(
    raster: Raster | tuple[int, int, int],
    network: Network,
    *,
    memory: str | int = "2GB",
    engine: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    core: int | None = None,
) -> TilePlan:
    """Decide how to run a network over a raster within a memory budget.

    Args:
        raster: an open raster, or its shape (bands, height, width).
        memory: budget of all processes together, such as "2GB".
        engine: "openvino" or "torch"; None: OpenVINO where it is installed.
        workers: worker processes; None: one for each 8 cores.
        threads: compute threads of each worker; None: the cores divided among the workers.
        core: side of the cores in output pixels; None: the largest that the budget allows.

    Raises:
        UsageError: another number or kind of bands than the network takes; options below 1.
        BudgetError: no core fits the budget; names the smallest budget that can be kept.
    """
    shape = raster.shape if isinstance(raster, Raster) else tuple(raster)
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"a raster's shape must be (bands, height, width), each >= 1, got {shape}")
    if shape[0] != network.bands:
        raise UsageError(f"the network takes {network.bands} bands, the raster has {shape[0]}; choose a fitting model")
    for name, value in (("workers", workers), ("threads", threads), ("core", core)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be >= 1, got {value}")
    budget = parse_bytes(memory)
    dtype = str(network.dtype).removeprefix("torch.")
    if isinstance(raster, Raster) and raster.dtype != np.dtype(dtype):
        raise UsageError(f"the network was analysed for {dtype} pixels, the raster has {raster.dtype}; analyse again")
    engine_name = choose_engine(engine)
    cpus = cpu_count()
    workers = workers or max(1, cpus // CORES_PER_WORKER)
    threads = threads or max(1, cpus // workers)
    output_shape = (network.channels, *network.output_shape(shape[1:]))
    output_dtype = str(network.output_dtype).removeprefix("torch.")
    itemsize, output_itemsize = np.dtype(dtype).itemsize, np.dtype(output_dtype).itemsize

    smallest: MemoryPrediction | None = None
    for side in [core] if core else CORES:
        rows, columns = (compute_spans(network, axis, shape[1:], side) for axis in (0, 1))
        tiles = len(rows) * len(columns)
        if core is None and side > LARGEST_CHUNK and tiles < TILES_PER_WORKER * workers:
            continue
        window = _largest_window(rows, columns)
        pixels = window[0] * window[1]
        core_pixels = min(side, output_shape[1]) * min(side, output_shape[2])
        chunk = (min(side, LARGEST_CHUNK, output_shape[1]), min(side, LARGEST_CHUNK, output_shape[2]))
        if side > LARGEST_CHUNK and side % LARGEST_CHUNK:
            raise UsageError(
                f"a core above {LARGEST_CHUNK} must be a multiple of it, so that a tile owns whole chunks, got {side}"
            )
        prediction = predict_memory(
            engine=ENGINE_MEMORY[engine_name],
            workers=workers,
            in_flight=min(IN_FLIGHT, tiles),
            client_bytes=CLIENT_BYTES[engine_name],
            activation_bytes=compute_peak_bytes(network.graph, window),
            window_bytes=pixels * (shape[0] * itemsize + 1),
            result_bytes=network.channels * output_itemsize * (pixels + core_pixels),
            chunk_bytes=2 * chunk[0] * chunk[1] * output_itemsize,
            cache_bytes=GDAL_CACHE_BYTES if isinstance(raster, Raster) and raster.kind == "gdal" else 0,
        )
        smallest = prediction
        if prediction.total_bytes > budget:
            continue
        block = raster.block if isinstance(raster, Raster) else chunk
        return TilePlan(
            raster_shape=(shape[0], shape[1], shape[2]),
            raster_dtype=dtype,
            output_shape=output_shape,
            output_dtype=output_dtype,
            core=(side, side),
            chunk=chunk,
            rows=rows,
            columns=columns,
            stride=network.stride,
            scale=(str(network.scale[0]), str(network.scale[1])),
            halo=network.halo,
            size_multiple=network.size_multiple,
            engine=engine_name,
            workers=workers,
            threads=threads,
            in_flight=IN_FLIGHT,
            memory_budget_bytes=budget,
            memory=prediction,
            flops=_total_flops(network, rows, columns),
            flops_bare=compute_flops(network.graph, network.padded_shape(shape[1:])),
            read_amplification=_read_amplification(rows, columns, shape[1:], block),
        )
    assert smallest is not None
    raise BudgetError(
        f"memory must be at least {format_bytes(smallest.total_bytes + 0.5 * MB)} for this network with "
        f"{workers} worker{'s' if workers != 1 else ''} (core {core or CORES[-1]}), got {format_bytes(budget)}; "
        "raise --memory, or use fewer workers"
    )


def _total_flops(network: Network, rows: Sequence[Span], columns: Sequence[Span]) -> int:
    total = 0
    heights, widths = ([s.window[1] - s.window[0] for s in spans] for spans in (rows, columns))
    for height in set(heights):
        for width in set(widths):
            total += heights.count(height) * widths.count(width) * compute_flops(network.graph, (height, width))
    return total


def _read_amplification(
    rows: Sequence[Span], columns: Sequence[Span], shape_yx: tuple[int, int], block: tuple[int, int]
) -> float:
    """Pixels of all blocks that windows touch, relative to those of the raster; separable along the axes."""
    product = 1.0
    for spans, extent, size in zip((rows, columns), shape_yx, block, strict=True):
        read = 0
        for span in spans:
            start, stop = span.window[0], min(span.window[1], extent)
            read += min(-(-stop // size) * size, extent) - start // size * size
        product *= read / extent
    return product
