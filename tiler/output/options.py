"""How a run treats the output that it writes: one frozen value, handed on whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ..base.choices import ZarrFormat


class WriteKeywords(TypedDict, total=False):
    """The fields of `WriteOptions`, as keywords of functions that take them one by one."""

    zarr_format: ZarrFormat
    space_check: bool
    resume: bool
    overwrite: bool
    retry_failed: bool
    source_unchanged: bool
    patience: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How a run treats the output that it writes."""

    zarr_format: ZarrFormat = 3
    """3, or 2 for readers that know no other, such as GDAL before 3.12."""
    space_check: bool = True
    """An output that might not fit on the disk is refused."""
    resume: bool = True
    """An output whose fingerprint agrees is continued; False: an existing output is refused."""
    overwrite: bool = False
    """An existing output is replaced."""
    retry_failed: bool = False
    """Tiles that failed in an earlier call are done again; they hold nodata otherwise."""
    source_unchanged: bool = False
    """The caller vouches that files that were replaced or written to since, with their size and time of change as
    before, hold what they held: a copy that was put back."""
    patience: float = 300.0
    """Seconds before a worker that does not answer is restarted, and its tile set aside; more where tiles take long."""
