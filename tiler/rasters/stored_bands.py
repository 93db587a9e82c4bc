"""Bands and masks of one file by window: decoded anew for each, or taken out of decoded blocks that are kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from .block_cache import BlockCache, BlockStore
from .nodata import Array, Mask, find_missing

if TYPE_CHECKING:
    from ..base.geometry import Window
    from .raster import Raster


class StoredBands:
    """The bands of a file.

    Args:
        raster: those that it needs are decoded together where blocks are kept.
        blocks: keeps and counts decoded blocks from window to window; None: nothing is kept.
        name: tells the file's bands from all other arrays of `blocks`.
        decode: (window, stored bands from 1) -> (bands, height, width).
    """

    def __init__(
        self,
        raster: Raster,
        blocks: BlockStore | None,
        name: Hashable,
        decode: Callable[[Window, tuple[int, ...]], Array],
    ) -> None:
        self._raster, self._decode = raster, decode
        self._kept = None
        if blocks is not None:
            self._kept = BlockCache(
                blocks,
                name,
                shape_yx=raster.shape_yx,
                block=raster.block,
                pixel_bytes=len(raster.decoded) * raster.dtype.itemsize,
                read=lambda window: decode(window, raster.decoded),
            )

    @property
    def keeps_blocks(self) -> bool:
        """Whether decoded blocks are kept."""
        return self._kept is not None

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """(bands, height, width) of stored bands, from 1, among those that the raster needs."""
        if self._kept is None:
            return self._decode(window, bands)
        return self._kept.read(window, self._raster.find_decoded(bands))

    def find_marked(self, window: Window) -> Mask | None:
        """Where the raster's mask band says nodata; None: it has none, or nowhere."""
        rule = self._raster.nodata_rule
        return find_missing(self.read(window, (rule.mask_band,)), rule.band_rule) if rule.mask_band else None


class StoredMasks:
    """The masks of a file, 0 where there is nothing.

    Args:
        blocks: keeps and counts decoded blocks from window to window; None: nothing is kept.
        name: tells the file's masks from all other arrays of `blocks`.
        count: masks, a byte each per pixel.
        decode: window -> (masks, height, width).
    """

    def __init__(
        self,
        blocks: BlockStore | None,
        name: Hashable,
        *,
        shape_yx: tuple[int, int],
        block: tuple[int, int],
        count: int,
        decode: Callable[[Window], Array],
    ) -> None:
        self._read = decode
        if blocks is not None:
            kept = BlockCache(blocks, name, shape_yx=shape_yx, block=block, pixel_bytes=count, read=decode)
            self._read = kept.read

    def read(self, window: Window) -> Array:
        """(masks, height, width)."""
        return self._read(window)

    def find_missing(self, window: Window) -> Mask | None:
        """Where the first mask says nodata; None: nowhere."""
        missing: Mask = self._read(window)[0] == 0
        return missing if missing.any() else None
