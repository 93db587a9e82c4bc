"""Engines that run programs: each tile by the network specialised to its core, in torch or in OpenVINO."""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy.typing as npt
import torch

from ..analysis.axis_geometry import AxisGeometry, compute_geometry, geometry_key
from ..analysis.network import Network, analyze_network
from ..analysis.network_hash import hash_network
from ..analysis.program import Program, graph_tensors, hash_sizes
from ..base.choices import Precision
from ..base.dtypes import dtype_name
from ..base.errors import EngineError
from ..base.geometry import Interval
from ..base.text import first_line
from ..system.machine import release_freed_memory
from ..system.process_locks import TRACING
from .engine import EngineProgram, TileEngine
from .pixel_types import require_entering
from .program_cache import ProgramCache
from .program_ir import ModelParts, join_models, split_model

if TYPE_CHECKING:
    from ..base.tile import Tile
    from .openvino import OpenVinoPrograms

WINDOWS = "windows"
"""Name, among a network's programs on disk, of the network itself for windows of any size."""

HEAVY_BYTES = 16_000_000
"""Of weights, from which on what conversions leave behind is given back after each."""

Report = Callable[[int, int], None]
"""Told how many of how many programs are there."""


class TorchPrograms:
    """By torch, operation by operation; the reference."""

    def __init__(self, network: Network, shape_yx: tuple[int, int], device: torch.device | None = None) -> None:
        self._network, self._device = network, device or torch.device("cpu")
        self._axes = network.on_image(shape_yx)
        self._tensors = {
            name: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for name, value in graph_tensors(network).items()
        }

    def program(self, tile: Tile) -> Program:
        """The network for the tile's core."""
        rows, columns = (
            compute_geometry(axis, interval)
            for axis, interval in zip(self._axes, (tile.core.rows, tile.core.columns), strict=True)
        )
        return Program(self._network, rows, columns, tensors=self._tensors)

    def run_tile_with_logits(self, image: npt.NDArray[Any], tile: Tile) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with torch.inference_mode():
            outputs = self.program(tile)(torch.from_numpy(image).to(self._device)[None])
        return outputs[0][0].cpu().numpy(), outputs[-1][0].cpu().numpy()

    def run_tile(self, image: npt.NDArray[Any], tile: Tile) -> npt.NDArray[Any]:
        return self.run_tile_with_logits(image, tile)[0]

    def device_peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else 0


class Converter:
    """Makes programs of one network for OpenVINO; those made before on this machine come from its cache."""

    def __init__(self, network: Network, shape_yx: tuple[int, int]) -> None:
        entering = require_entering(network)
        self.network = network
        if entering != dtype_name(network.dtype):
            self.network = analyze_network(network.module, network.bands, entering)
        self.axes = self.network.on_image(shape_yx)
        self._sizes = hash_sizes(self.network, self.network.padded_shape(shape_yx))
        self._cache = ProgramCache(cache_name(self.network))
        self._used, self._is_new = set[str](), False
        self._is_heavy = self.network.weight_bytes >= HEAVY_BYTES

    def convert(self, rows: AxisGeometry, columns: AxisGeometry, kept: dict[str, bytes]) -> bytes:
        """The graph of the program of the cores that share those geometries.

        Args:
            kept: its constants by name; those that are held already, of other programs, are not held once more.

        Raises:
            EngineError: OpenVINO has no counterpart for an operation.
        """
        key = f"{geometry_key(rows)}-{geometry_key(columns)}-{self._sizes}"
        found = self._cache.read(key, kept)
        self._used.add(key)
        if found is None:
            found = _convert(Program(self.network, rows, columns), kept)
            self._cache.write(key, found)
            self._is_new = True
            if self._is_heavy:  # copies of the weights hang in cycles of torch's and OpenVINO's objects
                release_freed_memory()
        return found.graph

    def tidy(self) -> None:
        """Where programs were made, keep the cache's limit."""
        if self._is_new:
            self._cache.trim(self._used)


def cache_name(network: Network) -> str:
    """Of what is kept on this machine for a network: equal only where the same weights go through the same code."""
    parts = [hash_network(network), dtype_name(network.dtype), _hash_sources(), version("torch"), _openvino_version()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _openvino_version() -> str:
    try:
        return version("openvino")
    except PackageNotFoundError:  # the memory that torch takes is kept too
        return "absent"


@cache
def _hash_sources() -> str:
    """Of every file of `tiler`: which of them decide what a program computes is not worth being wrong about."""
    digest, folder = hashlib.sha256(), Path(__file__).parents[1]
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.relative_to(folder).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _convert(program: Program, kept: dict[str, bytes]) -> ModelParts:
    from .openvino import convert_exported

    window = program.window
    example = torch.zeros((1, program.network.bands, *window.shape), dtype=program.network.dtype)
    try:
        with TRACING, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            examples = (example, *program.inputs())
            exported = torch.export.export(program, examples, strict=False)
            return convert_exported(exported, [tuple(tensor.shape) for tensor in examples], kept)
    except Exception as error:
        reason = first_line(error)
        raise EngineError(f"OpenVINO cannot run this network: {reason}; use --engine torch") from error


def pack_programs(
    network: Network,
    engine: str,
    threads: int,
    shape_yx: tuple[int, int],
    rows: Sequence[Interval],
    columns: Sequence[Interval],
    report: Report | None = None,
    precision: Precision = "float32",
) -> EngineProgram:
    """What workers need to run the tiles whose cores are the products of those rows and columns.

    OpenVINO's workers get converted programs and never import torch; torch's get the module and trace it.

    Raises:
        EngineError: the engine cannot run the network, or the module cannot be pickled.
    """
    if engine == "torch":
        buffer = io.BytesIO()
        try:
            cloudpickle.dump((network.module, network.bands, dtype_name(network.dtype)), buffer)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise EngineError(
                f"the module cannot be sent to workers: {error}; define it at the top of a module"
            ) from error
        payload = (buffer.getvalue(),)
    else:
        converter = Converter(network, shape_yx)
        kinds: list[dict[str, AxisGeometry]] = []
        for axis, cores in zip(converter.axes, (rows, columns), strict=True):
            geometries = [compute_geometry(axis, core) for core in cores]
            kinds.append({geometry_key(geometry): geometry for geometry in geometries})
        pairs = list(itertools.product(*(kind.items() for kind in kinds)))
        graphs: dict[str, bytes] = {}
        constants: dict[str, bytes] = {}
        for (row_key, row), (column_key, column) in pairs:
            graphs[f"{row_key}-{column_key}"] = converter.convert(row, column, constants)
            if report is not None:
                report(len(graphs), len(pairs))
        converter.tidy()
        graphs, weights = join_models(graphs, constants)
        payload = (pickle.dumps((converter.axes, dtype_name(converter.network.dtype), graphs)), weights)
    return EngineProgram(
        engine="openvino" if engine == "openvino" else "torch",
        payload=payload,
        has_logits=network.has_logits,
        threads=threads,
        method="program",
        shape_yx=shape_yx,
        precision=precision,
    )


def pack_windows(network: Network, threads: int) -> EngineProgram:
    """The network in OpenVINO's form for windows of any size, from this machine's cache or converted.

    Raises:
        EngineError: OpenVINO has no counterpart for an operation or dtype.
    """
    from .openvino import convert_network

    if not network.is_known:  # what it computes is not told by its parts, so nothing kept can be known for it
        return convert_network(network, threads)
    kept = ProgramCache(cache_name(network))
    parts = kept.read(WINDOWS)
    if parts is None:
        converted = convert_network(network, threads).payload
        parts = split_model(bytes(converted[0]), memoryview(converted[1]))
        del converted  # before the constants are joined: each is there twice by now
        kept.write(WINDOWS, parts)
        kept.trim()
    graphs, weights = join_models({WINDOWS: parts.graph}, parts.constants)
    return EngineProgram(
        engine="openvino", payload=(graphs[WINDOWS], weights), has_logits=network.has_logits, threads=threads
    )


def open_programs(
    network: Network, engine: str, threads: int, shape_yx: tuple[int, int], device: str = "cpu"
) -> TileEngine:
    """An engine for any tile of one raster, in this process; programs are converted as they are needed."""
    if engine == "torch":
        return TorchPrograms(network, shape_yx, _open_device(device))
    converter = Converter(network, shape_yx)

    def graph(rows: AxisGeometry, columns: AxisGeometry) -> tuple[bytes, bytearray]:
        constants: dict[str, bytes] = {}
        graphs, weights = join_models({"": converter.convert(rows, columns, constants)}, constants)
        return graphs[""], weights

    return _openvino(converter.axes, dtype_name(converter.network.dtype), network.has_logits, threads, graph)


def _openvino(*arguments: Any) -> OpenVinoPrograms:
    from .openvino import OpenVinoPrograms

    return OpenVinoPrograms(*arguments)


def load_torch_programs(packed: EngineProgram) -> TorchPrograms:
    """The engine in a worker process: the network is traced once more there."""
    torch.set_num_threads(packed.threads)
    module, bands, dtype = pickle.loads(packed.payload[0])
    device = _open_device(packed.device, packed.device_limit_bytes)
    return TorchPrograms(analyze_network(module, bands, dtype), packed.shape_yx, device)


def _open_device(device: str, limit_bytes: int = 0) -> torch.device | None:
    if device == "cpu":
        return None
    from .cuda import open_cuda

    return open_cuda(device, limit_bytes=limit_bytes)
