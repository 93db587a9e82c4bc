"""The memory probe: what an engine adds to a network's tensors, measured on two small cores in a process of its own.

Engines fuse, reorder and pad tensors in ways that only they know, so their share differs from network to network. It
is linear in the live bytes of the graph, so two cores tell it for all.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..base.dtypes import dtype_name
from ..base.errors import EngineError
from ..base.memory import EngineMemory
from ..base.text import MB, last_line
from ..engines.devices import find_cuda, pick_index
from ..engines.loading import load_tiles
from ..engines.memory import MemoryLookup, constant_memory
from ..engines.registry import ENGINES, OWN
from ..system.meter import process_bytes, sample_peak
from ..system.process_end import end_with

if TYPE_CHECKING:
    from ..analysis.network import Network
    from ..base.choices import EngineName, Method, Precision
    from ..base.tile import Tile
    from ..engines.engine import EngineProgram
    from ..engines.quantise import QuantisedNetwork

CORES = (1024, 512, 256, 128, 64)
"""Sides that may be probed; two neighbours are."""
LARGEST_FLOPS = 1.5e11
"""Of the larger of both cores: about a second of one CPU core."""
LARGEST_LIVE_BYTES = 600 * MB
SMALLEST_RASTER = 2048 * 2048
"""Pixels from which it is worth its seconds; smaller rasters are planned with constants."""
TIMEOUT_S = 120
NOISE = 2
"""Windows that a network is quantised on for the probe."""
MARGIN = 1.04
"""On what was measured: the peak of one run differs from that of the next."""
log = logging.getLogger(__name__)


def memory_lookup(
    network: Network, shape_yx: tuple[int, int], budget: int, begins: Callable[[], None] | None = None
) -> MemoryLookup:
    """Measured for this network, where the raster is worth it; what was measured once is kept on this machine.

    Args:
        budget: that the probe keeps too.
        begins: called before a probe, which takes some seconds.
    """
    if shape_yx[0] * shape_yx[1] < SMALLEST_RASTER and network.is_known:
        return constant_memory

    def lookup(
        engine: EngineName, method: Method, precision: Precision, threads: int, device: str = "cpu"
    ) -> EngineMemory:
        return _find(network, engine, method, precision, threads, device, budget, begins)

    return lookup


def _find(
    network: Network,
    engine: EngineName,
    method: Method,
    precision: Precision,
    threads: int,
    device: str,
    budget: int,
    begins: Callable[[], None] | None,
) -> EngineMemory:
    """The engine's memory for a network: from this machine's cache, else probed; constants where the probe fails."""
    from ..engines.program_cache import ProgramCache
    from ..engines.programs import cache_name

    kept = ProgramCache(cache_name(network))
    cores = choose_cores(network, budget)
    name = f"memory-{engine}-{method}-{precision}-{threads}-{cores[0]}"
    if engine not in OWN:
        name += "-" + re.sub(r"\W+", "-", ENGINES.find(engine).version())
    if device != "cpu":
        name += "-" + re.sub(r"\W+", "-", find_cuda()[pick_index(device)].name)
    try:
        return EngineMemory(**json.loads(kept.read_text(name) or ""))
    except (ValueError, TypeError):
        pass
    usual = constant_memory(engine, method, precision, threads, device)
    try:
        if begins is not None:
            begins()
        quantised = _quantise_noise(network, threads) if precision == "int8" else None
        packed = quantised.pack(network, threads) if quantised else None
        points = [probe_core(network, engine, method, precision, threads, core, device, packed) for core in cores]
        uneven = None
        if engine == "openvino" and max(network.stride) > 1:
            uneven = probe_core(network, engine, method, precision, threads, cores[0], device, packed, uneven=True)
    except (OSError, ValueError, EngineError, subprocess.SubprocessError) as error:
        if not network.is_known:
            raise EngineError(f"what this network's tensors take cannot be measured: {error}") from error
        log.warning("the engine's memory could not be measured, planning with constants: %s", error)
        return usual
    found = replace(
        fit_memory(points, usual, on_device=device != "cpu", uneven=uneven),
        calibration_bytes=round(MARGIN * quantised.peak_bytes) if quantised else 0,
    )
    kept.write_text(name, json.dumps(asdict(found)))
    return found


def _quantise_noise(network: Network, threads: int) -> QuantisedNetwork:
    """The network in int8 with the ranges of noise: memory does not look at values."""
    from ..engines.quantise import quantise_network
    from .calibration import CALIBRATED, SIDE

    random, dtype = np.random.default_rng(0), dtype_name(network.dtype)
    shape = (network.bands, *network.padded_shape((SIDE, SIDE)))
    image = (random.random(shape, np.float32) * 100).astype(dtype)
    made = quantise_network(network, [image] * NOISE, threads)
    return replace(made, peak_bytes=made.peak_bytes + (CALIBRATED - NOISE) * image.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedCore:
    """What one core took."""

    live_bytes: int
    """Of the graph's tensors."""
    host_bytes: int
    """That the engine added to a worker."""
    device_bytes: int = 0
    """That torch held on a CUDA device."""


def fit_memory(
    points: Sequence[ProbedCore], usual: EngineMemory, *, on_device: bool, uneven: ProbedCore | None = None
) -> EngineMemory:
    """The line through two cores; on a CUDA device that of the device, while the host holds the same for any core.

    Args:
        uneven: a core at the image's end, off the network's stride; None: as any other.
    """
    small, large = sorted(points, key=lambda point: point.live_bytes)

    def line(low: int, high: int) -> tuple[float, int]:
        factor = max(0.5, (high - low) / max(1, large.live_bytes - small.live_bytes))
        return MARGIN * factor, max(0, round(MARGIN * (high - factor * large.live_bytes)))

    if not on_device:
        factor, constant = line(small.host_bytes, large.host_bytes)
        uneven_factor = 0.0
        if uneven is not None:
            uneven_factor = (MARGIN * uneven.host_bytes - constant) / max(1, uneven.live_bytes)
        return EngineMemory(
            worker_bytes=usual.worker_bytes,
            factor=factor,
            uneven_factor=max(factor, uneven_factor),
            constant_bytes=constant,
        )
    factor, constant = line(small.device_bytes, large.device_bytes)
    return EngineMemory(
        worker_bytes=usual.worker_bytes,
        factor=0.0,
        constant_bytes=round(MARGIN * max(small.host_bytes, large.host_bytes)),
        device_factor=factor,
        device_constant_bytes=constant,
    )


def choose_cores(network: Network, budget: int) -> tuple[int, int]:
    """The largest two neighbouring cores that take no long time and keep the budget, in result pixels."""
    scale = max(float(s) for s in network.scale)
    for core in CORES[:-1]:
        extent = max(64, int(core / scale))
        side = network.padded_shape((extent, extent))
        live = network.count_live_bytes(side)
        if network.count_flops(side) <= LARGEST_FLOPS and live <= min(LARGEST_LIVE_BYTES, budget // 10):
            return (core, core // 2)
    return (CORES[-2], CORES[-1])


def probe_core(
    network: Network,
    engine: EngineName,
    method: Method,
    precision: Precision,
    threads: int,
    core: int,
    device: str = "cpu",
    packed: EngineProgram | None = None,
    *,
    uneven: bool = False,
) -> ProbedCore:
    """What one inner tile of that core takes.

    Args:
        packed: the network for windows; None: it is converted here.
        uneven: the last tile in its place, of an image that ends off the network's stride.

    Raises:
        ValueError: the process failed; carries its last line.
    """
    from ..engines.loading import compile_program
    from ..planning.planner import plan_tiles
    from ..planning.work import count_live_bytes

    halo = network.halo if not network.window_refusal else None
    margin = max(halo.top, halo.bottom, halo.left, halo.right) if halo is not None else core
    scale = max(float(s) for s in network.scale)
    side = int(3 * core / min(1.0, scale)) + 2 * margin + 1
    if uneven:
        side = _find_uneven(network, side, core)
    plan = plan_tiles(
        (network.bands, side, side),
        network,
        engine=engine,
        method=method,
        precision=precision,
        core=core,
        memory="1TB",
        device=device,
        device_memory=None if device == "cpu" else "1TB",
        batch=1,
    )
    rows, columns = plan.grid.counts
    tile = plan.tile(rows - 1, columns - 1) if uneven else plan.tile(rows // 2, columns // 2)
    if method == "program":
        from ..engines.programs import pack_programs

        packed = pack_programs(
            network, engine, threads, (side, side), [tile.core.rows], [tile.core.columns], precision=precision
        )
    elif packed is None:
        packed = compile_program(network, engine, threads, precision)
    live = count_live_bytes(network, method, (side, side), tile)
    shape = (network.bands, *tile.window.shape)
    dtype = dtype_name(network.dtype)
    host, on_device = _measure(replace(packed, device=device), tile, shape, dtype)
    return ProbedCore(live_bytes=live, host_bytes=host, device_bytes=on_device)


def _find_uneven(network: Network, side: int, core: int) -> int:
    """Side of an image whose last tile is nearly a whole core, and ends off the network's stride."""
    for found in range(side, side - int(4 * core / min(network.scale)), -1):
        last = network.output_shape((found, found))[0] % core
        if found % 2 and found % max(network.stride) and last > 0.6 * core:
            return found
    return side - 1


def _measure(packed: EngineProgram, tile: Tile, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    from ..rasters.reading import GDAL_CACHE_BYTES
    from ..system.environment import worker_environment

    # By a pipe, since a pickle in a file would be whoever's can write there; and without the current folder among
    # those that modules come from.
    completed = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        input=pickle.dumps((packed, tile, shape, dtype)),
        env={**os.environ, **worker_environment(GDAL_CACHE_BYTES)},
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    if completed.returncode:
        raise ValueError(last_line(completed.stderr, "it was killed"))
    host, on_device = completed.stdout.split()[-2:]
    return int(host), int(on_device)


def main() -> None:
    """Run the tile as a worker would, and print by how many bytes that grew the process, its image apart, and how many
    torch held on a CUDA device."""
    from ..cluster import jobs
    from ..output import store
    from . import worker  # what a worker holds before its first tile

    del jobs, store, worker
    packed, tile, shape, dtype = pickle.loads(sys.stdin.buffer.read())
    image = (np.random.default_rng(0).random(shape, np.float32) * 100).astype(dtype)
    before = process_bytes()
    with sample_peak() as peak:
        engine = load_tiles(packed)
        for _ in range(2):
            engine.run_tile(image, tile)
    print(max(0, peak[0] - before), engine.device_peak_bytes())


if __name__ == "__main__":
    end_with(main)
