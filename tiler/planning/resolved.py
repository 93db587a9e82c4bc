"""What a plan decides before its tiles: engine, method, workers, budgets, and what of the raster is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..analysis.network import Network, as_network
from ..base.choices import Method
from ..base.dtypes import dtype_name, stored_dtype
from ..base.errors import UsageError
from ..base.geometry import Interval, Window
from ..base.memory import DEVICE_SHARE, find_budget
from ..base.text import parse_bytes
from ..engines.choice import EngineChoice, choose_engine, needs_cuda_facts, require_method
from ..engines.devices import MachineFacts, find_facts
from ..engines.pixel_types import find_refusal, fit_engine
from ..engines.registry import ENGINES
from ..rasters.bounds import window_of_bounds
from ..rasters.opening import as_raster
from ..rasters.raster import Raster
from ..system.machine import cpu_count
from .method import choose_fewer_bits_method, choose_method
from .options import PlanOptions

PROGRAM_FLOPS = 4e12
"""Work from which programs pay that each kind of tile has to be converted for: some ten seconds on two cores."""
CORES_PER_WORKER = 8
"""CPU cores of one worker process; more are slower in one convolution than in two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A raster, a network and options, checked against each other, with every choice made that no tile depends on."""

    network: Network
    raster: Raster | None
    """None: only its shape is known."""
    shape: tuple[int, int, int]
    """(bands, height, width)."""
    options: PlanOptions
    choice: EngineChoice
    engine_reason: str
    """Why the engine is another than the one that would be taken; empty: it is not."""
    method: Method
    workers: int
    threads: int
    budget_bytes: int
    device_budget_bytes: int
    region: Window
    wanted: Window
    """The result pixels over the region."""

    @property
    def shape_yx(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    @property
    def on_cuda(self) -> bool:
        return bool(self.choice.cuda)

    @property
    def output_dtype(self) -> np.dtype[Any]:
        return stored_dtype(self.network.output_dtype)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return self.network.channels, self.wanted.height, self.wanted.width


def resolve_options(
    raster: Any, network: Network | nn.Module, options: PlanOptions, facts: MachineFacts | None
) -> Resolved:
    """Check options against raster, network and machine, and choose what was left open but for the tiles.

    Raises:
        UsageError: another number or kind of bands than the network takes; options that do not go together.
        EngineError: the engine is not installed, or does not compute in that precision; no such device.
    """
    opened = None if isinstance(raster, tuple) else as_raster(raster)
    shape: tuple[int, ...] = raster if opened is None else opened.shape
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"a raster's shape must be (bands, height, width), each >= 1, got {shape}")
    network = as_network(network, shape[0], opened.dtype if opened is not None else None)
    _require_fitting(network, opened, shape)

    shape_yx = (shape[1], shape[2])
    wanted_engine = fit_engine(network, options.engine, shape_yx, options.precision)
    facts = facts or find_facts(with_cuda=needs_cuda_facts(wanted_engine, options.device))
    choice = choose_engine(facts, wanted_engine, options.device, options.precision, compiles=options.compiles)
    budget = find_budget(options.memory, len(choice.cuda))
    device_budget = _find_device_budget(choice, options.device_memory)
    method = _choose_method(network, options, choice, shape_yx)
    _require_consistent(network, options, choice, method)
    workers, threads = _choose_workers(options, choice)
    region = _find_region(options, opened, shape_yx)
    return Resolved(
        network=network,
        raster=opened,
        shape=(shape[0], shape[1], shape[2]),
        options=options,
        choice=choice,
        engine_reason=find_refusal(network) if wanted_engine != options.engine and choice.engine == "torch" else "",
        method=method,
        workers=workers,
        threads=threads,
        budget_bytes=budget,
        device_budget_bytes=device_budget,
        region=region,
        wanted=_scaled(network, region, shape_yx),
    )


def _require_fitting(network: Network, raster: Raster | None, shape: tuple[int, ...]) -> None:
    if shape[0] != network.bands:
        raise UsageError(f"the network takes {network.bands} bands, the raster has {shape[0]}; choose a fitting model")
    dtype = dtype_name(network.dtype)
    if raster is not None and raster.dtype != np.dtype(dtype):
        raise UsageError(f"the network was analysed for {dtype} pixels, the raster has {raster.dtype}; analyse again")


def _choose_method(network: Network, options: PlanOptions, choice: EngineChoice, shape_yx: tuple[int, int]) -> Method:
    if choice.precision != "float32":
        return choose_fewer_bits_method(network, options.method, shape_yx, choice.precision)
    is_long = network.count_flops(network.padded_shape(shape_yx)) >= PROGRAM_FLOPS
    does_pay = choice.engine == "openvino" and is_long and not options.mark_nodata_context
    return choose_method(network, options.method, shape_yx, prefer="program" if does_pay else "window")


def _require_consistent(network: Network, options: PlanOptions, choice: EngineChoice, method: Method) -> None:
    require_method(choice.engine, method)
    # Workers are other processes: that they cannot import the engine is told before any work.
    ENGINES.place(choice.engine)
    if options.mark_nodata_context and network.window_refusal:
        raise UsageError("--mark-nodata-context is for networks that windows can run; leave it out")
    if (options.batch or 1) > 1 and (choice.engine != "torch" or method != "window"):
        raise UsageError(
            f"batches are for torch on windows, this run is {choice.engine} by {method}s; leave --batch out, or use "
            "--engine torch --method window"
        )
    if options.compiles and method == "program":
        raise UsageError("--compile is for windows, and this network runs by programs; leave --compile out")


def _choose_workers(options: PlanOptions, choice: EngineChoice) -> tuple[int, int]:
    """(worker processes, threads of each)."""
    devices = len(choice.cuda)
    if devices and options.workers is not None and options.workers > devices:
        raise UsageError(
            f"on CUDA workers must be at most one for each of {devices} devices, got {options.workers}; leave "
            "--workers out"
        )
    workers = options.workers or devices or max(1, cpu_count() // CORES_PER_WORKER)
    return workers, options.threads or max(1, cpu_count() // workers)


def _find_device_budget(choice: EngineChoice, device_memory: str | int | None) -> int:
    """Of each CUDA device; 0 without."""
    if not choice.cuda:
        if device_memory is not None:
            raise UsageError("--device-memory is for CUDA devices, and this run is on the CPU; use --memory")
        return 0
    if device_memory is not None:
        return parse_bytes(device_memory)
    return int(DEVICE_SHARE * min(device.free_bytes for device in choice.cuda))


def _find_region(options: PlanOptions, raster: Raster | None, shape_yx: tuple[int, int]) -> Window:
    """What is wanted, in pixels of the raster."""
    if options.bounds is not None:
        if raster is None:
            raise UsageError("bounds are in a raster's CRS, got only a shape; give region, in pixels")
        return window_of_bounds(raster.place, options.bounds, shape_yx)
    region = options.region or Window.whole(shape_yx)
    if not Window.whole(shape_yx).contains(region) or region.pixels == 0:
        raise UsageError(f"a region must lie inside the raster of {shape_yx[0]} x {shape_yx[1]} px, got {region}")
    return region


def _scaled(network: Network, region: Window, shape_yx: tuple[int, int]) -> Window:
    """The result pixels over a region of the raster."""
    sizes = network.output_shape(shape_yx)
    sides: list[Interval] = []
    for axis, interval in enumerate((region.rows, region.columns)):
        scale = network.scale[axis]
        start, stop = interval.start * scale // 1, -(-interval.stop * scale // 1)
        sides.append(Interval(start=int(start), stop=int(stop)).clamp(sizes[axis]))
    return Window.from_intervals(*sides)
