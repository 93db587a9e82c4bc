"""Copier: what one process does of a transfer, cell by cell; narrows down and tells what cannot be read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..base.choices import ZarrFormat
from ..base.errors import RasterError
from ..base.geometry import Grid, Interval, Window
from ..cluster.tile_map import make_sketch
from ..output.records import require_owner, writing
from ..output.store import MASK, VALID, chunk_name, open_array, seal_chunks
from ..rasters.nodata import Array, Mask
from ..rasters.raster import Raster, RasterReader
from ..system.places import place_of
from .transfer_plan import CACHE_BYTES

IMAGE = "image"
PROBES = 16
"""Windows tried before the work begins; a raster of which none can be read is refused."""
PROBE_SIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRecord:
    """What is kept of a cell that was copied."""

    row: int
    column: int
    pixels: int
    unreadable: tuple[tuple[int, int, int, int, str], ...] = ()
    """(y, x, height, width, reason) of what could not be read: nodata in the copy."""
    state: str = "done"
    lost: bool = False
    """Its worker died over it."""
    chunks: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Bytes and hash of its chunks, by their names in the store."""

    @property
    def error(self) -> str:
        """Why something of it is nodata."""
        return self.unreadable[0][4] if self.unreadable else ""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferJob:
    """All that a process needs to copy any cell."""

    run_id: str
    raster: Raster
    grid: Grid
    out: str
    """Where the copy is made, before it gets its name."""
    chunk: tuple[int, int]
    zarr_format: ZarrFormat
    owned: str
    """The output's own name, beside which its run's folder is."""
    generation: int
    gdal_cache_bytes: int = CACHE_BYTES
    in_flight: int = 1
    packages: tuple[str, ...] = ()

    def open(self, *, watched: bool = False) -> Copier:
        return Copier(self, watched=watched)


class Copier:
    """One process's reader and target arrays of a transfer.

    Several threads may call it: one reads while another writes.
    """

    def __init__(self, job: TransferJob, *, watched: bool = False) -> None:
        self.job = job
        self._sketches: dict[tuple[int, int], bytes] | None = {} if watched else None
        self._read_lock = threading.RLock()
        self._reader: RasterReader | None = None

    def run(self, row: int, column: int) -> CellRecord:
        """Copy one cell; what cannot be read of it is left nodata and told.

        Raises:
            OutputError: the target cannot be written, or is another run's by now.
        """
        window = self.job.grid.window(row, column)
        raster = self.job.raster
        unreadable: list[tuple[Window, str]] = []
        try:
            image, missing = self._read(window)
        except RasterError:
            image = np.full(
                (raster.bands, *window.shape), raster.nodata if raster.nodata is not None else 0, raster.dtype
            )
            missing = np.zeros(window.shape, np.bool_)
            for piece, pixels, where in self._read_pieces(window):
                rows, columns = piece.slices(window)
                if isinstance(pixels, str):
                    unreadable.append((piece, pixels))
                    missing[rows, columns] = True
                else:
                    image[:, rows, columns] = pixels
                    missing[rows, columns] = False if where is None else where
        if self._sketches is not None:
            self._sketches[row, column] = make_sketch(image, self.job.grid.cell, self.job.grid.counts, missing)
        return CellRecord(
            row=row,
            column=column,
            pixels=window.pixels,
            unreadable=tuple((w.y, w.x, w.height, w.width, reason) for w, reason in _joined(unreadable)),
            chunks=self._write(window, image, missing),
        )

    def take_sketch(self, row: int, column: int) -> bytes:
        """The cell's part of the grey picture under the tile map; once."""
        return b"" if self._sketches is None else self._sketches.pop((row, column), b"")

    def _write(self, window: Window, image: Array, missing: Mask | None) -> dict[str, tuple[int, str]]:
        job, out, owned = self.job, place_of(self.job.out), place_of(self.job.owned)
        rows, columns = window.slices()
        with writing(owned):
            require_owner(owned, job.generation)
            open_array(out, IMAGE, "r+", job.zarr_format)[:, rows, columns] = image
            if not job.raster.nodata_rule.is_plain:
                valid = np.full(window.shape, VALID, np.uint8)
                if missing is not None:
                    valid[missing] = 0
                open_array(out, MASK, "r+", job.zarr_format)[rows, columns] = valid
            return seal_chunks(out, chunks_of(job.raster, job.chunk, window, job.zarr_format))

    def _read(self, window: Window) -> tuple[Array, Mask | None]:
        # GDAL's datasets are for one thread at a time.
        with self._read_lock:
            if self._reader is None:
                self._reader = self.job.raster.open_reader()
            try:
                image = self._reader.read(window)
                plain = self.job.raster.nodata_rule.is_plain
                return image, None if plain else self._reader.read_missing(window, image)
            except RasterError:
                # What a reader says after it failed once is not to be believed.
                self.close()
                raise

    def _read_pieces(self, window: Window) -> Iterator[tuple[Window, Array | str, Mask | None]]:
        """Halves of a window that cannot be read at once, and halves of those, down to the file's own blocks."""
        for half in _halves(window, self.job.raster.block):
            try:
                image, missing = self._read(half)
                yield half, image, missing
            except RasterError as error:
                if _halves(half, self.job.raster.block):
                    yield from self._read_pieces(half)
                else:
                    yield half, str(error), None

    def close(self) -> None:
        with self._read_lock:
            if self._reader is not None:
                self._reader.close()
            self._reader = None


def chunks_of(raster: Raster, chunk: tuple[int, int], window: Window, zarr_format: ZarrFormat) -> list[str]:
    """Names of the chunks of a cell."""
    cells = Grid(shape=raster.shape_yx, cell=chunk).cells_touching(window)
    names = [chunk_name(IMAGE, (0, *cell), zarr_format) for cell in cells]
    return names + ([] if raster.nodata_rule.is_plain else [chunk_name(MASK, cell, zarr_format) for cell in cells])


def _halves(window: Window, block: tuple[int, int]) -> list[Window]:
    """A window cut in two along its longer side, in units of blocks, on a boundary of them; none if it is least."""
    for axis in sorted((0, 1), key=lambda a: -window.shape[a] / block[a]):
        sides = [window.rows, window.columns]
        side, unit = sides[axis], block[axis]
        first, last = -(-(side.start + 1) // unit), (side.stop - 1) // unit
        if first > last:
            continue
        middle = (first + last + 1) // 2 * unit
        halves: list[Window] = []
        for part in (Interval(start=side.start, stop=middle), Interval(start=middle, stop=side.stop)):
            sides[axis] = part
            halves.append(Window.from_intervals(*sides))
        return halves
    return []


def _joined(pieces: list[tuple[Window, str]]) -> list[tuple[Window, str]]:
    """Pieces of one width that lie under each other, as one."""
    joined: list[tuple[Window, str]] = []
    for piece, reason in sorted(pieces, key=lambda entry: (entry[0].x, entry[0].y)):
        if joined:
            last, why = joined[-1]
            if (last.x, last.width) == (piece.x, piece.width) and last.y + last.height == piece.y:
                joined[-1] = (Window(y=last.y, x=last.x, height=last.height + piece.height, width=last.width), why)
                continue
        joined.append((piece, reason))
    return joined


def probe_raster(raster: Raster) -> None:
    """Try to read small windows spread over a raster until one succeeds.

    Raises:
        RasterError: none of them can be read; names the first.
    """
    # Within the file's own blocks, so that one bad block does not speak for its neighbours.
    cell = (max(1, min(PROBE_SIDE, raster.block[0])), max(1, min(PROBE_SIDE, raster.block[1])))
    grid = Grid(shape=raster.shape_yx, cell=cell)
    reader = raster.open_reader()
    first: RasterError | None = None
    try:
        for i in range(PROBES):
            # Golden-ratio steps along both axes: spread evenly whatever the number.
            steps = zip(grid.counts, (0.618034, 0.754878), strict=True)
            window = grid.window(*(int(count * (i * step % 1)) for count, step in steps))
            try:
                reader.read_missing(window, reader.read(window))
                return
            except RasterError as error:
                first = first or error
                reader.close()
    finally:
        reader.close()
    assert first is not None
    raise RasterError(f"none of {PROBES} windows spread over it can be read; {first}")
