"""torch: the reference engine, on CPU or CUDA (CUDA is not run in this project's tests)."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, cast

import cloudpickle
import numpy.typing as npt
import torch
from torch import nn

from .engine import EngineProgram
from .errors import EngineError
from .graph import HasLogits

if TYPE_CHECKING:
    from .network import Network


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
    return EngineProgram(engine="torch", payload=(buffer.getvalue(),), has_logits=network.has_logits, threads=threads)


class TorchEngine:
    """Runs the module itself, eagerly."""

    def __init__(self, module: nn.Module, threads: int | None = None, *, has_logits: bool = False) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # TF32 would round inputs of convolutions to 10 bits: another result than the module's.
        torch.backends.cudnn.allow_tf32 = False
        if threads is not None:
            torch.set_num_threads(threads)
        self._module = module.to(self._device)
        self._has_logits = has_logits

    @classmethod
    def from_program(cls, program: EngineProgram) -> TorchEngine:
        return cls(pickle.loads(program.payload[0]), program.threads, has_logits=program.has_logits)

    def _tensor(self, image: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(image).to(self._device)[None]

    def run(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        with torch.inference_mode():
            return self._module(self._tensor(image))[0].cpu().numpy()

    def run_with_logits(self, image: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if not self._has_logits:
            result = self.run(image)
            return result, result
        module = cast("HasLogits", self._module)
        with torch.inference_mode():
            logits = module.logits(self._tensor(image))
            finished = module.finish(logits)
            return finished[0].cpu().numpy(), logits[0].cpu().numpy()
