"""Parts of the whole-image result on demand: a window now, or a lazy array."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .devices import find_facts
from .engine import Method, TileEngine, WindowTiles, compile_program
from .engine_choice import choose_engine, needs_cuda_facts
from .engine_torch import TorchEngine
from .errors import UsageError
from .geometry import Window
from .machine import cpu_count
from .network import Network
from .plan import Tile
from .planner import choose_method
from .program import make_program
from .raster import Raster, read_filled
from .store import output_nodata
from .worker import missing_in_output

if TYPE_CHECKING:
    import dask.array

Array = npt.NDArray[Any]

_ENGINES: OrderedDict[tuple[Any, ...], tuple[Network, TileEngine]] = OrderedDict()


def _engine_for(
    network: Network, name: str | None, device: str | None, method: Method, shape_yx: tuple[int, int]
) -> TileEngine:
    """This process's engine for a network; the last two are kept."""
    choice = choose_engine(find_facts(with_cuda=needs_cuda_facts(name, device)), name, device)
    engine = choice.engine
    key = (id(network), engine, choice.device, method, shape_yx if method == "program" else None)
    if key not in _ENGINES:
        if method == "program":
            from .engine_programs import open_programs

            found: TileEngine = open_programs(network, engine, cpu_count(), shape_yx, choice.device)
        elif engine == "torch" and choice.device == "cpu":
            found = WindowTiles(TorchEngine(network.module), with_logits=False)
        else:
            found = replace(compile_program(network, engine, cpu_count()), device=choice.device).load_tiles()
        _ENGINES[key] = (network, found)
        if len(_ENGINES) > 2:
            _ENGINES.popitem(last=False)
    return _ENGINES[key][1]


def _tile_of(network: Network, window: Window, method: Method, shape_yx: tuple[int, int]) -> Tile:
    """The window of the result as a tile of its own."""
    if method == "program":
        source, top, left = make_program(network, shape_yx, window).window, window.y, window.x
    else:
        source = network.input_window(window, shape_yx)
        top, left = (int(start * scale) for start, scale in zip((source.y, source.x), network.scale, strict=True))
    crop = Window(y=window.y - top, x=window.x - left, height=window.height, width=window.width)
    return Tile(row=0, column=0, core=window, target=window, window=source, crop=crop)


def predict_window(
    raster: Raster,
    network: Network,
    window: Window,
    *,
    fill: tuple[float, ...] | None = None,
    engine: str | None = None,
    device: str | None = None,
) -> Array:
    """One window of the whole-image result: (channels, height, width).

    Guarantee: equal to the same window of the module applied to the whole raster (nodata replaced by `fill`, nodata
    out), up to floating-point rounding.

    Args:
        window: in output pixels, inside the output.
        fill: raw value of each band for nodata pixels; None: 0.
        engine: "openvino" or "torch"; None: torch where it sees a CUDA device, else OpenVINO where it is installed.
        device: "cpu", "cuda" or "cuda:N"; None: as for the engine.

    Raises:
        UsageError: a window outside the output, or another number of bands than the network takes.
        RasterError: the raster cannot be read there.
    """
    if raster.bands != network.bands:
        raise UsageError(f"the network takes {network.bands} bands, the raster has {raster.bands}")
    method = choose_method(network, None, raster.shape_yx)
    tile = _tile_of(network, window, method, raster.shape_yx)
    source = tile.window
    reader = raster.open_reader()
    try:
        filled = read_filled(reader, raster, source, fill)
    finally:
        reader.close()
    result = _engine_for(network, engine, device, method, raster.shape_yx).run_tile(filled.image, tile).copy()
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
    device: str | None = None,
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
        return predict_window(raster, network, window, fill=fill, engine=engine, device=device)

    chunks = ((network.channels,), _chunk_sizes(height, chunk), _chunk_sizes(width, chunk))
    return dask.array.map_blocks(block, chunks=chunks, dtype=dtype, meta=np.empty((0, 0, 0), dtype))


def _chunk_sizes(extent: int, chunk: int) -> tuple[int, ...]:
    return tuple(min(chunk, extent - start) for start in range(0, extent, chunk))
