"""Parts of the whole-image result on demand: a window now, or a lazy array."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .engine import Engine, choose_engine, compile_program
from .engine_torch import TorchEngine
from .errors import UsageError
from .geometry import Window
from .machine import cpu_count
from .network import Network
from .raster import Raster, read_filled
from .store import output_nodata
from .worker import missing_in_output

if TYPE_CHECKING:
    import dask.array

Array = npt.NDArray[Any]

_ENGINES: OrderedDict[tuple[int, str], tuple[Network, Engine]] = OrderedDict()


def _engine_for(network: Network, name: str | None) -> Engine:
    """This process's engine for a network; the last two are kept."""
    engine = choose_engine(name)
    key = (id(network), engine)
    if key not in _ENGINES:
        program = None if engine == "torch" else compile_program(network, engine, cpu_count())
        _ENGINES[key] = (network, program.load() if program else TorchEngine(network.module))
        if len(_ENGINES) > 2:
            _ENGINES.popitem(last=False)
    return _ENGINES[key][1]


def predict_window(
    raster: Raster,
    network: Network,
    window: Window,
    *,
    fill: tuple[float, ...] | None = None,
    engine: str | None = None,
) -> Array:
    """One window of the whole-image result: (channels, height, width).

    Guarantee: equal to the same window of the module applied to the whole raster (nodata replaced by `fill`, nodata
    out), up to floating-point rounding.

    Args:
        window: in output pixels, inside the output.
        fill: raw value of each band for nodata pixels; None: 0.
        engine: "openvino" or "torch"; None: OpenVINO where it is installed.

    Raises:
        UsageError: a window outside the output, or another number of bands than the network takes.
        RasterError: the raster cannot be read there.
    """
    if raster.bands != network.bands:
        raise UsageError(f"the network takes {network.bands} bands, the raster has {raster.bands}")
    source = network.input_window(window, raster.shape_yx)
    reader = raster.open_reader()
    try:
        filled = read_filled(reader, raster, source, fill)
    finally:
        reader.close()
    top, left = (int(start * scale) for start, scale in zip((source.y, source.x), network.scale, strict=True))
    rows, columns = Window(y=window.y - top, x=window.x - left, height=window.height, width=window.width).slices()
    result = _engine_for(network, engine).run(filled.image)[:, rows, columns].copy()
    if filled.missing is not None:
        result[:, missing_in_output(filled.missing, source, window, network.scale)] = output_nodata(result.dtype)
    return result


def lazy_predict(
    raster: Raster,
    network: Network,
    *,
    chunk: int = 1024,
    fill: tuple[float, ...] | None = None,
    engine: str | None = None,
) -> dask.array.Array:
    """The whole result as a lazy dask array (channels, height, width); each block is one `predict_window`.

    For looking at parts of a result with xarray or napari. For a whole raster `predict` is faster and bounded.
    """
    import dask.array

    height, width = network.output_shape(raster.shape_yx)
    dtype = np.dtype(str(network.output_dtype).removeprefix("torch."))

    def block(block_info: Any = None) -> Array:
        (_, (y0, y1), (x0, x1)) = block_info[None]["array-location"]
        window = Window(y=y0, x=x0, height=y1 - y0, width=x1 - x0)
        return predict_window(raster, network, window, fill=fill, engine=engine)

    chunks = ((network.channels,), _chunk_sizes(height, chunk), _chunk_sizes(width, chunk))
    return dask.array.map_blocks(block, chunks=chunks, dtype=dtype, meta=np.empty((0, 0, 0), dtype))


def _chunk_sizes(extent: int, chunk: int) -> tuple[int, ...]:
    return tuple(min(chunk, extent - start) for start in range(0, extent, chunk))
