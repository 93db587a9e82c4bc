"""Candidates: what each size of cores would take, and the plan that it would be where it fits the budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..analysis.agreement import takes_batches
from ..analysis.network import Network
from ..base.choices import EngineName, Method
from ..base.dtypes import dtype_name
from ..base.errors import UsageError
from ..base.geometry import Interval, align_up
from ..base.memory import MemoryPrediction
from ..base.text import MB
from ..base.tile import Span
from ..engines.memory import MemoryLookup
from ..engines.pixel_types import find_numbers
from ..rasters.parts import count_pixel_bytes, has_gdal
from ..rasters.raster import Raster
from ..rasters.reading import ReadingPlan, Source, least_held_bytes, plan_reading
from ..system.machine import one_thread
from .check_margins import CHECK_FACTOR, CheckMargin, check_margins
from .decisions import largest_window
from .load import ADDED_CLIENT_BYTES, CLIENT_BYTES, CLIENT_WEIGHTS, DASHBOARD_BYTES, FEWER_BITS_WEIGHTS, IN_FLIGHT, Load
from .method import choose_method
from .plan import STORE_BYTES, TilePlan
from .resolved import Resolved
from .spans import Geometries, compute_program_spans, compute_spans, span_halo
from .work import (
    count_logit_bytes,
    count_program_flops,
    count_uneven_bytes,
    count_window_flops,
    largest_peak,
    window_output_bytes,
)

CORES = (4096, 3072, 2048, 1024, 512, 256, 128, 64)
"""Sides of a core that a plan may choose, in output pixels."""
LARGEST_CHUNK = 1024
BATCHES = (16, 8, 4, 2)
"""Windows that may run together on a CUDA device."""
BATCH_PIXELS = 2048 * 2048
"""Of all windows of a batch, at most: such a device is busy with less, and larger batches only take memory."""
TILES_PER_WORKER: dict[Method, int] = {"window": 16, "program": 64}
"""Cores above one chunk are used where every worker gets at least this many. Larger cores save halos, but each of up to
nine kinds of tile touches memory of its own first, as long as the halos of that many take (docs/benchmarks.md)."""
MOST_TILES = 50_000
"""Along one side. A raster that declares more is a mistake or a trap."""
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
"""Of changing to another program or window shape, whatever its size; measured for the default network. Added engines
are taken to change for nothing."""
SWITCH_BYTES_PER_S = 3000 * MB
"""And of its tensors, whose memory is touched anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tiles of one core size."""

    side: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    by_row: Geometries
    """Of programs; empty for windows."""
    by_column: Geometries

    @property
    def tiles(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the largest."""
        return largest_window(self.rows, self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What candidates share: memory that no tile depends on, and how the raster is read."""

    source: Source | None
    """None: only the raster's shape is known."""
    load: Load
    """With nothing of tiles."""
    store_bytes: int
    check_near: CheckMargin
    check_far: CheckMargin


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One size of cores."""

    least: MemoryPrediction
    """With the fewest windows at once."""
    least_device_bytes: int
    plan: TilePlan | None
    """None: it does not fit the budgets."""


def find_candidates(
    resolved: Resolved, memory_of: MemoryLookup, *, to_store: bool, dashboard: bool
) -> Iterator[Candidate]:
    """The core sizes that may be planned, the largest first.

    Args:
        to_store: the output is in an object store.
        dashboard: the planning process serves Dask's dashboard.

    Raises:
        UsageError: a core that divides chunks.
    """
    common = _find_common(resolved, memory_of, to_store=to_store, dashboard=dashboard)
    wanted = resolved.options.core
    for side in [wanted] if wanted else CORES:
        if max(resolved.wanted.shape) > MOST_TILES * side:
            continue
        layout = _lay_out(resolved, side)
        least_tiles = TILES_PER_WORKER[resolved.method] * resolved.workers
        if wanted is None and side > LARGEST_CHUNK and layout.tiles < least_tiles:
            continue
        if side > LARGEST_CHUNK and side % LARGEST_CHUNK:
            raise UsageError(
                f"a core above {LARGEST_CHUNK} must be a multiple of it, so that a tile owns whole chunks, got {side}"
            )
        load = _load_of(resolved, common, layout)
        windows = resolved.options.batch or 1
        least, least_device = load.predict_host(windows), load.predict_device(windows)
        fits = least.total_bytes <= resolved.budget_bytes and least_device <= resolved.device_budget_bytes
        plan = _make_plan(resolved, common, layout, load) if fits else None
        yield Candidate(least=least, least_device_bytes=least_device, plan=plan)


def _find_common(resolved: Resolved, memory_of: MemoryLookup, *, to_store: bool, dashboard: bool) -> Common:
    network, raster, choice = resolved.network, resolved.raster, resolved.choice
    near, far = check_margins(network, choose_method(network, None, resolved.shape_yx), resolved.shape_yx)
    store_bytes = STORE_BYTES if to_store or (raster is not None and raster.is_far) else 0
    copies = CLIENT_WEIGHTS + (FEWER_BITS_WEIGHTS if choice.precision != "float32" else 0)
    client_bytes = (
        CLIENT_BYTES.get((choice.engine, resolved.method), ADDED_CLIENT_BYTES)
        + copies * network.weight_bytes
        + CHECK_FACTOR * near.live_bytes
        + store_bytes
        + (DASHBOARD_BYTES if dashboard else 0)
    )
    load = Load(
        engine=memory_of(choice.engine, resolved.method, choice.precision, resolved.threads, choice.device),
        on_cuda=resolved.on_cuda,
        workers=resolved.workers,
        client_bytes=client_bytes,
        weight_bytes=network.weight_bytes,
    )
    source = _describe_source(raster) if raster is not None else None
    return Common(source=source, load=load, store_bytes=store_bytes, check_near=near, check_far=far)


def _lay_out(resolved: Resolved, side: int) -> Layout:
    network, shape_yx, wanted = resolved.network, resolved.shape_yx, resolved.wanted
    if resolved.method == "program":
        rows, by_row = compute_program_spans(network, 0, shape_yx, side, wanted.rows)
        columns, by_column = compute_program_spans(network, 1, shape_yx, side, wanted.columns)
        return Layout(side=side, rows=rows, columns=columns, by_row=by_row, by_column=by_column)
    rows = compute_spans(network, 0, shape_yx, side, wanted.rows)
    columns = compute_spans(network, 1, shape_yx, side, wanted.columns)
    return Layout(side=side, rows=rows, columns=columns, by_row={}, by_column={})


def _load_of(resolved: Resolved, common: Common, layout: Layout) -> Load:
    network, source, (_, height, width) = resolved.network, common.source, resolved.output_shape
    window = layout.window
    pixels = window[0] * window[1]
    chunk, stored = _chunk_of(resolved, layout), resolved.output_dtype.itemsize
    # Where results are stored in fewer bytes than the network gives, both are held.
    own = network.output_dtype.itemsize
    mask_bytes = 1 + (8 if resolved.options.mark_nodata_context else 0)
    mask_bytes += resolved.raster.beside_bytes if resolved.raster is not None else 0
    held = least_held_bytes(layout.rows, layout.columns, source) if source is not None else 0
    if layout.by_row:
        activation_bytes = largest_peak(network, layout.by_row, layout.by_column)
    else:
        activation_bytes = network.count_live_bytes(window)
    gives_logits = resolved.method == "window" and resolved.choice.engine == "openvino" and network.has_logits
    return replace(
        common.load,
        tiles=layout.tiles,
        activation_bytes=activation_bytes,
        uneven_bytes=count_uneven_bytes(
            network, resolved.shape_yx, layout.rows, layout.columns, layout.by_row, layout.by_column
        ),
        logit_bytes=count_logit_bytes(network, window) if gives_logits else 0,
        window_bytes=pixels * resolved.shape[0] * _pixel_dtype(network).itemsize,
        mask_bytes=pixels * mask_bytes,
        result_bytes=network.channels
        * (own if own == stored else own + stored)
        * min(layout.side, height)
        * min(layout.side, width),
        output_bytes=window_output_bytes(network, window),
        chunk_bytes=2 * chunk[0] * chunk[1] * stored,
        cache_bytes=common.store_bytes + held,
    )


def _chunk_of(resolved: Resolved, layout: Layout) -> tuple[int, int]:
    _, height, width = resolved.output_shape
    return min(layout.side, LARGEST_CHUNK, height), min(layout.side, LARGEST_CHUNK, width)


def _make_plan(resolved: Resolved, common: Common, layout: Layout, load: Load) -> TilePlan:
    """The plan with cores of that size, which fit the budgets."""
    network, choice, rows, columns = resolved.network, resolved.choice, layout.rows, layout.columns
    batch = resolved.options.batch or _choose_batch(resolved, load, layout.window[0] * layout.window[1])
    if load.logit_bytes and layout.tiles <= FEW_TILES:
        generous = replace(load, with_logits=True)
        load = generous if generous.predict_host(batch).total_bytes <= resolved.budget_bytes else load
    # What is left of the budget goes to a start check that looks further, then to blocks that are kept.
    left = resolved.budget_bytes - load.predict_host(batch).total_bytes
    further = CHECK_FACTOR * (common.check_far.live_bytes - common.check_near.live_bytes)
    is_far = further <= left
    left -= further if is_far else 0
    if layout.by_row:
        flops = count_program_flops(network, rows, columns, layout.by_row, layout.by_column)
    else:
        flops = count_window_flops(network, rows, columns)
    reading = None
    if common.source is not None:
        reading = _plan_reading(resolved, layout, load, common.source, room_bytes=left // resolved.workers, flops=flops)
        load = replace(load, cache_bytes=common.store_bytes + reading.held_bytes)
    memory = load.predict_host(batch)
    if is_far:
        memory = replace(memory, client_bytes=memory.client_bytes + further)
    shape, region, wanted = resolved.shape, resolved.region, resolved.wanted
    whole_flops = network.count_flops(network.padded_shape(resolved.shape_yx))
    return TilePlan(
        raster_shape=shape,
        raster_dtype=str(_pixel_dtype(network)),
        region=(region.y, region.x, region.height, region.width),
        output_origin=(wanted.y, wanted.x),
        output_shape=resolved.output_shape,
        output_dtype=str(resolved.output_dtype),
        core=(layout.side, layout.side),
        chunk=_chunk_of(resolved, layout),
        rows=rows,
        columns=columns,
        stride=network.stride,
        scale=(str(network.scale[0]), str(network.scale[1])),
        halo=span_halo(network, rows, columns) if resolved.method == "program" else network.halo,
        size_multiple=network.size_multiple,
        method=resolved.method,
        engine=choice.engine,
        precision=choice.precision,
        numbers=find_numbers(network),
        engine_reason=resolved.engine_reason,
        workers=resolved.workers,
        threads=resolved.threads,
        in_flight=IN_FLIGHT * batch,
        device=choice.device,
        device_names=tuple(found.name for found in choice.cuda[: resolved.workers]),
        device_bytes=load.predict_device(batch),
        device_budget_bytes=resolved.device_budget_bytes,
        batch=batch,
        with_logits=load.with_logits,
        compiles=resolved.options.compiles,
        memory_budget_bytes=resolved.budget_bytes,
        memory=memory,
        flops=flops,
        flops_bare=round(whole_flops * region.pixels / (shape[1] * shape[2])),
        read_amplification=reading.amplification if reading else 1.0,
        strip_rows=reading.strip_rows if reading else 1,
        strips_first=reading.strips_first if reading else False,
        block=common.source.block if common.source else (0, 0),
        cache_bytes=reading.cache_bytes if reading else 0,
        is_known=network.is_known,
        check_margin=(common.check_far if is_far else common.check_near).margin,
        receptive=(_receptive_period(network, 0), _receptive_period(network, 1))
        if resolved.options.mark_nodata_context
        else None,
    )


def _plan_reading(
    resolved: Resolved, layout: Layout, load: Load, source: Source, *, room_bytes: int, flops: int
) -> ReadingPlan:
    switch_s = SWITCH_S.get((resolved.choice.engine, resolved.method), 0.0)
    switch_s += (load.activation_bytes / SWITCH_BYTES_PER_S) if switch_s else 0
    return plan_reading(
        layout.rows,
        layout.columns,
        source,
        resolved.region,
        room_bytes=room_bytes,
        work_s=flops / FLOPS_PER_S,
        switch_s=switch_s,
        workers=resolved.workers,
    )


def _choose_batch(resolved: Resolved, load: Load, pixels: int) -> int:
    """The most windows of that many pixels that both budgets hold and a CUDA device needs to be busy; every worker must
    get some batches of them."""
    if not load.on_cuda or resolved.method == "program":
        return 1
    fitting = [
        batch
        for batch in BATCHES
        if batch * pixels <= BATCH_PIXELS
        and IN_FLIGHT * batch * load.workers <= load.tiles
        and load.predict_host(batch).total_bytes <= resolved.budget_bytes
        and load.predict_device(batch) <= resolved.device_budget_bytes
    ]
    return fitting[0] if fitting and _takes_batches(resolved.network) else 1


def _takes_batches(network: Network) -> bool:
    height, width = (align_up(max(40, smallest), network.size_multiple) for smallest in network.smallest)
    run = network.module.logits if network.has_logits else network.module
    with one_thread():
        return takes_batches(run, network.bands, (height, width), network.dtype)  # pyright: ignore[reportArgumentType]


def _pixel_dtype(network: Network) -> np.dtype:
    return np.dtype(dtype_name(network.dtype))


def _describe_source(raster: Raster) -> Source:
    return Source(
        shape_yx=raster.shape_yx,
        block=raster.block,
        pixel_bytes=count_pixel_bytes(raster),
        decoder_bytes=raster.block_bytes,
        has_gdal=has_gdal(raster),
    )


def _receptive_period(network: Network, axis: int) -> tuple[tuple[int, int], ...]:
    """The input intervals of the first result pixels; those of later ones are the same, moved by whole strides."""
    period = int(network.stride[axis] * network.scale[axis])
    needed = [network.needed_interval(axis, Interval(start=i, stop=i + 1)) for i in range(period)]
    return tuple((interval.start, interval.stop) for interval in needed)
