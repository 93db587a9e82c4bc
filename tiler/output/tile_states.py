"""Tile states: what became of every tile of a run."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from ..planning.plan import TilePlan
from .resume import Kept
from .store import DONE, FAILED, MISSING
from .tile_record import TileRecord


class TileStates:
    """What became of every tile, in this call and before: a byte each, and the reasons of those that failed."""

    def __init__(self, plan: TilePlan, kept: Kept) -> None:
        self.status = np.zeros(plan.grid.counts, np.uint8)
        self.ended = 0
        """Tiles that ended in this call."""
        self.pixels = 0
        """Of those that were done in this call."""
        self.decoded_bytes = self.checked_bytes = 0
        """Of blocks, by workers in this call; of those for the start check."""
        self.undeclared_pixels = 0
        """Of the raster, nodata in this call for NaN or infinity that it does not declare."""
        self.not_finite_pixels = 0
        """Of the result, NaN or infinity in this call though they are no nodata."""
        self._wanted = plan.region[2] * plan.region[3] / (plan.output_shape[1] * plan.output_shape[2])
        """Pixels of the raster for each of the result."""
        self._reasons: dict[tuple[int, int], str] = {}
        for at, reason in kept.items():
            self._set(at, "failed" if reason else "done", reason)

    def _set(self, at: tuple[int, int], state: str, reason: str) -> None:
        self.status[at] = DONE if state == "done" else FAILED
        self._reasons.pop(at, None)
        if state != "done":
            self._reasons[at] = reason

    def add(self, record: TileRecord) -> None:
        self._set((record.row, record.column), record.state, record.error)
        self.ended += 1
        self.pixels += record.pixels if record.state == "done" else 0
        self.decoded_bytes += record.decoded_bytes + record.checked_bytes
        self.checked_bytes += record.checked_bytes
        self.undeclared_pixels += record.undeclared_pixels
        self.not_finite_pixels += record.not_finite_pixels

    def relate(self, decoded_bytes: int, pixel_bytes: int) -> float | None:
        """Decoded bytes for each byte of the tiles that were done in this call; None where none was counted.

        Args:
            pixel_bytes: of all that is decoded for a pixel of the raster.
        """
        wanted = self.pixels * self._wanted * pixel_bytes
        return decoded_bytes / wanted if decoded_bytes and wanted else None

    def find_missing(self, redo: Collection[tuple[int, int]] | None) -> npt.NDArray[np.bool_]:
        """(down, across) of the tiles that no call has done; of `redo` only, where that is given.

        A byte each, since a run may have millions: nothing else of the command is as long as its grid.
        """
        missing = self.status == MISSING
        if redo is not None:
            wanted = np.zeros_like(missing)
            for row, column in redo:
                if 0 <= row < wanted.shape[0] and 0 <= column < wanted.shape[1]:
                    wanted[row, column] = True
            missing &= wanted
        return missing

    @property
    def failed(self) -> tuple[tuple[int, int, str], ...]:
        """(row, column, reason) of all tiles that hold nodata for want of a result."""
        return tuple((*at, reason) for at, reason in sorted(self._reasons.items()))
