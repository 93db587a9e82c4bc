"""What the tiles of one core size ask of memory, host and device."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.memory import EngineMemory, MemoryPrediction, predict_device, predict_memory, predict_pinned
from ..base.text import MB
from ..engines.batches import LANES

IN_FLIGHT = 2
"""Tiles that a worker holds at once: one computes while the other is read or written; with batches, as many times."""
CLIENT_BYTES = {
    ("openvino", "window"): 520 * MB,
    ("openvino", "program"): 590 * MB,
    ("torch", "window"): 390 * MB,
    ("torch", "program"): 390 * MB,
}
"""The planning process with torch and Dask loaded, and the traced network; measured, see docs/benchmarks.md."""
ADDED_CLIENT_BYTES = max(CLIENT_BYTES.values())
"""The same with an engine that was added, which nobody has measured."""
DASHBOARD_BYTES = 60 * MB
"""Of Dask's dashboard with the tile map and a visitor; measured."""
CLIENT_WEIGHTS = 4
"""Copies of the weights that it holds: the module's, and three that a program, or the network for windows, is converted
from and to; later the engine's, and those that go to workers. Measured, whatever the number of programs."""
FEWER_BITS_WEIGHTS = 2
"""Copies more of them for the start check, where float32 tells nothing exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the tiles of one core size ask of memory."""

    engine: EngineMemory
    on_cuda: bool
    workers: int
    client_bytes: int
    weight_bytes: int
    """Of the network."""
    tiles: int = 0
    activation_bytes: int = 0
    """Of the graph's tensors on the largest window."""
    uneven_bytes: int = 0
    """The same on the largest window that ends off the stride."""
    logit_bytes: int = 0
    """What a run with logits takes more."""
    with_logits: bool = False
    window_bytes: int = 0
    """Of its pixels."""
    mask_bytes: int = 0
    """Of what is known of its pixels beside them."""
    result_bytes: int = 0
    output_bytes: int = 0
    """Of all that the network gives on the largest window."""
    chunk_bytes: int = 0
    cache_bytes: int = 0

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
            uneven_bytes=batch * self.uneven_bytes,
            logit_bytes=self.logit_bytes,
            with_logits=self.with_logits,
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
