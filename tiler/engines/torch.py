"""torch: the reference engine, the module itself; on the CPU, one image at a time."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..analysis.graph import WithLogits, operation_name
from ..base.choices import Precision
from ..base.errors import EngineError
from ..base.text import first_line
from ..system.cache_folder import FOLDER_VARIABLE, compiled_folder, keep_compiled_here
from ..system.private_folder import make_private, why_others_can_write
from .engine import EngineProgram

if TYPE_CHECKING:
    from ..analysis.network import Network

_CONTIGUOUS_ONLY = frozenset({"aten.view", "aten.as_strided"})
"""Operations that may fail on tensors whose channels lie next to each other."""


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
    """Whether the module's tensors may lie with their channels next to each other, which convolutions are faster on:
    its traced graph has no operation that minds. Of a module that was not traced nobody knows."""
    return network.is_known and not any(
        node.op == "call_function" and operation_name(node) in _CONTIGUOUS_ONLY for node in network.graph.nodes
    )


def to_channels_last(module: nn.Module) -> nn.Module:
    """The module, with its convolutions' weights in that order: tensors follow the weights that they meet."""
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stubs


AUTOCAST: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def computing(precision: Precision, device: str) -> Iterator[None]:
    """Without gradients; products in fewer bits where that is asked for, sums and the rest as torch.autocast has it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if precision in AUTOCAST:
            stack.enter_context(torch.autocast(torch.device(device).type, AUTOCAST[precision]))
        yield


def as_numpy(output: Tensor, precision: Precision) -> Tensor:
    """An output of `computing` as a dtype that the network said: autocast gives its own floats, and numpy has no
    bfloat16."""
    return output.float() if output.dtype == AUTOCAST.get(precision) else output


class Forward:
    """(finished,) or (finished, logits) of images (n, bands, h, w), by the module as it is.

    Args:
        precision: of products.
        device: where the module's weights are.
        compiles: make one piece of machine code of it, for each shape anew.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        has_logits: bool,
        precision: Precision = "float32",
        device: str = "cpu",
        compiles: bool = False,
    ) -> None:
        self._precision: Precision = precision
        self._device, self._compiles = device, compiles
        self._module: Callable[[Tensor], Any] = module
        self._both: Callable[[Tensor], Any] | None = WithLogits(module) if has_logits else None
        if compiles:
            prepare_compiler()
            self._module = torch.compile(module, dynamic=False)
            self._both = torch.compile(self._both, dynamic=False) if self._both is not None else None

    def __call__(self, images: Tensor, *, with_logits: bool = False) -> tuple[Tensor, ...]:
        try:
            with computing(self._precision, self._device):
                both = with_logits and self._both is not None
                outputs = self._both(images) if both and self._both is not None else (self._module(images),)
                return tuple(as_numpy(output, self._precision) for output in outputs)
        except Exception as error:
            if not self._compiles or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = first_line(error)
            raise EngineError(f"torch.compile cannot compile this network: {reason}; leave --compile out") from error


COMPILED_REMEDY = f"name a folder of your own by {FOLDER_VARIABLE}, or leave --compile out"


def prepare_compiler() -> None:
    """What is compiled is kept in the user's cache, and made in this process alone: a pool of compilers has memory that
    no plan knows of."""
    keep_compiled_here()
    with contextlib.suppress(OSError):
        # Before it is looked at: in a place such as /tmp others could make it just after.
        make_private(compiled_folder())
    if why := why_others_can_write(compiled_folder()):
        raise EngineError(f"torch.compile keeps code in {compiled_folder()}, {why}; {COMPILED_REMEDY}")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Each window shape is compiled for itself; the default would give up after eight.
    torch._dynamo.config.recompile_limit = 1024


def load_reference(program: EngineProgram) -> TorchEngine:
    """What a worker's program computes, on the CPU of this process, one window at a time: for the start check."""
    return TorchEngine.from_program(replace(program, device="cpu", batch=1, compiles=False, threads=0))


class TorchEngine:
    """Runs the module on the CPU, eagerly unless it is compiled.

    Args:
        channels_last: change the order of the module's weights in memory; the module is this engine's own then.
    """

    def __init__(
        self,
        module: nn.Module,
        threads: int | None = None,
        *,
        has_logits: bool = False,
        channels_last: bool = False,
        precision: Precision = "float32",
        compiles: bool = False,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._forward = Forward(
            to_channels_last(module) if channels_last else module,
            has_logits=has_logits,
            precision=precision,
            compiles=compiles,
        )

    @classmethod
    def from_program(cls, program: EngineProgram) -> TorchEngine:
        return cls(
            pickle.loads(program.payload[0]),
            program.threads or None,
            has_logits=program.has_logits,
            channels_last=program.channels_last,
            precision=program.precision,
            compiles=program.compiles,
        )

    def run(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._forward(torch.from_numpy(image)[None])[0][0].numpy()

    def run_with_logits(self, image: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        outputs = self._forward(torch.from_numpy(image)[None], with_logits=True)
        return outputs[0][0].numpy(), outputs[-1][0].numpy()
