"""Engines that run programs: each tile by the network specialised to its core, in torch or in OpenVINO."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy.typing as npt
import torch

from .engine import EngineProgram
from .errors import EngineError
from .network import Network, analyze_network
from .program import Program, compute_geometry, geometry_key

if TYPE_CHECKING:
    import openvino as ov

    from .plan import Tile

ALIVE = 1
"""Compiled programs that a process keeps: tiles of one geometry come together, and each program holds its memory."""
_WIDER = {"uint16": "int32", "uint32": "int64"}
"""Pixel types that OpenVINO's converter does not know, and what holds all their values."""


def pack_programs(network: Network, engine: str, threads: int, shape_yx: tuple[int, int]) -> EngineProgram:
    """The module, pickled: each worker traces it and specialises it to the tiles that it gets.

    Raises:
        EngineError: the module cannot be pickled.
    """
    buffer = io.BytesIO()
    try:
        cloudpickle.dump((network.module, network.bands, str(network.dtype).removeprefix("torch.")), buffer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise EngineError(f"the module cannot be sent to workers: {error}; define it at the top of a module") from error
    return EngineProgram(
        engine="openvino" if engine == "openvino" else "torch",
        payload=(buffer.getvalue(),),
        has_logits=network.graph.has_logits,
        threads=threads,
        method="program",
        shape_yx=shape_yx,
    )


class ProgramTiles:
    """Runs tiles of one raster by programs; one thread at a time."""

    def __init__(self, network: Network, shape_yx: tuple[int, int]) -> None:
        self._network = network
        self._padded = network.padded_shape(shape_yx)
        self._has_logits = network.graph.has_logits

    def _program(self, tile: Tile) -> Program:
        rows = compute_geometry(self._network, 0, self._padded[0], tile.core.rows)
        columns = compute_geometry(self._network, 1, self._padded[1], tile.core.columns)
        return Program(self._network, rows, columns)

    def _infer(self, image: npt.NDArray[Any], tile: Tile) -> list[npt.NDArray[Any]]:
        raise NotImplementedError

    def run_tile(self, image: npt.NDArray[Any], tile: Tile) -> npt.NDArray[Any]:
        return self._infer(image, tile)[0]

    def run_tile_with_logits(self, image: npt.NDArray[Any], tile: Tile) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        outputs = self._infer(image, tile)
        return outputs[0], outputs[-1]


class TorchPrograms(ProgramTiles):
    """By torch, operation by operation; the reference."""

    def _infer(self, image: npt.NDArray[Any], tile: Tile) -> list[npt.NDArray[Any]]:
        with torch.inference_mode():
            return [output[0].numpy() for output in self._program(tile)(torch.from_numpy(image)[None])]


class OpenVinoPrograms(ProgramTiles):
    """By OpenVINO: one compiled program for each geometry, the last ones kept."""

    def __init__(self, network: Network, shape_yx: tuple[int, int], threads: int) -> None:
        super().__init__(network, shape_yx)
        from .engine_openvino import compile_options, new_core

        self._core, self._options = new_core(), compile_options(threads)
        self._requests: OrderedDict[tuple[str, str], ov.InferRequest] = OrderedDict()

    def _request(self, program: Program, image: npt.NDArray[Any]) -> ov.InferRequest:
        from .engine_openvino import convert_exported

        key = (geometry_key(self._network, 0, program.rows), geometry_key(self._network, 1, program.columns))
        if key in self._requests:
            self._requests.move_to_end(key)
            return self._requests[key]
        while len(self._requests) >= ALIVE:
            self._requests.popitem(last=False)  # before the next is built: two would hold twice the memory
        example = torch.zeros((1, *image.shape), dtype=self._network.dtype)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                model = convert_exported(torch.export.export(program, (example,), strict=False))
            self._requests[key] = self._core.compile_model(model, "CPU", self._options).create_infer_request()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineError(f"OpenVINO cannot run this network: {reason}; use --engine torch") from error
        return self._requests[key]

    def _infer(self, image: npt.NDArray[Any], tile: Tile) -> list[npt.NDArray[Any]]:
        image = image.astype(str(self._network.dtype).removeprefix("torch."), copy=False)
        request = self._request(self._program(tile), image)
        request.infer([image[None]], share_inputs=True, share_outputs=True)
        return [request.get_output_tensor(index).data[0] for index in range(2 if self._has_logits else 1)]


def open_programs(network: Network, engine: str, threads: int, shape_yx: tuple[int, int]) -> ProgramTiles:
    """An engine for the tiles of one raster."""
    if engine == "torch":
        return TorchPrograms(network, shape_yx)
    wider = _WIDER.get(str(network.dtype).removeprefix("torch."))
    if wider is not None:
        network = analyze_network(network.module, network.bands, wider)
    return OpenVinoPrograms(network, shape_yx, threads)


def load_programs(packed: EngineProgram) -> ProgramTiles:
    """The engine in a worker process: the network is traced once more there."""
    torch.set_num_threads(packed.threads)
    module, bands, dtype = pickle.loads(packed.payload[0])
    if packed.engine == "openvino":
        dtype = _WIDER.get(dtype, dtype)
    network = analyze_network(module, bands, dtype)
    return open_programs(network, packed.engine, packed.threads, packed.shape_yx)
