"""What a run keeps of a tile."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRecord:
    """What is kept of a finished or failed tile."""

    row: int
    column: int
    state: str
    """"done" or "failed"."""
    pixels: int
    """Of the core."""
    read_s: float
    compute_s: float
    write_s: float
    worker: str
    error: str = ""
    at: float = 0.0
    """When it ended, in seconds since 1970."""
    chunks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By path in the store: bytes and hash, as they were flushed to the disk before this record was made."""
    decoded_bytes: int = 0
    """Of all blocks that its process decoded since its last record; 0 where the plan keeps none, and nobody counts."""
    checked_bytes: int = 0
    """Of those that it decoded for the start check, apart."""
    undeclared_pixels: int = 0
    """Pixels of the raster under the core that are nodata for NaN or infinity which it does not declare."""
    not_finite_pixels: int = 0
    """Pixels of the core whose result is NaN or infinity though they are no nodata."""

    @classmethod
    def failure(cls, row: int, column: int, pixels: int, error: str, worker: str = "") -> TileRecord:
        return cls(
            row=row,
            column=column,
            state="failed",
            pixels=pixels,
            read_s=0,
            compute_s=0,
            write_s=0,
            worker=worker,
            error=error,
            at=round(time.time(), 3),
        )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}
