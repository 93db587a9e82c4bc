"""OpenVINO on CPU: the fast engine."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .engine import EngineProgram
from .errors import EngineError

# OpenVINO reports its use to its makers from the moment it is imported, unless the package that does so is missing. A
# run must not talk to anyone, so here it is missing.
sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]

import openvino as ov  # noqa: E402

if TYPE_CHECKING:
    from .network import Network

_WIDER = {"uint16": "int32", "uint32": "int64"}
"""Pixel types that the converter does not know, and what holds all their values; cast inside the program."""


def convert_network(network: Network, threads: int) -> EngineProgram:
    """The traced graph as OpenVINO IR, with height and width still free.

    Raises:
        EngineError: OpenVINO has no counterpart for an operation or dtype.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ov.convert_model(_convertible(network))
            if (dtype := _name(network)) in _WIDER:
                prepared = ov.preprocess.PrePostProcessor(model)
                prepared.input().tensor().set_element_type(ov.Type(np.dtype(dtype)))
                model = prepared.build()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(f"OpenVINO cannot run this network: {reason}; use --engine torch") from error
    with tempfile.TemporaryDirectory() as folder:
        graph, weights = Path(folder, "program.xml"), Path(folder, "program.bin")
        ov.serialize(model, graph, weights)
        payload = (graph.read_bytes(), weights.read_bytes())
    return EngineProgram(
        engine="openvino",
        payload=payload,
        has_logits=network.graph.has_logits,
        threads=threads,
    )


def _name(network: Network) -> str:
    return str(network.dtype).removeprefix("torch.")


def _convertible(network: Network) -> Any:
    """The traced program; for dtypes that the converter does not know, traced again with one that holds them."""
    wider = _WIDER.get(_name(network))
    if wider is None:
        return network.graph.program
    import torch  # only the planning process converts; workers do without torch

    from .graph import trace

    return trace(network.module, network.bands, getattr(torch, wider)).program


def new_core() -> ov.Core:
    """OpenVINO, opened."""
    return ov.Core()


def convert_exported(program: Any) -> ov.Model:
    """An exported program of torch as OpenVINO's model."""
    return ov.convert_model(program)


def compile_options(threads: int) -> dict[str, Any]:
    """How models are compiled."""
    return {
        # The default may be bfloat16 on some CPUs: another result than the module's.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
    }


class OpenVinoEngine:
    """Runs a network at fixed shapes, one compiled program alive at a time."""

    def __init__(self, program: EngineProgram) -> None:
        self._core = ov.Core()
        graph, weights = program.payload
        self._model = self._core.read_model(graph, ov.Tensor(np.frombuffer(weights, np.uint8)))
        self._weights = weights  # the model's constants point into it
        self._has_logits = program.has_logits
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
                self._request = self._core.compile_model(model, "CPU", self._options).create_infer_request()
            except RuntimeError as error:
                raise EngineError(
                    f"OpenVINO cannot run this network on {shape[1]} x {shape[2]} pixels; use --engine torch"
                ) from error
            self._key = (shape, outputs)
        return self._request

    def _infer(self, image: npt.NDArray[Any], outputs: int) -> list[npt.NDArray[Any]]:
        request = self._prepared(image.shape, outputs)
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
