"""The planner: chooses tiles, engine and workers for a raster, a network and a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np
from torch import nn

from ..analysis.agreement import takes_batches
from ..analysis.axis_geometry import AxisGeometry, compute_geometry, geometry_key
from ..analysis.cost import count_flops, count_output_bytes, count_peak_bytes, image_shapes, program_shapes
from ..analysis.network import Network, as_network
from ..base.choices import EngineName, Method, Precision
from ..base.dtypes import stored_dtype
from ..base.errors import BudgetError, UntileableError, UsageError
from ..base.geometry import Halo, Interval, Window, align_up
from ..base.memory import (
    DEVICE_SHARE,
    EngineMemory,
    MemoryPrediction,
    find_budget,
    predict_device,
    predict_memory,
    predict_pinned,
)
from ..base.text import MB, format_bytes, parse_bytes
from ..base.tile import Span, Tile
from ..engines.batches import LANES
from ..engines.choice import EngineChoice, choose_engine, needs_cuda_facts
from ..engines.devices import MachineFacts, find_facts
from ..engines.memory import MemoryLookup, constant_memory
from ..engines.pixel_types import find_numbers, find_refusal, fit_engine
from ..rasters.opening import as_raster
from ..rasters.parts import count_pixel_bytes, has_gdal
from ..rasters.raster import Raster
from ..rasters.reading import MUCH_READ, Source, least_held_bytes, plan_reading
from ..system.machine import cpu_count, one_thread
from .check_windows import PATCH, larger_core, larger_window
from .plan import STORE_BYTES, TilePlan, largest_window

CORES = (4096, 3072, 2048, 1024, 512, 256, 128, 64)
"""Sides of a core that a plan may choose, in output pixels."""
LARGEST_CHUNK = 1024
IN_FLIGHT = 2
"""Tiles that a worker holds at once: one computes while the other is read or written; with batches, as many times."""
BATCHES = (16, 8, 4, 2)
"""Windows that may run together on a CUDA device."""
BATCH_PIXELS = 2048 * 2048
"""Of all windows of a batch, at most: such a device is busy with less, and larger batches only take memory."""
TILES_PER_WORKER: dict[Method, int] = {"window": 16, "program": 64}
"""Cores above one chunk are used where every worker gets at least this many. Larger cores save halos, but each of up to
nine kinds of tile touches memory of its own first, as long as the halos of that many take (docs/benchmarks.md)."""
MOST_TILES = 50_000
"""Along one side. A raster that declares more is a mistake or a trap."""
PROGRAM_FLOPS = 4e12
"""Work from which programs pay that each kind of tile has to be converted for: some ten seconds on two cores."""
FEW_TILES = 64
"""Up to which the start check's tiles are worth more than the logits of all others cost, 1 or 2 % of their time."""
FLOPS_PER_S = 1e11
"""Of one core; only for weighing how tiles are read against what they take anyway."""
SWITCH_S: dict[tuple[EngineName, Method], float] = {
    ("openvino", "program"): 0.1,
    ("openvino", "window"): 0.7,
    ("torch", "program"): 0.0,
    ("torch", "window"): 0.0,
}
"""Of changing to another program or window shape, whatever its size; measured for the default network."""
SWITCH_BYTES_PER_S = 3000 * MB
"""And of its tensors, whose memory is touched anew."""
MOST_WORK = 1.15
"""Of smaller cores that read less, relative to the largest ones: what more halo costs them."""
CORES_PER_WORKER = 8
"""CPU cores of one worker process; more are slower in one convolution than in two."""
CLIENT_BYTES = {
    ("openvino", "window"): 520 * MB,
    ("openvino", "program"): 590 * MB,
    ("torch", "window"): 390 * MB,
    ("torch", "program"): 390 * MB,
}
"""The planning process with torch and Dask loaded, and the traced network; measured, see docs/memory.md."""
DASHBOARD_BYTES = 60 * MB
"""Of Dask's dashboard with the tile map and a visitor; measured."""
CLIENT_WEIGHTS = 4
"""Copies of the weights that it holds: the module's, and three that a program, or the network for windows, is converted
from and to; later the engine's, and those that go to workers. Measured, whatever the number of programs."""
FEWER_BITS_WEIGHTS = 2
"""Copies more of them for the start check, where float32 tells nothing exact."""
CHECK_FACTOR = 2
"""Of the live bytes of the start check's windows, which torch runs there."""


def compute_spans(
    network: Network, axis: int, raster_shape_yx: tuple[int, int], core: int, wanted: Interval | None = None
) -> tuple[Span, ...]:
    """The tiles along one axis that cover `wanted` result pixels (None: all).

    Windows at the first edge are extended to the length of an inner one: some pixels more to compute, one shape fewer.
    """
    extent = network.padded_shape(raster_shape_yx)[axis]
    wanted = wanted or Interval(start=0, stop=network.output_shape(raster_shape_yx)[axis])
    spans: list[Span] = []
    for start in range(wanted.start, wanted.stop, core):
        part = Interval(start=start, stop=min(start + core, wanted.stop))
        needed = network.needed_interval(axis, part).clamp(extent)
        window = network.align(axis, needed, extent)
        # Ended on the stride too, every level of the network has whole pixels, and enlarged tensors need no crop.
        stop = min(align_up(window.stop, lcm(network.stride[axis], network.size_multiple)), extent)
        spans.append(Span(core=(part.start, part.stop), window=(window.start, stop)))
    longest = max(span.window[1] - span.window[0] for span in spans)
    return tuple(
        Span(core=span.core, window=(0, min(longest, extent))) if span.window[0] == 0 else span for span in spans
    )


Geometries = dict[str, AxisGeometry]
"""Of programs along one axis, by the kind of span that they serve."""


def compute_program_spans(
    network: Network, axis: int, raster_shape_yx: tuple[int, int], core: int, wanted: Interval
) -> tuple[tuple[Span, ...], Geometries]:
    """The tiles along one axis, each with the pixels that its program reads."""
    on_image = network.on_image(raster_shape_yx)[axis]
    spans: list[Span] = []
    geometries: Geometries = {}
    for start in range(wanted.start, wanted.stop, core):
        part = Interval(start=start, stop=min(start + core, wanted.stop))
        geometry = compute_geometry(on_image, part)
        window = geometry.window
        key = geometry_key(geometry)
        geometries.setdefault(key, geometry)
        spans.append(Span(core=(part.start, part.stop), window=(window.start, window.stop), kind=key))
    return tuple(spans), geometries


def find_window_refusal(network: Network, shape_yx: tuple[int, int]) -> str:
    """Why windows of a raster of that shape cannot be run through the module; empty: they can."""
    refusal = network.window_refusal
    if not refusal and network.largest_extent is not None and max(shape_yx) > network.largest_extent:
        refusal = (
            f"bilinear upsampling by a factor other than 2, 4, 8, ... in float32 is exact up to "
            f"{network.largest_extent} pixels a side (torch rounds its source coordinates), the raster has "
            f"{max(shape_yx)}; run programs"
        )
    return refusal


def choose_method(
    network: Network, method: str | None, shape_yx: tuple[int, int], *, prefer: Method = "window"
) -> Method:
    """The method that is asked for, else the preferred one, else the one that is exact.

    Raises:
        UsageError: no such method.
        UntileableError: windows were asked for, but they cannot be exact.
    """
    if method not in (None, "auto", "window", "program"):
        raise UsageError(f"method must be auto, window or program, got {method!r}")
    refusal = find_window_refusal(network, shape_yx)
    if method == "window" and refusal:
        raise UntileableError(refusal)
    if method == "program" and network.program_refusal:
        raise UsageError(network.program_refusal)
    if method in ("window", "program"):
        return "program" if method == "program" else "window"
    if refusal:
        return "program"
    return "window" if network.program_refusal else prefer


def _choose_fewer_bits_method(
    network: Network, method: str | None, shape_yx: tuple[int, int], precision: Precision
) -> Method:
    """Windows: one network of fixed ranges runs all of them, where each program would be quantised anew; and the start
    check has the same network for larger windows.

    Raises:
        UsageError: programs were asked for.
        UntileableError: windows cannot be exact.
    """
    if method == "program":
        raise UsageError(
            f"precision {precision} runs windows, got --method program; leave it out, or use --precision float32"
        )
    if not network.is_known:
        raise UsageError(
            f"a halo that is only stated is checked in float32, got --precision {precision}; use --precision float32"
        )
    refusal = find_window_refusal(network, shape_yx)
    if refusal:
        raise UntileableError(f"precision {precision} runs windows, use --precision float32: {refusal}")
    return choose_method(network, "window", shape_yx)


def plan_tiles(
    raster: Any,
    network: Network | nn.Module,
    *,
    memory: str | int | None = None,
    engine: str | None = None,
    device: str | None = None,
    device_memory: str | int | None = None,
    batch: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    core: int | None = None,
    region: Window | None = None,
    mark_nodata_context: bool = False,
    method: str | None = None,
    precision: str | None = None,
    compiles: bool = False,
    to_store: bool = False,
    dashboard: bool = False,
    memory_of: MemoryLookup = constant_memory,
    facts: MachineFacts | None = None,
) -> TilePlan:
    """Decide how to run a network over a raster within a memory budget.

    Args:
        raster: an open raster, whatever `open_raster` takes, or a shape (bands, height, width).
        network: analysed, or a module, which is then analysed for the raster's pixels.
        memory: budget of all processes together, such as "2GB"; None: that, and 2 GB more for each CUDA device.
        engine: "openvino" or "torch"; None: torch where it sees a CUDA device, else OpenVINO where it is installed.
        device: "cpu", "cuda" (all CUDA devices, a worker each) or "cuda:N"; None: as for the engine.
        device_memory: budget on each CUDA device; None: 80 % of what is free there.
        batch: windows of one shape that run together; None: what a CUDA device is busy with, 1 on the CPU.
        workers: worker processes; None: one for each 8 cores, or for each CUDA device.
        threads: compute threads of each worker; None: the cores divided among the workers.
        core: side of the cores in output pixels; None: the largest that the budget allows.
        region: what is wanted, in pixels of the raster; None: all of it. Its result equals the whole image's there.
        mark_nodata_context: also write which pixels' receptive fields touch nodata.
        method: "window" or "program"; None: what is faster and exact.
        precision: what the engine computes in; None: float32.
        compiles: run torch's windows by torch.compile.
        to_store: the output is in an object store.
        dashboard: the planning process serves Dask's dashboard too.
        memory_of: what (engine, method, precision, threads, device) add to the network's tensors; `memory_lookup`
            measures it.
        facts: what engines and devices there are; None: those of this machine.

    Raises:
        UsageError: another number or kind of bands than the network takes; options below 1; a region outside.
        EngineError: the engine is not installed, or does not compute in that precision; no such device.
        BudgetError: no core fits the budget; names the smallest budget that can be kept.
    """
    raster = raster if isinstance(raster, tuple) else as_raster(raster)
    shape = raster.shape if isinstance(raster, Raster) else raster
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"a raster's shape must be (bands, height, width), each >= 1, got {shape}")
    network = as_network(network, shape[0], raster.dtype if isinstance(raster, Raster) else None)
    if shape[0] != network.bands:
        raise UsageError(f"the network takes {network.bands} bands, the raster has {shape[0]}; choose a fitting model")
    for name, value in (("workers", workers), ("threads", threads), ("core", core), ("batch", batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be >= 1, got {value}")
    dtype = str(network.dtype).removeprefix("torch.")
    if isinstance(raster, Raster) and raster.dtype != np.dtype(dtype):
        raise UsageError(f"the network was analysed for {dtype} pixels, the raster has {raster.dtype}; analyse again")
    wanted_engine = fit_engine(network, engine, (shape[1], shape[2]), precision)
    facts = facts or find_facts(with_cuda=needs_cuda_facts(wanted_engine, device))
    choice = choose_engine(facts, wanted_engine, device, precision, compiles=compiles)
    engine_name, on_cuda = choice.engine, bool(choice.cuda)
    budget, device_budget = find_budget(memory, len(choice.cuda)), _find_device_budget(choice, device_memory)
    is_long = network.count_flops(network.padded_shape((shape[1], shape[2]))) >= PROGRAM_FLOPS
    does_pay = engine_name == "openvino" and is_long and not mark_nodata_context
    if choice.precision != "float32":
        chosen = _choose_fewer_bits_method(network, method, (shape[1], shape[2]), choice.precision)
    else:
        chosen = choose_method(network, method, (shape[1], shape[2]), prefer="program" if does_pay else "window")
    if mark_nodata_context and network.window_refusal:
        raise UsageError("--mark-nodata-context is for networks that windows can run; leave it out")
    _refuse_batch(choice, chosen, batch)
    if compiles and chosen == "program":
        raise UsageError("--compile is for windows, and this network runs by programs; leave --compile out")
    cpus = cpu_count()
    if on_cuda and workers is not None and workers > len(choice.cuda):
        raise UsageError(
            f"on CUDA workers must be at most one for each of {len(choice.cuda)} devices, got {workers}; leave "
            "--workers out"
        )
    workers = workers or (len(choice.cuda) if on_cuda else max(1, cpus // CORES_PER_WORKER))
    threads = threads or max(1, cpus // workers)
    shape_yx = (shape[1], shape[2])
    region = region or Window.whole(shape_yx)
    if not Window.whole(shape_yx).contains(region) or region.pixels == 0:
        raise UsageError(f"a region must lie inside the raster of {shape[1]} x {shape[2]} px, got {region}")
    wanted = _scaled(network, region, shape_yx)
    output_shape = (network.channels, *wanted.shape)
    output_dtype = str(stored_dtype(network.output_dtype))
    itemsize, output_itemsize = np.dtype(dtype).itemsize, np.dtype(output_dtype).itemsize
    # Where results are stored in fewer bytes than the network gives, both are held.
    own = network.output_dtype.itemsize
    result_itemsize = own if own == output_itemsize else own + output_itemsize

    check_near, check_far = _check_margins(network, choose_method(network, None, shape_yx), shape_yx)
    copies = CLIENT_WEIGHTS + (FEWER_BITS_WEIGHTS if choice.precision != "float32" else 0)
    client_bytes = (
        CLIENT_BYTES[engine_name, chosen] + copies * network.weight_bytes + CHECK_FACTOR * check_near.live_bytes
    )
    engine_memory = memory_of(engine_name, chosen, choice.precision, threads, choice.device)
    store_bytes = STORE_BYTES if to_store or (isinstance(raster, Raster) and raster.is_far) else 0
    source = _describe_source(raster) if isinstance(raster, Raster) else None
    smallest: MemoryPrediction | None = None
    smallest_device = 0
    first: TilePlan | None = None
    best: TilePlan | None = None
    for side in [core] if core else CORES:
        if max(wanted.shape) > MOST_TILES * side:
            continue
        by_row: Geometries = {}
        by_column: Geometries = {}
        if chosen == "program":
            rows, by_row = compute_program_spans(network, 0, shape_yx, side, wanted.rows)
            columns, by_column = compute_program_spans(network, 1, shape_yx, side, wanted.columns)
        else:
            rows = compute_spans(network, 0, shape_yx, side, wanted.rows)
            columns = compute_spans(network, 1, shape_yx, side, wanted.columns)
        tiles = len(rows) * len(columns)
        if core is None and side > LARGEST_CHUNK and tiles < TILES_PER_WORKER[chosen] * workers:
            continue
        window = largest_window(rows, columns)
        pixels = window[0] * window[1]
        core_pixels = min(side, output_shape[1]) * min(side, output_shape[2])
        chunk = (min(side, LARGEST_CHUNK, output_shape[1]), min(side, LARGEST_CHUNK, output_shape[2]))
        if side > LARGEST_CHUNK and side % LARGEST_CHUNK:
            raise UsageError(
                f"a core above {LARGEST_CHUNK} must be a multiple of it, so that a tile owns whole chunks, got {side}"
            )
        load = _Load(
            engine=engine_memory,
            on_cuda=on_cuda,
            workers=workers,
            tiles=tiles,
            client_bytes=client_bytes + store_bytes + (DASHBOARD_BYTES if dashboard else 0),
            activation_bytes=_largest_peak(network, by_row, by_column) if by_row else network.count_live_bytes(window),
            window_bytes=pixels * shape[0] * itemsize,
            mask_bytes=pixels
            * (1 + (8 if mark_nodata_context else 0) + (raster.beside_bytes if isinstance(raster, Raster) else 0)),
            result_bytes=network.channels * result_itemsize * core_pixels,
            output_bytes=_output_bytes(network, window),
            chunk_bytes=2 * chunk[0] * chunk[1] * output_itemsize,
            cache_bytes=store_bytes + (least_held_bytes(rows, columns, source) if source else 0),
            weight_bytes=network.weight_bytes,
        )
        least = batch or 1
        smallest, smallest_device = load.predict_host(least), load.predict_device(least)
        if smallest.total_bytes > budget or smallest_device > device_budget:
            continue
        together = batch or _choose_batch(network, chosen, load, pixels, budget, device_budget)
        # What is left of the budget goes to a start check that looks further, then to blocks that are kept.
        left = budget - load.predict_host(together).total_bytes
        further = CHECK_FACTOR * (check_far.live_bytes - check_near.live_bytes)
        check = check_far if further <= left else check_near
        left -= further if check is check_far else 0
        flops = (
            count_program_flops(network, rows, columns, by_row, by_column)
            if by_row
            else _total_flops(network, rows, columns)
        )
        reading = None
        if source:
            switch_s = SWITCH_S[engine_name, chosen]
            switch_s += (load.activation_bytes / SWITCH_BYTES_PER_S) if switch_s else 0
            reading = plan_reading(
                rows,
                columns,
                source,
                region,
                room_bytes=left // workers,
                work_s=flops / FLOPS_PER_S,
                switch_s=switch_s,
                workers=workers,
            )
            load = replace(load, cache_bytes=store_bytes + reading.held_bytes)
        prediction = load.predict_host(together)
        if check is check_far:
            prediction = replace(prediction, client_bytes=prediction.client_bytes + further)
        candidate = TilePlan(
            raster_shape=(shape[0], shape[1], shape[2]),
            raster_dtype=dtype,
            region=(region.y, region.x, region.height, region.width),
            output_origin=(wanted.y, wanted.x),
            output_shape=output_shape,
            output_dtype=output_dtype,
            core=(side, side),
            chunk=chunk,
            rows=rows,
            columns=columns,
            stride=network.stride,
            scale=(str(network.scale[0]), str(network.scale[1])),
            halo=_span_halo(network, rows, columns) if chosen == "program" else network.halo,
            size_multiple=network.size_multiple,
            method=chosen,
            engine=engine_name,
            precision=choice.precision,
            numbers=find_numbers(network),
            engine_reason=find_refusal(network) if wanted_engine != engine and engine_name == "torch" else "",
            workers=workers,
            threads=threads,
            in_flight=IN_FLIGHT * together,
            device=choice.device,
            device_names=tuple(found.name for found in choice.cuda[:workers]),
            device_bytes=load.predict_device(together),
            device_budget_bytes=device_budget,
            batch=together,
            with_logits=chosen == "window"
            and engine_name == "openvino"
            and network.has_logits
            and len(rows) * len(columns) <= FEW_TILES,
            compiles=compiles,
            memory_budget_bytes=budget,
            memory=prediction,
            flops=flops,
            flops_bare=round(
                network.count_flops(network.padded_shape(shape_yx)) * region.pixels / (shape[1] * shape[2])
            ),
            read_amplification=reading.amplification if reading else 1.0,
            strip_rows=reading.strip_rows if reading else 1,
            strips_first=reading.strips_first if reading else False,
            block=source.block if source else (0, 0),
            cache_bytes=reading.cache_bytes if reading else 0,
            is_known=network.is_known,
            check_margin=check.margin,
            receptive=(_receptive_period(network, 0), _receptive_period(network, 1)) if mark_nodata_context else None,
        )
        first = first or candidate
        if candidate.flops > MOST_WORK * first.flops:
            break
        # Smaller cores where the largest leave no room for the blocks that they share.
        if best is None or candidate.read_amplification < best.read_amplification / MUCH_READ:
            best = candidate
        if best.read_amplification <= MUCH_READ:
            break
    if best is not None:
        return best
    if smallest is None:
        raise UsageError(
            f"a raster of {shape[1]} x {shape[2]} px has more than {MOST_TILES} tiles along one side; give a --region"
        )
    if smallest_device > device_budget:
        raise BudgetError(
            f"device memory must be at least {format_bytes(smallest_device + 0.5 * MB)} for this network (core "
            f"{core or CORES[-1]}), got {format_bytes(device_budget)} on each device; free the device, raise "
            "--device-memory, or use --device cpu"
        )
    if isinstance(raster, Raster) and raster.block_bytes > budget // 4:
        raise BudgetError(
            f"memory must be at least {format_bytes(smallest.total_bytes + 0.5 * MB)}: one block of {raster.path} is "
            f"{raster.block[0]} x {raster.block[1]} px and {format_bytes(raster.block_bytes)}, got "
            f"{format_bytes(budget)}; raise --memory, or rewrite the file in tiles"
        )
    raise BudgetError(
        f"memory must be at least {format_bytes(smallest.total_bytes + 0.5 * MB)} for this network with "
        f"{workers} worker{'s' if workers != 1 else ''} (core {core or CORES[-1]}), got {format_bytes(budget)}; "
        "raise --memory, or use fewer workers"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What the tiles of one core size ask of memory."""

    engine: EngineMemory
    on_cuda: bool
    workers: int
    tiles: int
    client_bytes: int
    activation_bytes: int
    """Of the graph's tensors on the largest window."""
    window_bytes: int
    """Of its pixels."""
    mask_bytes: int
    """Of what is known of its pixels beside them."""
    result_bytes: int
    output_bytes: int
    """Of all that the network gives on the largest window."""
    chunk_bytes: int
    cache_bytes: int
    weight_bytes: int
    """Of the network."""

    def predict_host(self, batch: int) -> MemoryPrediction:
        """Of all processes, with batches of that many windows."""
        copied = {"window_bytes": self.window_bytes, "output_bytes": self.output_bytes}
        return predict_memory(
            engine=self.engine,
            workers=self.workers,
            in_flight=min(IN_FLIGHT * batch, self.tiles),
            client_bytes=self.client_bytes,
            activation_bytes=batch * self.activation_bytes,
            window_bytes=self.window_bytes + self.mask_bytes,
            result_bytes=self.result_bytes,
            chunk_bytes=self.chunk_bytes,
            cache_bytes=self.cache_bytes,
            weight_bytes=self.weight_bytes,
            pinned_bytes=predict_pinned(batch=batch, lanes=LANES, **copied) if self.on_cuda or batch > 1 else 0,
        )

    def predict_device(self, batch: int) -> int:
        """On each CUDA device; 0 without."""
        if not self.on_cuda:
            return 0
        return predict_device(
            self.engine,
            batch=batch,
            lanes=LANES,
            activation_bytes=self.activation_bytes,
            window_bytes=self.window_bytes,
            output_bytes=self.output_bytes,
        )


def _find_device_budget(choice: EngineChoice, device_memory: str | int | None) -> int:
    """Of each CUDA device; 0 without."""
    if not choice.cuda:
        if device_memory is not None:
            raise UsageError("--device-memory is for CUDA devices, and this run is on the CPU; use --memory")
        return 0
    if device_memory is not None:
        return parse_bytes(device_memory)
    return int(DEVICE_SHARE * min(device.free_bytes for device in choice.cuda))


def _refuse_batch(choice: EngineChoice, method: Method, batch: int | None) -> None:
    if batch is not None and batch > 1 and (choice.engine != "torch" or method != "window"):
        raise UsageError(
            f"batches are for torch on windows, this run is {choice.engine} by {method}s; leave --batch out, or use "
            "--engine torch --method window"
        )


def _choose_batch(network: Network, method: Method, load: _Load, pixels: int, budget: int, device_budget: int) -> int:
    """The most windows of that many pixels that both budgets hold and a CUDA device needs to be busy; every worker must
    get some batches of them."""
    if not load.on_cuda or method == "program":
        return 1
    fitting = [
        batch
        for batch in BATCHES
        if batch * pixels <= BATCH_PIXELS
        and IN_FLIGHT * batch * load.workers <= load.tiles
        and load.predict_host(batch).total_bytes <= budget
        and load.predict_device(batch) <= device_budget
    ]
    return fitting[0] if fitting and _takes_batches(network) else 1


def _takes_batches(network: Network) -> bool:
    height, width = (align_up(max(40, smallest), network.size_multiple) for smallest in network.smallest)
    run = network.module.logits if network.has_logits else network.module
    with one_thread():
        return takes_batches(run, network.bands, (height, width), network.dtype)  # pyright: ignore[reportArgumentType]


def _output_bytes(network: Network, window: tuple[int, int]) -> int:
    """Of the network's result on a window, and of its logits."""
    if network.is_known:
        return count_output_bytes(network.graph, image_shapes(network.graph, window))
    pixels = int(window[0] * network.scale[0] + 1) * int(window[1] * network.scale[1] + 1)
    return network.channels * network.output_dtype.itemsize * pixels


def _largest_peak(network: Network, by_row: Geometries, by_column: Geometries) -> int:
    """Live bytes of the program that reads most."""
    rows = max(by_row.values(), key=lambda geometry: geometry.window.length)
    columns = max(by_column.values(), key=lambda geometry: geometry.window.length)
    return count_peak_bytes(network.graph, program_shapes(network.graph, network.pixels, rows, columns))


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckMargin:
    """How much further than it must the start check looks, in input pixels, and the live bytes of that."""

    margin: int
    live_bytes: int


def _check_margins(network: Network, method: Method, shape_yx: tuple[int, int]) -> tuple[_CheckMargin, _CheckMargin]:
    """The least, a stride, and what is wanted, a halo more."""
    height, width = network.output_shape(shape_yx)
    side = min(PATCH, height), min(PATCH, width)
    patch = Window(y=(height - side[0]) // 2, x=(width - side[1]) // 2, height=side[0], width=side[1])
    if method == "window":
        halo = max(network.halo.top, network.halo.bottom, network.halo.left, network.halo.right)
        step = max(network.stride)
    else:
        halo, step = 0, 1
        for axis, core, scale in zip(
            network.on_image(shape_yx), (patch.rows, patch.columns), network.scale, strict=True
        ):
            read = compute_geometry(axis, core).window
            halo = max(halo, int(core.start / scale) - read.start, read.stop - int(core.stop / scale))

    def reach(margin: int) -> _CheckMargin:
        if method == "program":
            live = _count_program_bytes(network, shape_yx, larger_core(network, patch, shape_yx, margin))
        else:
            # Every other patch is looked at from one stride further.
            live = network.count_live_bytes(larger_window(network, patch, shape_yx, margin + step).shape)
        return _CheckMargin(margin=margin, live_bytes=live)

    return reach(step), reach(halo + step)


def _count_program_bytes(network: Network, shape_yx: tuple[int, int], core: Window) -> int:
    rows, columns = (
        compute_geometry(axis, interval)
        for axis, interval in zip(network.on_image(shape_yx), (core.rows, core.columns), strict=True)
    )
    return count_peak_bytes(network.graph, program_shapes(network.graph, network.pixels, rows, columns))


def count_live_bytes(network: Network, method: Method, shape_yx: tuple[int, int], tile: Tile) -> int:
    """Live bytes of the graph while one tile is computed."""
    if method == "window":
        return network.count_live_bytes(tile.window.shape)
    return _count_program_bytes(network, shape_yx, tile.core)


def count_program_flops(
    network: Network, rows: Sequence[Span], columns: Sequence[Span], by_row: Geometries, by_column: Geometries
) -> int:
    """Of all tiles; where every tile has a program of its own, those of the longest spans stand for the others."""
    graph, pixels = network.graph, network.pixels
    if len(by_row) * len(by_column) > 64:
        row, column = (max(found.values(), key=lambda g: g.window.length) for found in (by_row, by_column))
        return len(rows) * len(columns) * count_flops(graph, program_shapes(graph, pixels, row, column))
    counts = [[span.kind for span in spans] for spans in (rows, columns)]
    return sum(
        counts[0].count(r) * counts[1].count(c) * count_flops(graph, program_shapes(graph, pixels, row, column))
        for r, row in by_row.items()
        for c, column in by_column.items()
    )


def _span_halo(network: Network, rows: Sequence[Span], columns: Sequence[Span]) -> Halo:
    """Pixels that programs read beyond their cores, at most, on each side."""
    sides: list[int] = []
    for spans, scale in zip((rows, columns), network.scale, strict=True):
        sides.append(max(0, *(int(span.core[0] / scale // 1) - span.window[0] for span in spans)))
        sides.append(max(0, *(span.window[1] - int(-(-span.core[1] / scale // 1)) for span in spans)))
    return Halo(top=sides[0], bottom=sides[1], left=sides[2], right=sides[3])


def _describe_source(raster: Raster) -> Source:
    return Source(
        shape_yx=raster.shape_yx,
        block=raster.block,
        pixel_bytes=count_pixel_bytes(raster),
        decoder_bytes=raster.block_bytes,
        has_gdal=has_gdal(raster),
    )


def _scaled(network: Network, region: Window, shape_yx: tuple[int, int]) -> Window:
    """The result pixels over a region of the raster."""
    sizes = network.output_shape(shape_yx)
    sides: list[Interval] = []
    for axis, interval in enumerate((region.rows, region.columns)):
        scale = network.scale[axis]
        start, stop = interval.start * scale // 1, -(-interval.stop * scale // 1)
        sides.append(Interval(start=int(start), stop=int(stop)).clamp(sizes[axis]))
    return Window.from_intervals(*sides)


def _receptive_period(network: Network, axis: int) -> tuple[tuple[int, int], ...]:
    """The input intervals of the first result pixels; those of later ones are the same, moved by whole strides."""
    period = int(network.stride[axis] * network.scale[axis])
    needed = [network.needed_interval(axis, Interval(start=i, stop=i + 1)) for i in range(period)]
    return tuple((interval.start, interval.stop) for interval in needed)


def _total_flops(network: Network, rows: Sequence[Span], columns: Sequence[Span]) -> int:
    total = 0
    heights, widths = ([s.window[1] - s.window[0] for s in spans] for spans in (rows, columns))
    for height in set(heights):
        for width in set(widths):
            total += heights.count(height) * widths.count(width) * network.count_flops((height, width))
    return total
