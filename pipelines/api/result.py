"""The result of a run: its pixels, what they mean, and what became of the run; opened again at any time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from affine import Affine
from PIL import Image
from rasterio.crs import CRS

from ...models.segmentation.networks.model import SegmentationClass
from ...tiler.base.errors import OutputError, UsageError
from ...tiler.base.geometry import Halo, Window
from ...tiler.base.html import render_table
from ...tiler.output.records import read_records
from ...tiler.output.store import plan_of, read_header
from ...tiler.planning.plan import TilePlan
from ...tiler.rasters.opening import open_raster
from ...tiler.rasters.raster import Raster
from ...tiler.runs.summary import RunSummary
from ...tiler.runs.verify import Verification, tile_states, verify_output
from ...tiler.system.places import place_of
from ...tiler.system.stores import store_at
from ..base.console import SilentConsole
from ..base.page import require_page_target
from ..segment.areas import Areas, count_areas
from ..segment.export import run_export
from ..segment.quicklook import make_quicklook
from ..segment.report import write_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from xarray import DataArray


def open_result(path: str | os.PathLike[str]) -> Result:
    """An output that `segment` or `predict` wrote, finished or not.

    Raises:
        OutputError: it is not an output, or its metadata are damaged.
    """
    return Result(place_of(str(path)))


def result_of(summary: RunSummary) -> Result:
    """The output of a call, with its summary."""
    return Result(place_of(summary.out), summary)


class Result:
    """An output store: a raster of classes, probabilities, logits or values, with all that is known of it.

    Pixels are read when they are asked for, never all at once but by `read()` without a window.

    Args:
        path: of the store.
        summary: of the call that made it; None: it was opened.

    Raises:
        OutputError: it is not an output, or its metadata are damaged.
    """

    def __init__(self, path: Path, summary: RunSummary | None = None) -> None:
        self.path = path
        self.summary = summary
        """What the call of `segment` did that gave this; None: the result was opened."""
        self._header = read_header(path)
        self._raster = open_raster(path / self.kind)

    @property
    def kind(self) -> str:
        """ "class", "probability", "logits" or "values"."""
        return self._header["kind"]

    @property
    def raster(self) -> Raster:
        """The pixels, as any other raster."""
        return self._raster

    @property
    def plan(self) -> TilePlan:
        """Every decision of the run."""
        return plan_of(self.path, self._header)

    @property
    def halo(self) -> Halo:
        """Input pixels around a core that the network needs, on each side."""
        return self.plan.halo

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self._raster.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._raster.dtype

    @property
    def nodata(self) -> float | None:
        """The value of pixels without a result; NaN of floats."""
        return self._raster.nodata

    @property
    def crs(self) -> CRS | None:
        """None: the source does not say where on the Earth it lies."""
        return self._raster.crs

    @property
    def transform(self) -> Affine:
        """From (column, row) of a pixel's corner to (x, y) in the CRS."""
        return self._raster.transform

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) in the CRS."""
        return self._raster.bounds

    @property
    def model(self) -> str:
        """Name of the model; empty: nobody said."""
        return self._header["model"]

    @property
    def classes(self) -> tuple[SegmentationClass, ...]:
        """By their numbers."""
        return tuple(
            SegmentationClass(name=entry["name"], colour=(entry["colour"][0], entry["colour"][1], entry["colour"][2]))
            for entry in self._header["classes"]
        )

    @property
    def is_finished(self) -> bool:
        """Whether every tile has an end, done or failed."""
        return "run" in read_header(self.path)

    @property
    def failed_tiles(self) -> tuple[tuple[int, int, str], ...]:
        """(row, column, reason) of tiles that could not be computed; they hold nodata."""
        if self.summary is not None:
            return self.summary.failed_tiles
        states, records = tile_states(self.path, self._header), read_records(self.path)
        failed = [at for at, state in states.items() if state == "failed"]
        return tuple((*at, str(records[at].get("error", "")) if at in records else "") for at in failed)

    def read(self, window: Window | None = None, *, masked: bool = False) -> npt.NDArray[Any]:
        """(channels, height, width) of a window of the result. None: all of it, which must fit into memory.

        Args:
            masked: a numpy.ma array, nodata masked.

        Raises:
            UsageError: the window reaches beyond the result.
            OutputError: it cannot be read.
        """
        return self._raster.read(window, masked=masked)

    def to_xarray(self) -> DataArray:
        """The result as a lazy array of xarray: dimensions, coordinates of pixel centres, CRS for rioxarray.

        Raises:
            UsageError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise UsageError("to_xarray needs xarray; pip install xarray") from None
        data = xarray.open_zarr(store_at(self.path, read_only=True), consolidated=False, mask_and_scale=False)
        if "spatial_ref" in data:
            data = data.set_coords("spatial_ref")
        return data[self.kind]

    def to_geotiff(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a cloud-optimised GeoTIFF, with names and colours of the classes, in bounded memory; its path.

        Raises:
            UsageError: another suffix than .tif or .tiff.
            OutputError: something is there, or it cannot be written.
        """
        return self._export(path, (".tif", ".tiff"), overwrite=overwrite)

    def to_png(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a picture of input and result side by side, with a legend; its path.

        Raises:
            UsageError: another suffix than .png.
            OutputError: something is there, or it cannot be written.
        """
        return self._export(path, (".png",), overwrite=overwrite)

    def to_report(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a page on the run that opens anywhere: pictures, areas, plan, checks, failures; its path.

        Raises:
            UsageError: another suffix than .html.
            OutputError: something is there, or it cannot be written.
        """
        target = place_of(str(path))
        require_page_target(target, overwrite=overwrite)
        write_report(SilentConsole(), self.path, target)
        return target

    def picture(self) -> Image.Image:
        """The result, shrunk to a few hundred pixels, in its classes' colours; others in grey or three channels."""
        return make_quicklook(SilentConsole(), self.path, self._header).result

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result with matplotlib, in coordinates of its CRS, with a legend of its classes.

        Args:
            ax: to draw on; None: new ones.

        Raises:
            UsageError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
            from matplotlib.patches import Patch
        except ImportError:
            raise UsageError("plot needs matplotlib; pip install matplotlib, or use picture()") from None
        quicklook = make_quicklook(SilentConsole(), self.path, self._header)
        if ax is None:
            _, ax = pyplot.subplots()
        west, south, east, north = self.bounds
        placed = self.crs is not None and not self._raster.place.is_rotated
        height, width = self._raster.shape_yx
        ax.imshow(quicklook.result, extent=(west, east, south, north) if placed else (0, width, height, 0))
        ax.ticklabel_format(useOffset=False, style="plain")
        ax.locator_params(axis="x", nbins=4)
        ax.set_title(f"{self.kind}, {self.model}" if self.model else self.kind)
        handles = [
            Patch(color=(red / 255, green / 255, blue / 255), label=f"{name} {100 * share:.1f} %")
            for name, (red, green, blue), share in quicklook.legend
        ]
        if handles:
            ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        return ax

    def count_areas(self) -> Areas:
        """What each class covers, every pixel counted: pixels, shares, hectares on the ellipsoid.

        Raises:
            UsageError: not a class map.
            OutputError: the run is unfinished, and its missing tiles would count as nodata.
        """
        if self.kind != "class":
            raise UsageError(f"areas are those of classes, this result holds {self.kind}; segment with output='class'")
        self._require_finished()
        return count_areas(SilentConsole(), self.path, self._header)

    def verify(self) -> Verification:
        """Read every chunk, and compare it with what the run's records say of it.

        Raises:
            OutputError: it cannot be read at all.
        """
        return verify_output(self.path)

    def __repr__(self) -> str:
        channels, height, width = self.shape
        state = "" if self.is_finished else ", unfinished"
        failed = f", {len(self.failed_tiles)} failed tiles" if self.is_finished and self.failed_tiles else ""
        return f"<Result {self.path}: {self.kind}, {channels} x {height} x {width} {self.dtype}{state}{failed}>"

    def _repr_html_(self) -> str:
        channels, height, width = self.shape
        rows = {
            "kind": self.kind,
            "shape": f"{channels} x {height} x {width}, {self.dtype}",
            "model": self.model or "not named",
            "classes": ", ".join(entry.name for entry in self.classes[:_MOST_LISTED]),
            "CRS": self._raster.place.crs_name,
            "state": "finished" if self.is_finished else "unfinished",
        }
        if self.is_finished:
            rows["failed tiles"] = str(len(self.failed_tiles))
        if self.summary is not None:
            rows["this call"] = f"{self.summary.tiles} tiles, {self.summary.mpx_per_s:.2f} Mpx/s"
        return render_table(f"Result {self.path}", rows)

    def _export(self, path: str | os.PathLike[str], suffixes: tuple[str, ...], *, overwrite: bool) -> Path:
        target = place_of(str(path))
        if target.suffix.lower() not in suffixes:
            raise UsageError(f"the name must end in {' or '.join(suffixes)}, got {target.name}")
        self._require_finished()
        run_export(SilentConsole(), self.path, target, overwrite=overwrite)
        return target

    def _require_finished(self) -> None:
        if not self.is_finished:
            raise OutputError(f"{self.path} is unfinished; the same segment resumes it")


_MOST_LISTED = 8
"""Names of classes that are shown."""
