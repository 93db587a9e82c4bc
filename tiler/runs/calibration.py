"""Calibration windows: where in a raster a network's ranges are found, and where its loss is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..analysis.network import Network
from ..base.errors import RasterError
from ..base.geometry import Window
from ..rasters.nodata import Array, Mask
from ..rasters.raster import FilledWindow, Raster, read_filled

CALIBRATED, HELD_OUT = 32, 8
"""Windows that ranges are found on, and others that the loss is measured on."""
SIDE = 256
"""Of a window, in pixels of the raster."""
MOST_MISSING = 0.5
"""Share of nodata above which a window is taken only where there are too few others."""
TRIES = 4
"""Windows that are looked at for each that is wanted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A window of the raster as a run reads it."""

    image: Array
    """(bands, height, width), nodata filled."""
    missing: Mask | None
    """(height, width); None where every pixel is valid."""

    @property
    def missing_share(self) -> float:
        return 0.0 if self.missing is None else float(self.missing.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Windows of one raster, none of them in both parts."""

    calibrated: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    """Empty where the raster is too small for more than one window."""


def spread_windows(network: Network, shape_yx: tuple[int, int], region: Window) -> Iterator[Window]:
    """Windows spread evenly over a region, without end and always the same; those of small regions come again.

    They lie in the padded raster, and have sizes that the network takes.
    """
    padded = network.padded_shape(shape_yx)
    height, width = network.padded_shape((min(SIDE, region.height), min(SIDE, region.width)))
    free_y = max(0, min(region.y + region.height, padded[0]) - region.y - height)
    free_x = max(0, min(region.x + region.width, padded[1]) - region.x - width)
    top, left = min(region.y, padded[0] - height), min(region.x, padded[1] - width)
    number = 0
    while True:
        # Multiples of the plastic number's inverses: no two near one another, however many there are.
        y, x = (
            int((0.5 + number * step) % 1 * (free + 1)) for step, free in ((0.7548777, free_y), (0.5698403, free_x))
        )
        yield Window(y=top + y, x=left + x, height=height, width=width)
        number += 1


def read_calibration(raster: Raster, network: Network, region: Window, fill: tuple[float, ...]) -> CalibrationSet:
    """Read windows for both parts; those that cannot be read are passed over, and those of mostly nodata taken last.

    Raises:
        RasterError: none can be read.
    """
    wanted = CALIBRATED + HELD_OUT
    good: list[Sample] = []
    poor: list[Sample] = []
    seen: set[Window] = set()
    failure: RasterError | None = None
    reader = raster.open_reader()
    try:
        for number, window in enumerate(spread_windows(network, raster.shape_yx, region)):
            if number >= TRIES * wanted or len(good) >= wanted:
                break
            if window in seen:
                continue
            seen.add(window)
            try:
                filled: FilledWindow = read_filled(reader, raster, window, fill)
            except RasterError as error:
                failure = error
                reader.close()
                reader = raster.open_reader()
                continue
            sample = Sample(filled.image, filled.missing)
            if sample.missing_share <= MOST_MISSING:
                good.append(sample)
            elif len(poor) < wanted:
                poor.append(sample)
    finally:
        reader.close()
    poor.sort(key=lambda sample: sample.missing_share)
    chosen = (good + poor)[:wanted]
    if not chosen:
        raise failure or RasterError(f"no window of {raster.path} can be read for calibration")
    share = HELD_OUT / wanted
    # Every fifth, so that both parts are spread over the raster.
    held_out = {index for index in range(len(chosen)) if int((index + 1) * share) > int(index * share)}
    return CalibrationSet(
        calibrated=tuple(sample for index, sample in enumerate(chosen) if index not in held_out),
        held_out=tuple(sample for index, sample in enumerate(chosen) if index in held_out),
    )
