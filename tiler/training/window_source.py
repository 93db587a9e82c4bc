"""Window sources: pixels of images and labels, window by window, from tensors, arrays or rasters on disk."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ..analysis.network import torch_dtype
from ..base.errors import UsageError
from ..base.geometry import Window
from ..base.text import MB
from ..rasters.block_cache import BlockStore
from ..rasters.nodata import Mask
from ..rasters.raster import Raster, read_filled

Pixels: TypeAlias = Raster | npt.NDArray[Any] | Tensor
"""(bands, height, width), or (height, width) for one band."""
CACHE_BYTES = 64 * MB
"""Of decoded blocks that are kept of each raster, since windows of neighbouring tiles share them."""


class WindowSource(Protocol):
    """Reads windows of one image; for one thread at a time."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width)."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, window: Window) -> tuple[Tensor, Mask | None]:
        """(bands, height, width) of a window that may reach beyond the bottom and right, where the fill value stands;
        and (height, width), True where a pixel is nodata, None where none is."""
        ...

    def close(self) -> None: ...


class TensorSource:
    """Of an image in memory; none of its pixels is nodata."""

    def __init__(self, image: Tensor, fill: tuple[float, ...] | None = None) -> None:
        self.image, self.fill = image, fill

    @property
    def shape(self) -> tuple[int, int, int]:
        bands, height, width = self.image.shape
        return (bands, height, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.image.dtype

    def read(self, window: Window) -> tuple[Tensor, Mask | None]:
        inside = window.clamp(self.shape[1:])
        rows, columns = inside.slices()
        pixels = self.image[:, rows, columns]
        if inside != window:
            below, right = window.height - inside.height, window.width - inside.width
            fill = self.fill or (0.0,) * self.shape[0]
            bands = [F.pad(band, (0, right, 0, below), value=value) for band, value in zip(pixels, fill, strict=True)]
            pixels = torch.stack(bands)
        return pixels, None

    def close(self) -> None:
        """Nothing to close."""


class RasterSource:
    """Of a raster on disk."""

    def __init__(self, raster: Raster, fill: tuple[float, ...] | None = None) -> None:
        self.raster, self.fill = raster, fill
        self._reader = raster.open_reader(BlockStore(CACHE_BYTES))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.raster.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.raster.dtype)

    def read(self, window: Window) -> tuple[Tensor, Mask | None]:
        filled = read_filled(self._reader, self.raster, window, self.fill)
        return torch.from_numpy(filled.image), filled.missing

    def close(self) -> None:
        self._reader.close()


def open_source(pixels: Pixels, fill: tuple[float, ...] | None = None) -> WindowSource:
    """Windows of a raster, an array or a tensor.

    Args:
        fill: one value a band for nodata pixels and beyond the image; None: 0.

    Raises:
        UsageError: neither of those, or not (bands, height, width).
    """
    if isinstance(pixels, Raster):
        return RasterSource(pixels, fill)
    if isinstance(pixels, np.ma.MaskedArray):
        raise UsageError("a masked array's mask would be lost; open the raster, or say nodata by a value of the labels")
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels)
    if not isinstance(pixels, Tensor):
        raise UsageError(f"pixels must be a raster, an array or a tensor, got {type(pixels).__name__}; open_raster it")
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or not pixels.numel():
        raise UsageError(f"pixels must be (bands, height, width), each >= 1, got {tuple(pixels.shape)}; take one image")
    return TensorSource(pixels, fill)
