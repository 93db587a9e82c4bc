"""Run summary: what a call of predict did, for people and programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..engines.precision_loss import PrecisionLoss
from .check import StartCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did; of this call only, where it continued an earlier one."""

    out: str
    pixels: int
    """Output pixels of the tiles done in this call."""
    startup_s: float
    """Until the first read; from the caller's beginning, where it was given."""
    seconds: float
    """First read to last chunk."""
    mpx_per_s: float
    peak_bytes: int
    """Sum of the PSS of all processes on this machine, sampled."""
    predicted_peak_bytes: int
    tiles: int
    resumed_tiles: int
    """Tiles that were already there."""
    failed_tiles: tuple[tuple[int, int, str], ...]
    """(row, column, reason)."""
    start_check: StartCheck | None
    """None where nothing was left to do."""
    read_amplification: float | None
    """Bytes of all blocks that workers decoded for each byte of the tiles that were done; None where the plan keeps no
    blocks, and nobody counts."""
    check_read_amplification: float
    """Of that the start check's share: some tiles, whose blocks are seldom still there when their turn comes."""
    predicted_read_amplification: float
    """By the plan, at most, without the start check."""
    engine: str
    precision: str
    device: str
    device_peak_bytes: int
    """Most that torch held on a CUDA device, its context apart; 0 on the CPU."""
    predicted_device_peak_bytes: int
    undeclared_pixels: int = 0
    """Pixels of the raster that became nodata for NaN or infinity in all bands, which the raster does not declare."""
    not_finite_pixels: int = 0
    """Pixels of the result that are NaN or infinity though the raster has pixels there."""
    loss: PrecisionLoss | None = None
    """Of a precision below float32: what it cost, measured when the output was begun."""

    def to_json(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "pixels": self.pixels,
            "startup_s": round(self.startup_s, 3),
            "seconds": round(self.seconds, 3),
            "mpx_per_s": round(self.mpx_per_s, 4),
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "tiles": self.tiles,
            "resumed_tiles": self.resumed_tiles,
            "failed_tiles": len(self.failed_tiles),
            "failures": [{"row": r, "column": c, "error": e} for r, c, e in self.failed_tiles],
            "start_check_max_abs": self.start_check.max_abs if self.start_check else None,
            "start_check_flipped": self.start_check.flipped if self.start_check else None,
            "read_amplification": None if self.read_amplification is None else round(self.read_amplification, 3),
            "check_read_amplification": round(self.check_read_amplification, 3),
            "predicted_read_amplification": round(self.predicted_read_amplification, 3),
            "undeclared_pixels": self.undeclared_pixels,
            "not_finite_pixels": self.not_finite_pixels,
            "engine": self.engine,
            "precision": self.precision,
            "precision_loss": self.loss.to_json() if self.loss else None,
            "device": self.device,
            "device_peak_bytes": self.device_peak_bytes,
            "predicted_device_peak_bytes": self.predicted_device_peak_bytes,
        }
