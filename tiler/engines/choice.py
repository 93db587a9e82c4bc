"""The choice of an engine and its device: a pure function of the machine's facts and the options."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..base.errors import EngineError, UsageError
from .devices import CudaDevice, MachineFacts
from .engine import PRECISIONS, choose_precision
from .registry import ENGINES, OWN

if TYPE_CHECKING:
    from ..base.choices import EngineName, Method, Precision

NEW_CAPABILITY = (8, 0)
"""Compute capability of CUDA devices from which they have bfloat16 and TF32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """What runs the network, and where."""

    engine: EngineName
    device: str = "cpu"
    """"cpu", "cuda" (every device, a worker process each), or "cuda:N" (that one)."""
    cuda: tuple[CudaDevice, ...] = ()
    """The devices that workers share out; none on the CPU."""
    precision: Precision = "float32"


def choose_engine(
    facts: MachineFacts,
    engine: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    *,
    compiles: bool = False,
) -> EngineChoice:
    """What is asked for; else torch on CUDA where torch sees a device, OpenVINO where it is installed, torch.

    A precision that only one engine offers, or torch.compile, chooses that engine.

    Raises:
        UsageError: no such engine, device or precision, or some that do not go together.
        EngineError: it is not on this machine, or does not compute in that precision.
    """
    engine, device, precision = engine or "auto", device or "auto", precision or "float32"
    if engine not in ("auto", *OWN):
        _require_known(engine)
    named = re.fullmatch(r"auto|cpu|cuda(:(\d+))?", device)
    if named is None:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if engine not in ("auto", *OWN):
        return _choose_added(engine, device, precision, compiles=compiles)
    if engine == "auto":
        engine = _only_engine(precision, device, compiles=compiles)
    if engine == "openvino" and compiles:
        raise UsageError("--compile is for torch, got --engine openvino, which compiles anyway; leave --compile out")
    if engine == "openvino" and device.startswith("cuda"):
        raise UsageError(f"openvino runs on the CPU, got --device {device}; use --engine torch, or --device cpu")
    if engine == "openvino" and not facts.has_openvino:
        raise EngineError("engine openvino is not installed; pip install openvino, or use --engine torch")
    if device.startswith("cuda") or (device == "auto" and engine != "openvino" and facts.cuda):
        cuda = _named_devices(facts.cuda, device, named[2])
        found = EngineChoice(engine="torch", device="cuda" if device == "auto" else device, cuda=cuda)
    elif engine == "torch" or not facts.has_openvino:
        found = EngineChoice(engine="torch")
    else:
        found = EngineChoice(engine="openvino")
    return replace(found, precision=_fitting(found, precision))


def _require_known(engine: str) -> None:
    names = ("auto", *ENGINES.names())
    if engine not in names:
        raise UsageError(f"engine must be {', '.join(names[:-1])} or {names[-1]}, got {engine!r}")


def _choose_added(engine: str, device: str, precision: str, *, compiles: bool) -> EngineChoice:
    """An engine that was added: on the CPU, in the network's own numbers."""
    ENGINES.find(engine)  # that it can be imported at all is told before anything that takes time
    if compiles:
        raise UsageError(f"--compile is for torch, got --engine {engine}; leave --compile out")
    if device.startswith("cuda"):
        raise UsageError(f"{engine} runs on the CPU, got --device {device}; use --engine torch, or --device cpu")
    return EngineChoice(engine=engine, precision=choose_precision(precision, engine))


def require_method(engine: str, method: Method) -> None:
    """
    Raises:
        UsageError: programs are asked for, or needed, of an engine that was added.
    """
    if method == "program" and engine not in OWN:
        raise UsageError(
            f"{engine} runs networks on windows, and this run is by programs; use --engine openvino or torch, or "
            "--method window where the network takes windows"
        )


def _only_engine(precision: str, device: str, *, compiles: bool) -> str:
    """The one engine that can do it; "auto" where there is a choice."""
    offering = [name for name, offered in PRECISIONS.items() if precision in offered]
    if compiles or offering == ["torch"] or device.startswith("cuda"):
        return "torch"
    return "openvino" if offering == ["openvino"] else "auto"


def _fitting(choice: EngineChoice, name: str) -> Precision:
    """The precision, where engine and device have it."""
    precision = choose_precision(name, choice.engine)
    if precision == "tf32" and not choice.cuda:
        raise EngineError("tf32 is what CUDA devices compute in, this run is on the CPU; use --precision float32")
    if precision in ("tf32", "bfloat16"):
        for device in choice.cuda:
            if device.capability < NEW_CAPABILITY:
                raise EngineError(
                    f"{precision} needs a CUDA device of compute capability 8.0, {device.name} has "
                    f"{device.capability[0]}.{device.capability[1]}; use --precision float16 or float32"
                )
    return precision


def _named_devices(seen: tuple[CudaDevice, ...], device: str, index: str | None) -> tuple[CudaDevice, ...]:
    if not seen:
        raise EngineError(
            f"device {device} needs a CUDA device that torch sees, and it sees none; use --device cpu, or install the "
            "driver and a torch that is built for CUDA"
        )
    if index is None:
        return seen
    if int(index) >= len(seen):
        raise EngineError(
            f"device cuda:N takes N from 0 to {len(seen) - 1} here, got {device}; torch sees "
            + ", ".join(f"cuda:{i} ({found.name})" for i, found in enumerate(seen))
        )
    return (seen[int(index)],)


def needs_cuda_facts(engine: str | None, device: str | None) -> bool:
    """Whether the choice depends on CUDA devices at all."""
    return engine in (None, "auto", "torch") and device != "cpu"
