"""OpenVINO on CPU: the fast engine."""

from __future__ import annotations

import mmap
import pickle
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..analysis.axis_geometry import AxisGeometry, ImageAxis, compute_geometry, geometry_key, tap_arrays
from ..base.dtypes import dtype_name
from ..base.errors import EngineError, NotFiniteError
from ..base.text import first_line
from ..system.process_locks import TRACING
from .engine import EngineProgram

# OpenVINO reports its use to its makers from the moment it is imported, unless the package that does so is missing. A
# run must not talk to anyone, so here it is missing.
sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]

import openvino as ov  # noqa: E402

from .openvino_rewrite import rewrite_model  # noqa: E402
from .program_ir import ModelParts, split_model  # noqa: E402

if TYPE_CHECKING:
    from ..analysis.network import Network
    from ..base.tile import Tile


def convert_network(network: Network, threads: int) -> EngineProgram:
    """The traced graph as OpenVINO IR, with height and width still free.

    Raises:
        EngineError: OpenVINO has no counterpart for an operation or dtype.
    """
    from .pixel_types import WIDER

    try:
        with TRACING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ov.convert_model(_convertible(network))
            if (dtype := dtype_name(network.dtype)) in WIDER:
                prepared = ov.preprocess.PrePostProcessor(model)
                prepared.input().tensor().set_element_type(ov.Type(np.dtype(dtype)))
                model = prepared.build()
    except EngineError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise EngineError(f"OpenVINO cannot run this network: {reason}; use --engine torch") from error
    return EngineProgram(
        engine="openvino",
        payload=serialise_model(model),
        has_logits=network.has_logits,
        threads=threads,
    )


def _convertible(network: Network) -> Any:
    """The traced program; where pixels enter in another type, traced again with that one."""
    from .pixel_types import require_entering

    entering = require_entering(network)
    if entering == dtype_name(network.dtype):
        return network.graph.program
    import torch  # only the planning process converts; workers do without torch

    from ..analysis.graph import trace

    return trace(network.module, network.bands, getattr(torch, entering)).program


def convert_exported(program: Any, shapes: list[tuple[int, ...]], kept: dict[str, bytes]) -> ModelParts:
    """An exported program of torch for inputs of those shapes, as OpenVINO's model files.

    Args:
        kept: as of `split_model`.
    """
    model = ov.convert_model(program)
    # The converter leaves the inputs' shapes open, and what is made for any shape is slow.
    model.reshape(dict(zip(model.inputs, shapes, strict=True)))
    rewrite_model(model)
    with _serialised(model) as (graph, weights):
        return split_model(graph, weights, kept)


def read_model(graph: bytes, weights: bytes | bytearray) -> ov.Model:
    """A model of its files; its constants point into `weights`, which must stay."""
    return ov.Core().read_model(graph, ov.Tensor(np.frombuffer(weights, np.uint8)))


def serialise_model(model: ov.Model) -> tuple[bytes, bytes]:
    """(graph, weights), as OpenVINO's model files."""
    with _serialised(model) as (graph, weights):
        return graph, bytes(weights)


@contextmanager
def _serialised(model: ov.Model) -> Iterator[tuple[bytes, memoryview]]:
    """(graph, weights), as OpenVINO's model files; the weights stay on the disk until they are looked at."""
    with tempfile.TemporaryDirectory() as folder:
        graph, weights = Path(folder, "program.xml"), Path(folder, "program.bin")
        ov.serialize(model, graph, weights)
        if not weights.stat().st_size:  # nothing to map
            yield graph.read_bytes(), memoryview(b"")
            return
        with (
            weights.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            yield graph.read_bytes(), view


def compile_options(threads: int) -> dict[str, Any]:
    """How models are compiled."""
    return {
        # The default may be bfloat16 on some CPUs: another result than the module's.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
    }


LARGEST_PIXEL = 1e20
"""Of floats: a network that multiplies them by 1e18 and adds overflows float32. torch says so by NaN, which maxima of
OpenVINO hide. Undeclared nodata values are seldom smaller."""


def enter(image: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The pixels in the type that the network takes here.

    Raises:
        NotFiniteError: some are so large that sums of them may overflow.
    """
    if image.dtype.kind == "f" and image.size:
        largest = max(image.max(), image.min(), key=abs)
        if abs(float(largest)) > LARGEST_PIXEL:
            # With all digits, so that it can be given back.
            raise NotFiniteError(
                f"OpenVINO computes with pixels up to {LARGEST_PIXEL:g}, got one of {largest}; if it means nodata, "
                f"say so with --nodata {largest}, else use --engine torch"
            )
    return image.astype(dtype, copy=False)


class OpenVinoEngine:
    """Runs a network at fixed shapes, one compiled program alive at a time.

    Args:
        rewrite: run fewer operations of the same result; False: the graph as it is, for comparison.
    """

    def __init__(self, program: EngineProgram, *, rewrite: bool = True) -> None:
        self._rewrite = rewrite
        self._core = ov.Core()
        graph, weights = program.payload
        self._model = self._core.read_model(graph, ov.Tensor(np.frombuffer(weights, np.uint8)))
        self._weights = weights  # the model's constants point into it
        self._dtype = np.dtype(self._model.input(0).get_element_type().to_dtype())
        self._has_logits, self._is_quantised = program.has_logits, program.precision == "int8"
        self._options = compile_options(program.threads)
        self._key: tuple[Any, ...] | None = None
        self._request: ov.InferRequest | None = None

    def _prepared(self, shape: tuple[int, ...], outputs: int) -> ov.InferRequest:
        """The request for an image shape with the first `outputs` results; compiles when the shape changes."""
        if self._request is None or self._key != (shape, outputs):
            self._request, self._key = None, None  # frees the last program's memory before the next is built
            model = self._model.clone()
            for result in model.get_results()[outputs:]:
                model.remove_result(result)
            try:
                model.reshape([1, *shape])
                if self._rewrite:
                    rewrite_model(model, quantised=self._is_quantised)
                self._request = self._core.compile_model(model, "CPU", self._options).create_infer_request()
            except RuntimeError as error:
                raise EngineError(
                    f"OpenVINO cannot run this network on {shape[1]} x {shape[2]} pixels; use --engine torch"
                ) from error
            self._key = (shape, outputs)
        return self._request

    def _infer(self, image: npt.NDArray[Any], outputs: int) -> list[npt.NDArray[Any]]:
        request = self._prepared(image.shape, outputs)
        image = enter(image, self._dtype)
        request.infer([image[None]], share_inputs=True, share_outputs=True)
        return [request.get_output_tensor(index).data[0] for index in range(outputs)]

    def run(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._infer(image, 1)[0]

    def run_with_logits(self, image: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if not self._has_logits:
            result = self.run(image)
            return result, result
        result, logits = self._infer(image, 2)
        return result, logits


ALIVE = 1
"""Compiled programs that a process keeps: tiles of one geometry come together, and each program holds its memory."""

ProgramSource = Callable[[AxisGeometry, AxisGeometry], tuple[bytes, bytes | bytearray]]
"""(graph, weights) of the program for those rows and columns."""


class OpenVinoPrograms:
    """Runs tiles of one raster by programs: one compiled for each geometry, the last ones kept."""

    def __init__(
        self, axes: tuple[ImageAxis, ImageAxis], dtype: str, has_logits: bool, threads: int, source: ProgramSource
    ) -> None:
        self._axes, self._dtype, self._source = axes, np.dtype(dtype), source
        self._outputs = 2 if has_logits else 1
        self._core, self._options = ov.Core(), compile_options(threads)
        self._requests: OrderedDict[str, tuple[ov.InferRequest, bytes | bytearray]] = OrderedDict()

    @classmethod
    def from_program(cls, packed: EngineProgram) -> OpenVinoPrograms:
        axes, dtype, graphs = pickle.loads(packed.payload[0])

        def source(rows: AxisGeometry, columns: AxisGeometry) -> tuple[bytes, bytes | bytearray]:
            key = f"{geometry_key(rows)}-{geometry_key(columns)}"
            if key not in graphs:
                raise EngineError("a tile's program is missing from the run; report this")
            return graphs[key], packed.payload[1]

        return cls(axes, dtype, packed.has_logits, packed.threads, source)

    def _request(self, rows: AxisGeometry, columns: AxisGeometry) -> ov.InferRequest:
        key = f"{geometry_key(rows)}-{geometry_key(columns)}"
        if key in self._requests:
            self._requests.move_to_end(key)
            return self._requests[key][0]
        while len(self._requests) >= ALIVE:
            self._requests.popitem(last=False)  # before the next is built: two would hold twice the memory
        graph, weights = self._source(rows, columns)
        try:
            model = self._core.read_model(graph, ov.Tensor(np.frombuffer(weights, np.uint8)))
            request = self._core.compile_model(model, "CPU", self._options).create_infer_request()
        except RuntimeError as error:
            reason = first_line(error)
            raise EngineError(f"OpenVINO cannot run this network: {reason}; use --engine torch") from error
        self._requests[key] = (request, weights)  # the model's constants point into the weights
        return request

    def _infer(self, image: npt.NDArray[Any], tile: Tile) -> list[npt.NDArray[Any]]:
        rows, columns = (
            compute_geometry(self._axes[0], tile.core.rows),
            compute_geometry(self._axes[1], tile.core.columns),
        )
        request = self._request(rows, columns)
        image = enter(image, self._dtype)
        inputs = [image[None], *tap_arrays(rows), *tap_arrays(columns)]
        request.infer(inputs, share_inputs=True, share_outputs=True)
        return [request.get_output_tensor(index).data[0] for index in range(self._outputs)]

    def run_tile(self, image: npt.NDArray[Any], tile: Tile) -> npt.NDArray[Any]:
        return self._infer(image, tile)[0]

    def run_tile_with_logits(self, image: npt.NDArray[Any], tile: Tile) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        outputs = self._infer(image, tile)
        return outputs[0], outputs[-1]

    def device_peak_bytes(self) -> int:
        return 0
