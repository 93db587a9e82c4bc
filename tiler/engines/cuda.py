"""Batches of windows by torch on a CUDA device: copies beside computation. Not run where the project is developed.

The order of what happens is the same on the CPU, where tests/tiler/engines/test_engine_cuda.py holds it; what only CUDA
has is in `CudaStreams` and `open_cuda`.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base.errors import EngineError
from ..base.geometry import Window
from .batches import LANES, Gatherer
from .devices import pick_index
from .engine import EngineProgram
from .torch import Forward, to_channels_last

if TYPE_CHECKING:
    from ..base.tile import Tile

Array = npt.NDArray[Any]


class Streams(Protocol):
    """Where a device's work is queued."""

    def allocate(self, size: int) -> tuple[Tensor, Tensor]:
        """(host, device): bytes of that number on both sides, for `upload`; one tensor where both sides are one."""
        ...

    def allocate_host(self, size: int) -> Tensor:
        """Bytes on the host, for `download`."""
        ...

    def peak_bytes(self) -> int:
        """Most that torch has held on the device at once; 0 where the device is the host."""
        ...

    def begin(
        self,
        upload: Callable[[], None],
        compute: Callable[[], list[Tensor]],
        download: Callable[[list[Tensor]], None],
    ) -> Callable[[], None]:
        """Queue the three, each after the one before, and each kind in the order of the calls; kinds of different calls
        may run at the same time. Returns what waits until the download is done."""
        ...


class HostStreams:
    """The CPU: nothing to copy, and everything done at once."""

    def allocate(self, size: int) -> tuple[Tensor, Tensor]:
        both = torch.zeros(size, dtype=torch.uint8)
        return both, both

    def allocate_host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def peak_bytes(self) -> int:
        return 0

    def begin(
        self,
        upload: Callable[[], None],
        compute: Callable[[], list[Tensor]],
        download: Callable[[list[Tensor]], None],
    ) -> Callable[[], None]:
        upload()
        download(compute())
        return lambda: None


class CudaStreams:
    """Three streams of a CUDA device, tied together by events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up, self._work, self._down = (torch.cuda.Stream(device) for _ in range(3))

    def allocate(self, size: int) -> tuple[Tensor, Tensor]:
        # Zeroed on the stream that uses it: memory of another stream's may still be read by that one.
        with torch.cuda.stream(self._up):
            return self.allocate_host(size), torch.zeros(size, dtype=torch.uint8, device=self._device)

    def allocate_host(self, size: int) -> Tensor:
        # Only pinned pages are copied beside other work.
        with torch.cuda.device(self._device):
            return torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def begin(
        self,
        upload: Callable[[], None],
        compute: Callable[[], list[Tensor]],
        download: Callable[[list[Tensor]], None],
    ) -> Callable[[], None]:
        # Blocking events sleep while they wait; others would keep a core busy that reads and writes need.
        uploaded, computed, downloaded = (torch.cuda.Event(blocking=True) for _ in range(3))
        with torch.cuda.stream(self._up):
            upload()
            uploaded.record(self._up)
        with torch.cuda.stream(self._work):
            self._work.wait_event(uploaded)
            outputs = compute()
            computed.record(self._work)
        with torch.cuda.stream(self._down):
            self._down.wait_event(computed)
            download(outputs)
            downloaded.record(self._down)

        def wait() -> None:
            downloaded.synchronize()
            outputs.clear()  # not before: their memory would go to the next batch while it is copied

        return wait


class _Lane:
    """Memory of one batch under way: bytes, that grow to what the largest window needs and are used again."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.host = self.device = torch.zeros(0, dtype=torch.uint8)
        self._results: list[Tensor] = []

    def reserve(self, size: int) -> None:
        if self.host.numel() < size:
            self.host, self.device = self._streams.allocate(size)

    def results(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """On the host, one for each output and like it."""
        found: list[Tensor] = []
        for index, output in enumerate(outputs):
            size = output.numel() * output.element_size()
            if index == len(self._results):
                self._results.append(self._streams.allocate_host(size))
            elif self._results[index].numel() < size:
                self._results[index] = self._streams.allocate_host(size)
            found.append(self._results[index][:size].view(output.dtype).view(output.shape))
        return found


@dataclass(frozen=True, slots=True)
class _Kind:
    """Windows that may run as one batch."""

    shape: tuple[int, ...]
    dtype: str
    with_logits: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """A window, and which part of its result is wanted."""

    image: Array
    crop: Window


class BatchTiles:
    """Tiles by window runs in batches of equal windows; several threads may call it at once.

    Batches are always `batch` windows long: what is missing is filled up with windows that nobody looks at. So one
    shape of tensors, and with it one choice of algorithms, serves all tiles of a kind, however many come together.
    """

    def __init__(self, forward: Forward, streams: Streams, batch: int) -> None:
        self._forward, self._streams, self._batch = forward, streams, batch
        self._order = threading.Lock()
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(LANES):
            self._lanes.put(_Lane(streams))
        self._gatherer: Gatherer[_Kind, _Part, tuple[Array, ...]] = Gatherer(self._run, batch)

    def _run(self, kind: _Kind, parts: Sequence[_Part]) -> list[tuple[Array, ...]]:
        lane = self._lanes.get()
        try:
            shape, dtype = (self._batch, *kind.shape), np.dtype(kind.dtype)
            size = prod(shape) * dtype.itemsize
            lane.reserve(size)
            host, device = lane.host[:size], lane.device[:size]
            pixels = host.numpy().view(dtype).reshape(shape)
            for index, part in enumerate(parts):
                pixels[index] = part.image
            found: list[Tensor] = []

            def upload() -> None:
                if lane.device is not lane.host:
                    device.copy_(host, non_blocking=True)

            def compute() -> list[Tensor]:
                images = device.view(getattr(torch, kind.dtype)).view(shape)
                outputs = self._forward(images, with_logits=kind.with_logits)
                # As the host wants them: in the order of their axes, whatever order the convolutions like.
                return [output.contiguous() for output in outputs]

            def download(outputs: list[Tensor]) -> None:
                found.extend(lane.results(outputs))
                for result, output in zip(found, outputs, strict=True):
                    result.copy_(output, non_blocking=True)

            with self._order, torch.inference_mode():
                wait = self._streams.begin(upload, compute, download)
            wait()
            return [self._cut(found, index, part.crop) for index, part in enumerate(parts)]
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the device has no memory left for {self._batch} x {kind.shape[-2]} x {kind.shape[-1]} pixels; give a "
                "smaller --device-memory, --batch or --core"
            ) from error
        finally:
            self._lanes.put(lane)

    @staticmethod
    def _cut(found: list[Tensor], index: int, crop: Window) -> tuple[Array, ...]:
        rows, columns = crop.slices()
        # Copies: the lane's memory is the next batch's.
        return tuple(result[index].numpy()[:, rows, columns].copy() for result in found)

    def _outputs(self, image: Array, tile: Tile, *, with_logits: bool) -> tuple[Array, ...]:
        kind = _Kind(shape=image.shape, dtype=str(image.dtype), with_logits=with_logits)
        return self._gatherer(kind, _Part(image=image, crop=tile.crop))

    def run_tile(self, image: Array, tile: Tile) -> Array:
        return self._outputs(image, tile, with_logits=False)[0]

    def run_tile_with_logits(self, image: Array, tile: Tile) -> tuple[Array, Array]:
        outputs = self._outputs(image, tile, with_logits=True)
        return outputs[0], outputs[-1]

    def device_peak_bytes(self) -> int:
        return self._streams.peak_bytes()


def pick_device(device: str, visible: int) -> int:
    """Which of the CUDA devices that a process sees is its own.

    Workers are shown one device each, by the cluster that starts them (tiler/cluster/client.py, or dask-cuda); a
    process that sees several takes the one that is named, else the first.

    Raises:
        EngineError: there is none of that number.
    """
    index = pick_index(device)
    if visible == 1:
        return 0
    if index >= visible:
        raise EngineError(f"this worker needs {device}, and sees {visible} CUDA devices; use --device cpu, or others")
    return index


def open_cuda(device: str, *, limit_bytes: int = 0, tf32: bool = False) -> torch.device:
    """This process's CUDA device, set up for exact and repeated work on few shapes.

    Args:
        limit_bytes: that torch may hold on it; 0: all.
        tf32: round inputs of products to 10 bits, another result than the module's.

    Raises:
        EngineError: there is no such device.
    """
    found = torch.device("cuda", pick_device(device, torch.cuda.device_count()))
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    # Algorithms are timed once for each of the few shapes; what they take stays below the limit.
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(found)
    if limit_bytes:
        total = torch.cuda.get_device_properties(found).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), found)
    return found


def load_batches(program: EngineProgram) -> BatchTiles:
    """The engine in a worker process.

    Raises:
        EngineError: the device is not there, or too small for the weights.
    """
    module = pickle.loads(program.payload[0])
    if program.channels_last:
        module = to_channels_last(module)
    streams: Streams = HostStreams()
    if program.device == "cpu":
        torch.set_num_threads(program.threads)
    else:
        device = open_cuda(program.device, limit_bytes=program.device_limit_bytes, tf32=program.precision == "tf32")
        module = module.to(device)
        torch.cuda.synchronize(device)  # the weights were copied on another stream than those that will use them
        streams = CudaStreams(device)
    forward = Forward(
        module,
        has_logits=program.has_logits,
        precision=program.precision,
        device=program.device,
        compiles=program.compiles,
    )
    return BatchTiles(forward, streams, program.batch)
