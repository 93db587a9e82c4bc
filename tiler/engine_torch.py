"""torch: the reference engine, the module itself; on the CPU, one image at a time."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .engine import EngineProgram
from .errors import EngineError
from .graph import WithLogits, operation_name

if TYPE_CHECKING:
    from .network import Network

_CONTIGUOUS_ONLY = frozenset({"aten.view", "aten.as_strided"})
"""Operations that fail, or mean something else, on tensors whose channels lie next to each other."""


def pack_network(network: Network, threads: int) -> EngineProgram:
    """The module itself, pickled: it goes from the client to its own workers and is never read from a file.

    Raises:
        EngineError: the module cannot be pickled.
    """
    buffer = io.BytesIO()
    try:
        cloudpickle.dump(network.module, buffer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise EngineError(f"the module cannot be sent to workers: {error}; define it at the top of a module") from error
    return EngineProgram(
        engine="torch",
        payload=(buffer.getvalue(),),
        has_logits=network.has_logits,
        threads=threads,
        channels_last=takes_channels_last(network),
    )


def takes_channels_last(network: Network) -> bool:
    """Whether the module's tensors may lie with their channels next to each other, which convolutions are faster on: its
    traced graph has no operation that minds. Of a module that was not traced nobody knows."""
    return network.is_known and not any(
        node.op == "call_function" and operation_name(node) in _CONTIGUOUS_ONLY for node in network.graph.nodes
    )


def to_channels_last(module: nn.Module) -> nn.Module:
    """The module, with its convolutions' weights in that order: tensors follow the weights that they meet."""
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stubs


class Forward:
    """(finished,) or (finished, logits) of images (n, bands, h, w), by the module as it is."""

    def __init__(self, module: nn.Module, *, has_logits: bool) -> None:
        self._module = module
        self._both = WithLogits(module) if has_logits else None

    def __call__(self, images: Tensor, *, with_logits: bool = False) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            if with_logits and self._both is not None:
                return self._both(images)
            return (self._module(images),)


class TorchEngine:
    """Runs the module eagerly on the CPU.

    Args:
        channels_last: change the order of the module's weights in memory; the module is this engine's own then.
    """

    def __init__(
        self, module: nn.Module, threads: int | None = None, *, has_logits: bool = False, channels_last: bool = False
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._forward = Forward(to_channels_last(module) if channels_last else module, has_logits=has_logits)

    @classmethod
    def from_program(cls, program: EngineProgram) -> TorchEngine:
        module = pickle.loads(program.payload[0])
        return cls(module, program.threads, has_logits=program.has_logits, channels_last=program.channels_last)

    def run(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._forward(torch.from_numpy(image)[None])[0][0].numpy()

    def run_with_logits(self, image: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        outputs = self._forward(torch.from_numpy(image)[None], with_logits=True)
        return outputs[0][0].numpy(), outputs[-1][0].numpy()
