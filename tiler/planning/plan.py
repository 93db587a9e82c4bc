"""The plan: every decision of a run, made before the first pixel is read, frozen and printable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from ..base.geometry import Halo, Interval, Window, order_cells
from ..base.memory import MemoryPrediction
from ..base.text import MB
from ..base.tile import Span, Tile
from ..rasters.reading import kind_of
from .decisions import PlanDecisions
from .plan_text import explain_decisions

STORE_BYTES = 70 * MB
"""Of the libraries that talk to an object store, in each process that does; measured, see docs/benchmarks.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan(PlanDecisions):
    """All decisions of a run; a pure function of (raster, network, budget, options)."""

    def tile(self, row: int, column: int) -> Tile:
        """The tile at (row, column)."""
        target = self.grid.window(row, column)
        rows, columns = self.rows[row], self.columns[column]
        core = Window(
            y=target.y + self.output_origin[0],
            x=target.x + self.output_origin[1],
            height=target.height,
            width=target.width,
        )
        window = Window.from_intervals(
            Interval(start=rows.window[0], stop=rows.window[1]),
            Interval(start=columns.window[0], stop=columns.window[1]),
        )
        if self.method == "program":
            top, left = core.y, core.x
        else:
            # Windows start on the stride, so their first pixel is a whole number of output pixels.
            top, left = (
                int(start * Fraction(scale)) for start, scale in zip((window.y, window.x), self.scale, strict=True)
            )
        crop = Window(y=core.y - top, x=core.x - left, height=core.height, width=core.width)
        return Tile(row=row, column=column, core=core, target=target, window=window, crop=crop)

    def order(self) -> Iterator[tuple[int, int]]:
        """Tiles in the order of the run: those of one program or window shape together, so that few are compiled; see
        `geometry.order_cells`. Where a block has all columns, kinds may be done in turn without dropping blocks."""
        return order_cells(
            [kind_of(span) for span in self.rows],
            [kind_of(span) for span in self.columns],
            self.strip_rows,
            strips_first=self.strips_first,
            turning=self.block[1] >= self.raster_shape[2],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same plan."""
        return json.loads(json.dumps(asdict(self)))

    def summarise(self) -> dict[str, Any]:
        """What a list of runs says of a plan; the whole plan stands in the output."""
        return {
            "raster_shape": list(self.raster_shape),
            "region": list(self.region),
            "core": list(self.core),
            "halo": str(self.halo),
            "method": self.method,
            "engine": self.engine,
            "precision": self.precision,
            "device": self.device,
            "workers": self.workers,
            "threads": self.threads,
            "tiles": len(self.grid),
            "memory_budget_bytes": self.memory_budget_bytes,
            "predicted_peak_bytes": self.memory.total_bytes,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TilePlan:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for axis in ("rows", "columns"):
            fields[axis] = tuple(
                Span(core=(s["core"][0], s["core"][1]), window=(s["window"][0], s["window"][1]), kind=s["kind"])
                for s in values[axis]
            )
        if values.get("receptive"):
            fields["receptive"] = tuple(tuple((lo, hi) for lo, hi in axis) for axis in values["receptive"])
        fields["halo"] = Halo(**values["halo"])
        fields["memory"] = MemoryPrediction(**values["memory"])
        return cls(**fields)

    def explain(self, flops_per_s: float | None = None) -> str:
        """The plan in words, with an estimated time where the machine's speed is given."""
        return explain_decisions(self, flops_per_s)
