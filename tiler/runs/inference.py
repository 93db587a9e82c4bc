"""Parts of the whole-image result on demand: a window now, or a lazy array."""

from __future__ import annotations

import ctypes
import pickle
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..analysis.network import Network, as_network
from ..analysis.program import make_program
from ..analysis.weights import require_current, weights_version
from ..base.choices import Method
from ..base.dtypes import stored_dtype
from ..base.errors import EngineError, UsageError
from ..base.geometry import Window
from ..base.tile import Tile
from ..engines.choice import EngineChoice, choose_engine, needs_cuda_facts, require_method
from ..engines.devices import find_facts
from ..engines.engine import TileEngine, WindowTiles
from ..engines.loading import compile_program, load_tiles
from ..engines.pixel_types import fit_engine
from ..engines.torch import TorchEngine
from ..output.values import as_stored, missing_in_output
from ..planning.method import choose_method
from ..rasters.bands import match_network
from ..rasters.opening import as_raster
from ..rasters.raster import Raster, read_filled
from ..system.machine import cpu_count
from ..system.process_locks import TRACING, ProcessLock, after_fork, is_forked

if TYPE_CHECKING:
    import dask.array

Array = npt.NDArray[Any]

KEPT = 2
"""Engines that a process keeps for windows: one holds a network's compiled form."""


@dataclass(slots=True)
class _Engine:
    """One network's engine, for one thread at a time; made by the first that takes it."""

    network: Network
    """Kept, so that no other network gets its `id`."""
    tiles: TileEngine | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Engines:
    """This process's engines, the last ones kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], _Engine] = OrderedDict()
        self._looking = ProcessLock()
        """Held while an engine is looked up, never while one computes."""
        after_fork(self._renew)

    def _renew(self) -> None:
        # Never freed: to close an engine, a forked process would wait for threads that it does not have.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._kept))
        self._kept = OrderedDict()

    def get(self, key: tuple[Any, ...], network: Network) -> _Engine:
        """The engine of that key; without one, a new one that is still to be opened."""
        with self._looking:
            found = self._kept.setdefault(key, _Engine(network))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)  # who computes by it now goes on with it
            return found


_ENGINES = _Engines()

_opened_openvino = threading.Event()
"""Whether this process, or one that it was forked from, has computed by OpenVINO."""


def _choose_engine(network: Network, shape_yx: tuple[int, int], name: str | None, device: str | None) -> EngineChoice:
    """What is asked for, else what is fastest here and can compute at all.

    Raises:
        EngineError: this process was forked, and what is asked for has no threads here.
    """
    name = fit_engine(network, name, shape_yx, None)
    choice = choose_engine(find_facts(with_cuda=needs_cuda_facts(name, device)), name, device)
    if not is_forked() or choice.device != "cpu":
        return choice
    # OpenVINO's threads do not come along in a fork, and whoever waits for them waits for ever.
    if choice.engine == "openvino" and _opened_openvino.is_set():
        if name == "openvino":
            raise EngineError(
                "this process was forked from one that had computed by OpenVINO, whose threads did not come along; "
                "start processes by 'spawn' or 'forkserver', or leave engine=\"openvino\" out"
            )
        choice = choose_engine(find_facts(with_cuda=False), "torch", "cpu")
    if choice.engine == "torch":
        torch.set_num_threads(1)  # nor do OpenMP's
    return choice


def _open_engine(network: Network, choice: EngineChoice, method: Method, shape_yx: tuple[int, int]) -> TileEngine:
    if choice.engine == "openvino":
        _opened_openvino.set()
    if method == "program":
        from ..engines.programs import open_programs

        return open_programs(network, choice.engine, cpu_count(), shape_yx, choice.device)
    if choice.engine == "torch" and choice.device == "cpu":
        return WindowTiles(TorchEngine(network.module), with_logits=False)
    return load_tiles(replace(compile_program(network, choice.engine, cpu_count()), device=choice.device))


def _engine_for(network: Network, choice: EngineChoice, method: Method, shape_yx: tuple[int, int]) -> _Engine:
    """This process's engine for a network with the weights that it has now; the last ones are kept."""
    shape = shape_yx if method == "program" else None
    key = (id(network), weights_version(network.module), choice.engine, choice.device, method, shape)
    return _ENGINES.get(key, network)


def _compute(
    image: Array, tile: Tile, network: Network, choice: EngineChoice, method: Method, shape_yx: tuple[int, int]
) -> Array:
    """The tile's core; an array of its own."""
    engine = _engine_for(network, choice, method, shape_yx)
    with engine.lock:
        if engine.tiles is None:
            engine.tiles = _open_engine(network, choice, method, shape_yx)
        # What an engine gives is its own memory, and the next caller's result.
        return engine.tiles.run_tile(image, tile).copy()


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
    raster: Any,
    network: Network | nn.Module,
    window: Window,
    *,
    fill: tuple[float, ...] | None = None,
    engine: str | None = None,
    device: str | None = None,
) -> Array:
    """One window of the whole-image result: (channels, height, width).

    Guarantee: equal to the same window of the module applied to the whole raster (nodata replaced by `fill`, nodata
    out), up to floating-point rounding; with the weights that the module has now; from any number of threads, which
    take turns at an engine.

    Args:
        raster: an open one, or whatever `open_raster` takes.
        network: analysed; a bare module is analysed at each call.
        window: in output pixels, inside the output.
        fill: raw value of each band for nodata pixels; None: 0.
        engine: "openvino" or "torch"; None: torch where it sees a CUDA device, else OpenVINO where it is installed.
        device: "cpu", "cuda" or "cuda:N"; None: as for the engine.

    Raises:
        UsageError: a window outside the output, or another number of bands than the network takes.
        RasterError: the raster cannot be read there.
    """
    raster = match_network(as_raster(raster), network)
    network = as_network(network, raster.bands, raster.dtype)
    if raster.bands != network.bands:
        raise UsageError(f"the network takes {network.bands} bands, the raster has {raster.bands}")
    require_current(network)
    choice = _choose_engine(network, raster.shape_yx, engine, device)
    method = choose_method(network, None, raster.shape_yx)
    require_method(choice.engine, method)
    tile = _tile_of(network, window, method, raster.shape_yx)
    source = tile.window
    reader = raster.open_reader()
    try:
        filled = read_filled(reader, raster, source, fill)
    finally:
        reader.close()
    result = _compute(filled.image, tile, network, choice, method, raster.shape_yx)
    missing = filled.missing
    return as_stored(result, missing if missing is None else missing_in_output(missing, source, window, network.scale))


def lazy_predict(
    raster: Any,
    network: Network | nn.Module,
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
    from dask.delayed import delayed

    raster = match_network(as_raster(raster), network)
    network = as_network(network, raster.bands, raster.dtype)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UsageError(f"chunk must be a whole number of pixels >= 1, got {chunk!r}")
    height, width = network.output_shape(raster.shape_yx)
    dtype = stored_dtype(network.output_dtype)
    # Absolute, for workers in other folders.
    windows = _Windows(raster=raster.made_absolute(), network=network, fill=fill, engine=engine, device=device)
    # One object for all blocks: each worker gets it, and what is made for it, once.
    shared = delayed(windows, name=f"network-{windows.identity}", traverse=False)

    def block(windows: _Windows, block_info: Any = None) -> Array:
        (_, (y0, y1), (x0, x1)) = block_info[None]["array-location"]
        return windows.predict(Window(y=y0, x=x0, height=y1 - y0, width=x1 - x0))

    return dask.array.map_blocks(
        block,
        shared,
        chunks=((network.channels,), _chunk_sizes(height, chunk), _chunk_sizes(width, chunk)),
        dtype=dtype,
        meta=np.empty((0, 0, 0), dtype),
        name=f"outsize-{windows.identity}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Windows:
    """What `predict_window` takes beside the window; analysed once in each process that it is sent to."""

    raster: Raster
    network: Network
    fill: tuple[float, ...] | None
    engine: str | None
    device: str | None
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    def predict(self, window: Window) -> Array:
        return predict_window(self.raster, self.network, window, fill=self.fill, engine=self.engine, device=self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        plain = {name: getattr(self, name) for name in ("raster", "fill", "engine", "device")}
        return _restore, (self.identity, _pickled(self.network), plain)


def _pickled(network: Network) -> bytes:
    try:
        return cloudpickle.dumps(network)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise EngineError(f"the module cannot be sent to workers: {error}; define it at the top of a module") from error


_RESTORED: OrderedDict[str, _Windows] = OrderedDict()
after_fork(_RESTORED.clear)


def _restore(identity: str, network: bytes, plain: dict[str, Any]) -> _Windows:
    with TRACING:
        if identity not in _RESTORED:
            _RESTORED[identity] = _Windows(network=pickle.loads(network), identity=identity, **plain)
        _RESTORED.move_to_end(identity)
        while len(_RESTORED) > KEPT:
            _RESTORED.popitem(last=False)
        return _RESTORED[identity]


def _chunk_sizes(extent: int, chunk: int) -> tuple[int, ...]:
    return tuple(min(chunk, extent - start) for start in range(0, extent, chunk))
