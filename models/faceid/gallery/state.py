"""A gallery in memory, as one generation of its files has it: whose each row is, names, and the rows themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..base.errors import GalleryError
from ..base.name_list import NameList
from ..layer.tablets import BLOCK_ROWS, TabletLayout
from .files import STORAGE, Manifest, read_names, read_newest, read_owners
from .rows import TabletRows
from .top_k import NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryState:
    """A generation in memory."""

    manifest: Manifest
    owners: npt.NDArray[np.int32]
    """(rows,): the person's number; -1 where a row's person was removed."""
    names: NameList
    rows: TabletRows

    @classmethod
    def read(cls, folder: Path) -> GalleryState:
        """The newest whole generation of a folder.

        Raises:
            GalleryError: there is none, or it is damaged.
        """
        manifest = read_newest(folder)
        names = NameList(read_names(folder, manifest, index) for index in range(len(manifest.names)))
        parts: list[npt.NDArray[np.int32]] = []
        for index, entry in enumerate(manifest.tablets):
            whose = read_owners(folder, manifest, index)
            if whose.min() < NOBODY or whose.max() >= len(names):
                raise GalleryError(
                    f"{folder / entry.name} is damaged: its rows belong to persons {whose.min()} ... {whose.max()}, "
                    f"there are {len(names)}"
                )
            parts.append(whose.astype(np.int32))
        owners = np.concatenate(parts) if parts else np.empty(0, np.int32)
        return cls(manifest=manifest, owners=owners, names=names, rows=TabletRows(folder, manifest))

    def with_rows_of(self, before: GalleryState) -> GalleryState:
        """The same; what was read and checked of the generation before is not read again."""
        return replace(self, rows=TabletRows(self.rows.folder, self.manifest, before.rows))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored rows."""
        return STORAGE[self.manifest.storage]

    @property
    def templates(self) -> int:
        """Rows of all persons."""
        return int(np.count_nonzero(self.owners != NOBODY))

    @property
    def people(self) -> int:
        """Persons who have a row."""
        return int(np.count_nonzero(np.bincount(self.owners[self.owners != NOBODY])))

    def rows_of(self, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Where the rows of persons are, ascending."""
        return np.flatnonzero(np.isin(self.owners, numbers))

    def layout(self, ranks: int) -> TabletLayout | None:
        """How ranks share the tablets; None: there are no rows."""
        manifest = self.manifest
        if not manifest.rows:
            return None
        block = min(BLOCK_ROWS, manifest.tablet_rows)
        while manifest.tablet_rows % block:
            block -= 1
        return TabletLayout(classes=manifest.rows, ranks=ranks, tablet_rows=manifest.tablet_rows, block_rows=block)
