"""The conversion of a network for the engine, beside the start of workers: to windows, to programs, or to int8."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base.geometry import Interval
from ..base.memory import CUDA_CONTEXT_BYTES
from ..engines.engine import Engine, EngineProgram
from ..engines.loading import compile_program, load_windows
from ..engines.precision_loss import PrecisionLoss
from ..engines.programs import pack_programs
from ..engines.quantise import QuantisedNetwork, quantise_network
from ..engines.torch import AUTOCAST, load_reference
from ..output.store import read_header
from ..system.logs import log
from .assignment import Assignment
from .calibration import read_calibration
from .events import Calibrating, Listener, LossMeasured, ProgramsMade


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A network as its engine takes it."""

    program: EngineProgram
    engine: Engine | None = None
    """Of a network in few bits, in this process: what the start check compares with. None: torch in float32."""
    loss: PrecisionLoss | None = None
    """Of int8, measured when the output was begun."""
    quantised: QuantisedNetwork | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the conversion adds to that of the output."""
        return {"quantised": self.quantised.digest} if self.quantised is not None else {}


def begin_conversion(assignment: Assignment, folder: Path, tell: Listener) -> Future[Converted]:
    """Begin to convert the network, while workers start."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="convert")
    converting = pool.submit(_convert, assignment, folder, tell)
    pool.shutdown(wait=False)
    return converting


def tell_loss(loss: PrecisionLoss | None, tell: Listener) -> None:
    if loss is not None:
        log.info("loss: %s", loss.sentence())
        tell(LossMeasured(loss=loss))


def _convert(assignment: Assignment, folder: Path, tell: Listener) -> Converted:
    plan, network = assignment.plan, assignment.network
    if plan.precision == "int8":
        found = _quantise(assignment, folder, tell)
    elif plan.method == "window":
        found = Converted(program=compile_program(network, plan.engine, plan.threads, plan.precision))
    else:
        rows, columns = (
            [Interval(start=span.core[0], stop=span.core[1]) for span in spans] for spans in (plan.rows, plan.columns)
        )

        def report(made: int, total: int) -> None:
            tell(ProgramsMade(made=made, total=total))

        shape_yx = assignment.raster.shape_yx
        found = Converted(
            program=pack_programs(network, plan.engine, plan.threads, shape_yx, rows, columns, report, plan.precision)
        )
    program = replace(
        found.program,
        device=plan.device,
        device_limit_bytes=max(0, plan.device_budget_bytes - CUDA_CONTEXT_BYTES),
        batch=plan.batch,
        with_logits=plan.with_logits,
        compiles=plan.compiles,
    )
    return replace(found, program=program)


def load_autocast(converted: Converted) -> Converted:
    """With the reference of a network that torch runs in few bits; others as they are."""
    if converted.program.precision not in AUTOCAST:
        return converted
    return replace(converted, engine=load_reference(converted.program))


def _quantise(assignment: Assignment, folder: Path, tell: Listener) -> Converted:
    """The network in int8: of the output that is continued, or made now; with its loss."""
    plan, network = assignment.plan, assignment.network
    if not assignment.begins:
        quantised = QuantisedNetwork.read(folder, assignment.fingerprint["quantised"])
        program = quantised.pack(network, plan.threads)
        stored = read_header(assignment.out).get("precision_loss")
        loss = PrecisionLoss.from_json(stored) if stored else None
        tell_loss(loss, tell)
        return Converted(program=program, engine=load_windows(program), loss=loss, quantised=quantised)
    found = read_calibration(assignment.raster, network, assignment.plan.wanted_region, assignment.fill)
    tell(Calibrating(windows=len(found.calibrated)))
    quantised = quantise_network(network, [sample.image for sample in found.calibrated], plan.threads)
    program = quantised.pack(network, plan.threads)
    engine = load_windows(program)
    loss = assignment.reference(engine).measure_loss(found.held_out)
    tell_loss(loss, tell)
    return Converted(program=program, engine=engine, loss=loss, quantised=quantised)
