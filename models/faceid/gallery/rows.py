"""A gallery's rows: checked by whoever reads a tablet first, kept in memory or read block by block."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..layer.tablets import Tablet
from .files import STORAGE, Manifest, check_tablet, read_rows, read_whole
from .search import RowReader, count_most


class TabletRows:
    """Rows of one generation. No row comes from a file whose checksum was not looked at in this process, since it last
    changed."""

    def __init__(self, folder: Path, manifest: Manifest, before: TabletRows | None = None) -> None:
        """Args:
        before: of the generation before, whose files are not read again where they are the same.
        """
        self.folder, self.manifest = folder, manifest
        self._locks = [threading.Lock() for _ in manifest.tablets]
        names = [entry.name for entry in manifest.tablets]
        self._kept = {name: before._kept[name] for name in names if before and name in before._kept}
        self._sound = {name: before._sound[name] for name in names if before and name in before._sound}

    def keep(self, tablet: Tablet, block_rows: int) -> Tensor:
        """A tablet's rows in memory, padded to whole blocks, read by the first thread that wants them.

        Raises:
            GalleryError: its file is damaged, or gone.
        """
        name = self.manifest.tablets[tablet.index].name
        with self._locks[tablet.index]:
            if name not in self._kept:
                padded = -(-tablet.rows // block_rows) * block_rows
                rows = torch.zeros((padded, self.manifest.dim), dtype=STORAGE[self.manifest.storage])
                read_whole(self.folder, self.manifest, tablet.index, rows[: tablet.rows])
                self._kept[name] = rows
            return self._kept[name]

    def read(self, index: int, start: int, out: Tensor) -> None:
        """Rows of a tablet from `start` on into `out`.

        Raises:
            GalleryError: its file is damaged, or gone.
        """
        name = self.manifest.tablets[index].name
        found = read_rows(self.folder, self.manifest, index, start, out)
        if self._sound.get(name) != found:
            with self._locks[index]:
                if self._sound.get(name) != found:
                    self._sound[name] = check_tablet(self.folder, self.manifest, index)
            if self._sound[name] != found:  # it has become another between the two
                self.read(index, start, out)

    def read_row(self, row: int) -> npt.NDArray[np.float32]:
        """One row of the gallery."""
        index, place = divmod(row, self.manifest.tablet_rows)
        value = torch.empty((1, self.manifest.dim), dtype=STORAGE[self.manifest.storage])
        self.read(index, place, value)
        return value[0].float().numpy()


class GalleryRows:
    """What a search reads of a gallery: rows with their owners, as of one generation."""

    def __init__(self, rows: TabletRows, owners: npt.NDArray[np.int32], *, keep: bool) -> None:
        self._rows, self._owners, self._keep = rows, owners, keep
        self._most_rows = count_most(owners)

    @property
    def dim(self) -> int:
        return self._rows.manifest.dim

    @property
    def owners(self) -> npt.NDArray[np.integer]:
        return self._owners

    @property
    def most_rows(self) -> int:
        return self._most_rows

    def name_of(self, tablet: Tablet) -> str:
        return str(self._rows.folder / self._rows.manifest.tablets[tablet.index].name)

    def open_reader(self, block_rows: int) -> RowReader:
        return _BlockReader(self._rows, block_rows, keep=self._keep)


class _BlockReader:
    """One thread's blocks."""

    def __init__(self, rows: TabletRows, block_rows: int, *, keep: bool) -> None:
        self._rows, self._keep, self._size = rows, keep, block_rows
        self._storage = STORAGE[rows.manifest.storage]
        self._buffers: dict[torch.dtype, Tensor] = {}

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """A block of a type, made when it is first wanted."""
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.zeros((self._size, self._rows.manifest.dim), dtype=dtype)
        return self._buffers[dtype]

    def read(self, tablet: Tablet, start: int) -> Tensor:
        if self._keep:
            rows = self._rows.keep(tablet, self._size)[start : start + self._size]
        else:
            rows = self._buffer(self._storage)
            self._rows.read(tablet.index, start, rows[: min(self._size, tablet.rows - start)])
        return rows if rows.dtype == torch.float32 else self._buffer(torch.float32).copy_(rows)
