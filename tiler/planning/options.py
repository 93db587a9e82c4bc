"""What a caller may choose of a plan: one frozen value, handed on whole; the planner chooses the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ..base.errors import UsageError
from ..base.geometry import Window


class PlanKeywords(TypedDict, total=False):
    """The fields of `PlanOptions`, as keywords of functions that take them one by one."""

    memory: str | int | None
    engine: str | None
    device: str | None
    device_memory: str | int | None
    batch: int | None
    workers: int | None
    threads: int | None
    core: int | None
    region: Window | None
    bounds: tuple[float, float, float, float] | None
    method: str | None
    precision: str | None
    compiles: bool
    mark_nodata_context: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a caller may choose of a plan; None: the planner chooses.

    Raises:
        UsageError: a number below 1; an area in pixels and in the CRS at once.
    """

    memory: str | int | None = None
    """Budget of all processes together, such as "2GB" or bytes; None: 2 GB, and 2 GB more for each CUDA device."""
    engine: str | None = None
    """"openvino" or "torch"; None: torch where it sees a CUDA device, else OpenVINO where it is installed."""
    device: str | None = None
    """"cpu", "cuda" (all CUDA devices, a worker each) or "cuda:N"; None: as for the engine."""
    device_memory: str | int | None = None
    """Budget on each CUDA device; None: 80 % of what is free there."""
    batch: int | None = None
    """Windows of one shape that run together; None: what a CUDA device is busy with, 1 on the CPU."""
    workers: int | None = None
    """Worker processes; None: one for each 8 cores, or for each CUDA device."""
    threads: int | None = None
    """Compute threads of each worker; None: the cores divided among the workers."""
    core: int | None = None
    """Side of the cores in output pixels; None: the largest that the budget allows."""
    region: Window | None = None
    """What is wanted, in pixels of the raster; None: all of it. Its result equals the whole raster's there."""
    bounds: tuple[float, float, float, float] | None = None
    """(west, south, east, north) in the raster's CRS, in place of `region`: the pixels that they touch are wanted."""
    method: str | None = None
    """"window" or "program"; None: what is faster and exact."""
    precision: str | None = None
    """What the engine computes in; None: float32."""
    compiles: bool = False
    """Torch's windows run by torch.compile."""
    mark_nodata_context: bool = False
    """An array `nodata_context` is written too: 1 where a pixel's receptive field touches nodata."""

    def __post_init__(self) -> None:
        numbers = {"workers": self.workers, "threads": self.threads, "core": self.core, "batch": self.batch}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UsageError(f"{name} must be >= 1, got {value}")
        if self.region is not None and self.bounds is not None:
            raise UsageError("a region is given in pixels or in the CRS, got both --region and --bounds; choose one")
