"""An assignment: what one call is to compute, and into what, settled before anything is begun."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis.network import Network, as_network
from ..analysis.weights import require_current
from ..base.choices import ZarrFormat
from ..base.dtypes import stored_dtype
from ..base.errors import DamagedError, OutputError, UsageError
from ..base.memory import find_budget
from ..engines.engine import Engine
from ..engines.quantise import require_quantiser
from ..output.fingerprint import make_fingerprint, state_before
from ..output.records import RunFolder, is_there, writing
from ..output.resume import Kept, ignored_options, is_unfinished, keep_tiles, require_continuable
from ..output.store import OutputDescription, read_header, require_space
from ..planning.plan import TilePlan
from ..planning.planner import plan_tiles
from ..rasters.bands import match_network
from ..rasters.opening import as_raster
from ..rasters.parts import reference_to
from ..rasters.raster import Raster, fill_values, require_apart
from ..system.places import is_remote
from .events import MemoryProbed
from .memory_probe import memory_lookup
from .reference import Reference
from .request import RunRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one call is to compute, and into what."""

    raster: Raster
    network: Network
    plan: TilePlan
    description: OutputDescription
    fill: tuple[float, ...]
    fingerprint: dict[str, Any]
    """Of all that the result follows from: an output with another one is not continued."""
    out: Path
    zarr_format: ZarrFormat
    begins: bool = True
    """The output is made; False: it is there, and is continued."""

    def reference(self, engine: Engine | None) -> Reference:
        """What the start check compares with.

        Args:
            engine: of a network in few bits, in this process; None: torch in float32.
        """
        return Reference(raster=self.raster, plan=self.plan, network=self.network, fill=self.fill, engine=engine)


def prepare_assignment(raster: Any, network: Network | nn.Module, out: Path, request: RunRequest) -> Assignment:
    """Open, analyse and plan; nothing is written.

    Raises:
        TilerError: its subclasses say what.
    """
    raster = match_network(as_raster(raster), network)
    network = as_network(network, raster.bands, raster.dtype)
    fill = (0.0,) * raster.bands if request.fill is None else request.fill
    fill_values(fill, raster)  # refused before anything is begun
    require_current(network)
    description = request.description or _default_description(network)
    budget = find_budget(request.planning.memory)
    plan = plan_tiles(
        raster,
        network,
        request.planning,
        to_store=is_remote(out),
        dashboard=request.serves_dashboard,
        memory_of=memory_lookup(network, raster.shape_yx, budget, lambda: request.listener(MemoryProbed())),
    )
    zarr_format = request.writing.zarr_format
    fingerprint = make_fingerprint(raster, network, description, plan, fill, zarr_format)
    require_apart(raster, out)
    with writing(out):
        fingerprint |= _fingerprint_before(out, plan, request)
    return Assignment(
        raster=raster,
        network=network,
        plan=plan,
        description=description,
        fill=fill,
        fingerprint=fingerprint,
        out=out,
        zarr_format=zarr_format,
    )


def begin_or_continue(assignment: Assignment, folder: RunFolder, request: RunRequest) -> tuple[Assignment, Kept, str]:
    """See what is there already: (the assignment with the plan of the output that is continued, tiles that are done,
    options that go unheeded because of that).

    Raises:
        OutputError: something else is there, or does not fit on the disk.
    """
    out, plan, options = assignment.out, assignment.plan, request.writing
    # An unfinished output of this very run is continued, also where a finished one would be replaced.
    if not is_there(out) or (options.overwrite and not is_unfinished(out, assignment.fingerprint)):
        require_space(out, plan.output_bytes, "the output", check=options.space_check)
        if plan.precision == "int8":
            require_quantiser()
        return assignment, {}, ""
    plan = require_continuable(
        out,
        assignment.fingerprint,
        plan,
        paths=reference_to(assignment.raster)["paths"],
        resume=options.resume,
        core=request.planning.core,
        remedy="--overwrite" if request.scope.rest else "segment --overwrite",
    )
    kept = keep_tiles(
        out,
        plan,
        assignment.description.kind,
        folder,
        assignment.zarr_format,
        retry_failed=options.retry_failed,
        redo=request.scope.redo,
    )
    ignored = ignored_options(plan, request.planning.workers, request.planning.threads)
    return replace(assignment, plan=plan, begins=False), kept, ignored


def _fingerprint_before(out: Path, plan: TilePlan, request: RunRequest) -> dict[str, Any]:
    """What an output that is there adds to the fingerprint of the run that may continue it.

    Raises:
        OutputError: something that is not ours is there.
    """
    if out.is_symlink():
        raise OutputError(f"{out} is a link; name the store itself")
    if not is_there(out):
        return {}
    # A folder that is not ours is neither continued nor overwritten, nor given neighbours.
    try:
        header = read_header(out)
    except DamagedError:
        if not request.writing.overwrite:
            raise
        return {}
    # The network in int8 that it was begun with is the only one that may continue it.
    digest = header.get("fingerprint", {}).get("quantised")
    quantised = {"quantised": digest} if plan.precision == "int8" and digest else {}
    return quantised | (state_before(header) if request.writing.source_unchanged else {})


def _default_description(network: Network) -> OutputDescription:
    dtype = stored_dtype(network.output_dtype)
    if dtype.kind == "f":
        return OutputDescription(kind="logits")
    if network.channels == 1:
        return OutputDescription(kind="class")
    if str(network.output_dtype) != "torch.uint8":
        raise UsageError(
            f"the network's output must be class numbers in one channel, uint8 or floating, got {dtype} in "
            f"{network.channels} channels; end it with .to(torch.uint8)"
        )
    return OutputDescription(kind="probability")
