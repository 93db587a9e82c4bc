"""Predicted memory: what every process of a run holds at its peak, as plain sums of bytes."""

from __future__ import annotations

from dataclasses import dataclass

from .text import MB, parse_bytes

DEFAULT_BUDGET = "2GB"
CUDA_HOST_BYTES = 2000 * MB
"""Of CUDA's libraries in the memory of a worker process, by reports of others: no CUDA device was at hand. Rasters that
are worth a probe (tiler/runs/memory_probe.py) have it measured."""
SENT_WEIGHTS = 1
"""Copies of the weights in what a worker is sent: one for all programs."""
CUDA_CONTEXT_BYTES = 500 * MB
"""Of a CUDA context on its device, beside what torch holds there; by reports of others."""
DEVICE_SHARE = 0.8
"""Of a CUDA device's free memory that a run takes if it is not told."""


def find_budget(memory: str | int | None, cuda_devices: int = 0) -> int:
    """Bytes of all processes together; None: 2 GB, and what CUDA's libraries take for each of its devices.

    Raises:
        UsageError: not a size.
    """
    if memory is None:
        return parse_bytes(DEFAULT_BUDGET) + cuda_devices * CUDA_HOST_BYTES
    return parse_bytes(memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """What an engine adds to the tensors of the graph; measured, see docs/benchmarks.md."""

    worker_bytes: int
    """A worker process before it loads the engine."""
    factor: float
    """Peak of a running program, in units of `cost.compute_peak_bytes`."""
    uneven_factor: float = 0.0
    """The same of a window that ends off the network's stride, whose enlarged tensors are cropped: fewer operations
    can be rewritten there. 0: as `factor`."""
    constant_bytes: int
    """The engine itself, and what a program holds whatever its size; measured with this network, its weights too."""
    weights: float = 0.0
    """Copies of the network's weights that it makes; 0 where they are in the constant."""
    calibration_bytes: int = 0
    """Of the process that finds a network's ranges, before the first program runs."""
    device_factor: float = 0.0
    """On a CUDA device: the peak of a running program in the same units."""
    device_constant_bytes: int = 0
    """There too: what torch holds whatever the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrediction:
    """Peak bytes of a run, summed over its processes (proportional set size)."""

    client_bytes: int
    """The process that plans, schedules and shows progress."""
    worker_bytes: int
    """All workers without programs and buffers."""
    program_bytes: int
    """The programs that run at once."""
    buffer_bytes: int
    """Windows read, results not yet written, block caches."""

    @property
    def total_bytes(self) -> int:
        return self.client_bytes + self.worker_bytes + self.program_bytes + self.buffer_bytes


def predict_memory(
    *,
    engine: EngineMemory,
    workers: int,
    in_flight: int,
    client_bytes: int,
    activation_bytes: int,
    window_bytes: int,
    result_bytes: int,
    chunk_bytes: int,
    cache_bytes: int,
    weight_bytes: int = 0,
    pinned_bytes: int = 0,
    uneven_bytes: int = 0,
    logit_bytes: int = 0,
    with_logits: bool = False,
) -> MemoryPrediction:
    """The sum for `workers` processes that each run one program and hold `in_flight` tiles.

    Args:
        activation_bytes: peak of the graph's tensors on the largest window.
        window_bytes: one window as read, with its nodata mask; while the next is read, its blocks are there too.
        result_bytes: one core of the result.
        chunk_bytes: one output chunk while it is encoded.
        cache_bytes: block cache of one process.
        weight_bytes: of the network. Each worker keeps what it was sent, once for all programs.
        pinned_bytes: what one process copies to its device from, and back to.
        uneven_bytes: peak of the graph's tensors on the largest window that ends off the stride.
        logit_bytes: what a run takes more that gives the logits too. The start check's do, before there are buffers.
        with_logits: so do all others.
    """
    weights = int((SENT_WEIGHTS + engine.weights) * weight_bytes)
    peak = max(engine.factor * activation_bytes, (engine.uneven_factor or engine.factor) * uneven_bytes)
    program = int(peak) + engine.constant_bytes + weights
    buffers = (in_flight + 1) * window_bytes + in_flight * (result_bytes + chunk_bytes) + cache_bytes + pinned_bytes
    if with_logits:
        program += logit_bytes
    else:
        buffers = max(buffers, window_bytes + logit_bytes)
    program_bytes, buffer_bytes = workers * program, workers * buffers
    return MemoryPrediction(
        # Calibration comes before programs and buffers, and takes their place.
        client_bytes=client_bytes + max(0, engine.calibration_bytes - program_bytes - buffer_bytes),
        worker_bytes=workers * engine.worker_bytes,
        program_bytes=program_bytes,
        buffer_bytes=buffer_bytes,
    )


def predict_device(
    engine: EngineMemory, *, batch: int, lanes: int, activation_bytes: int, window_bytes: int, output_bytes: int
) -> int:
    """Peak bytes on a CUDA device that runs `batch` windows at once, with `lanes` batches under way.

    Args:
        activation_bytes: peak of the graph's tensors on the largest window.
        window_bytes: one window as it is copied there.
        output_bytes: results of one window, before they are copied back.
    """
    each = engine.device_factor * activation_bytes + lanes * (window_bytes + output_bytes)
    return CUDA_CONTEXT_BYTES + engine.device_constant_bytes + int(batch * each)


def predict_pinned(*, batch: int, lanes: int, window_bytes: int, output_bytes: int) -> int:
    """Host bytes that windows and results of `lanes` batches are copied from and to: torch's pinned allocator hands out
    powers of two."""
    return lanes * sum(1 << max(0, batch * size - 1).bit_length() for size in (window_bytes, output_bytes))
