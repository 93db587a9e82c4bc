"""Devices: what on this machine can run an engine, as plain facts for the choice of one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ..base.errors import EngineError
from ..base.text import last_line

TIMEOUT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaDevice:
    """A CUDA device that torch sees."""

    name: str
    free_bytes: int
    """That nobody held when it was first asked for."""
    total_bytes: int
    capability: tuple[int, int] = (8, 0)
    """Compute capability; (8, 0) is the first with bfloat16 and TF32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """All of a machine that the choice of an engine depends on."""

    has_openvino: bool
    cuda: tuple[CudaDevice, ...] = ()
    """In torch's order: cuda:0, cuda:1 and so on."""


def pick_index(device: str) -> int:
    """The index in a device's name; the first for "cuda", which names all."""
    return int(device.partition(":")[2] or 0)


def find_facts(*, with_cuda: bool = True) -> MachineFacts:
    """This machine's facts.

    Args:
        with_cuda: False where the options leave CUDA out anyway: then nobody needs to ask.

    Raises:
        EngineError: torch sees CUDA devices, but they do not answer.
    """
    return MachineFacts(
        has_openvino=importlib.util.find_spec("openvino") is not None, cuda=find_cuda() if with_cuda else ()
    )


@cache
def find_cuda() -> tuple[CudaDevice, ...]:
    """The CUDA devices that torch sees.

    They are asked in a process of its own: a CUDA context takes hundreds of megabytes of host and device, which the
    planning process has no use for. And once: later this run's own workers hold what was free.

    Raises:
        EngineError: torch sees devices, but they do not answer.
    """
    import torch

    if not torch.cuda.is_available():
        return ()
    try:
        completed = subprocess.run(
            [sys.executable, "-P", "-m", __name__], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if completed.returncode:
            raise ValueError(last_line(completed.stderr, "it was killed"))
        return read_devices(completed.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise EngineError(f"the CUDA devices that torch sees do not answer: {error}; use --device cpu") from error


def read_devices(text: str) -> tuple[CudaDevice, ...]:
    """The devices that `main` has printed, on its last line."""
    values: list[dict[str, Any]] = json.loads(text.splitlines()[-1])
    return tuple(CudaDevice(**{**value, "capability": tuple(value["capability"])}) for value in values)


def main() -> None:
    """Print this process's CUDA devices as one line of JSON."""
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        device = CudaDevice(
            name=torch.cuda.get_device_name(index),
            free_bytes=free,
            total_bytes=total,
            capability=torch.cuda.get_device_capability(index),
        )
        found.append(asdict(device))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
