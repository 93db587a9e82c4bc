"""`outsize plan` and `outsize segment`: a raster through a segmentation model."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...models.segmentation.files.sources import load_model
from ...models.segmentation.networks.meaning import Activation, Task
from ...models.segmentation.networks.model import (
    Output,
    SegmentationModel,
    as_tile_network,
    describe_output,
    meaning_of,
)
from ...tiler.analysis.network import Network, analyze_network
from ...tiler.analysis.stated import state_network
from ...tiler.base.errors import TilerError, UsageError
from ...tiler.base.memory import find_budget
from ...tiler.base.text import format_bytes, format_seconds
from ...tiler.cluster.client import ClusterKeeper, ClusterOptions
from ...tiler.engines.precision_loss import PrecisionLoss
from ...tiler.engines.quantise import require_quantiser
from ...tiler.output.options import WriteOptions
from ...tiler.planning.options import PlanOptions
from ...tiler.planning.plan import TilePlan
from ...tiler.planning.planner import plan_tiles
from ...tiler.rasters.bands import BandMatch, match_bands
from ...tiler.rasters.notes import list_notes
from ...tiler.rasters.opening import open_with
from ...tiler.rasters.parts import open_stack
from ...tiler.rasters.raster import Raster, ReadOptions, fill_values
from ...tiler.runs.check import StartCheck
from ...tiler.runs.events import (
    Calibrating,
    ClusterReady,
    Event,
    Listener,
    LossMeasured,
    MemoryProbed,
    ProgramsMade,
    RunPlanned,
    StartChecked,
    TileFinished,
)
from ...tiler.runs.memory_probe import memory_lookup
from ...tiler.runs.proof import prove_network
from ...tiler.runs.request import RunRequest, Scope
from ...tiler.runs.run import run_raster
from ...tiler.runs.summary import RunSummary
from ...tiler.system.machine import has_int8_instructions, measure_flops_per_s
from ..base.console import Console, Step, count_of, refuse_picture_name


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOptions:
    """What `plan` and `segment` share."""

    source: str
    reading: ReadOptions
    model: str | None
    output: Output | None
    """None: as the model has it."""
    planning: PlanOptions
    weights: str | None = None
    weights_key: str | None = None
    task: Task | None = None
    """This and the next two go before what the model says."""
    activation: Activation | None = None
    threshold: float | None = None
    trust_model: bool = False
    sha256: str | None = None
    halo: int | None = None
    """Stated by the user, for a network that cannot be traced."""
    halo_stride: int | None = None


class Preparation:
    """Opens rasters, and gives each the network that fits; networks of one number of bands and dtype are analysed
    once."""

    def __init__(self, options: SegmentOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._models: dict[int, SegmentationModel] = {}
        self.match: BandMatch | None = None
        """Of the raster that was opened last."""
        self._known: dict[tuple[int, str], tuple[SegmentationModel, Network]] = {}

    def open(self, paths: Sequence[str], names: Sequence[str] = ()) -> tuple[Raster, SegmentationModel, Network]:
        """The raster of one path, or of several that are its bands, with the model's bands in the model's order.

        Args:
            names: of the bands, in place of the files' own; empty: those.

        Raises:
            TilerError: it cannot be read, or the model does not take it.
        """
        reading = replace(self._options.reading, names=tuple(names) or self._options.reading.names)
        raster = open_with(paths[0], reading) if len(paths) == 1 else open_stack(paths, reading)
        model = self._load(raster)
        self.match = match_bands(raster, model.bands, f"model {model.name}")
        raster = self.match.raster
        key = (raster.bands, str(raster.dtype))
        if key not in self._known:
            self._known[key] = self.analyse(raster, model)
        model, network = self._known[key]
        fill_values(model.fill, raster)
        return raster, model, network

    def explain(self, model: SegmentationModel) -> list[str]:
        """Of the raster that was opened last: which of its bands go into which of the model's, and how."""
        assert self.match is not None
        return [
            f"bands     {self.match}",
            *(f"{word:<9} {text}" for word, text in list_notes(self.match.raster)),
            f"scaling   {_explain_scaling(model)}",
        ]

    def bands_json(self, model: SegmentationModel) -> dict[str, Any]:
        """The same as plain values."""
        assert self.match is not None
        raster = self.match.raster
        return {
            "matched": self.match.how,
            "model": list(model.bands),
            "raster": list(raster.band_names),
            "numbers": list(raster.chosen_bands),
        }

    def _load(self, raster: Raster) -> SegmentationModel:
        """The model; of a network that does not say it by itself, for so many bands as the raster has."""
        options = self._options
        if raster.bands not in self._models:
            self._models[raster.bands] = load_model(
                options.model,
                weights=options.weights,
                bands=raster.bands,
                trust=options.trust_model,
                sha256=options.sha256,
                weights_key=options.weights_key,
                task=options.task,
                activation=options.activation,
                threshold=options.threshold,
            )
        return self._models[raster.bands]

    def analyse(self, raster: Raster, model: SegmentationModel | None = None) -> tuple[SegmentationModel, Network]:
        """The model, and its network on rasters like this one.

        Args:
            model: as it was loaded for the raster that this one was chosen from; None: it is loaded.

        Raises:
            TilerError: the model cannot be loaded or tiled, or does not take the raster's bands.
        """
        options = self._options
        model = model or self._load(raster)
        if raster.bands != len(model.bands):
            raise UsageError(
                f"{raster.path} has {count_of(raster.bands, 'band')}, model {model.name} takes {len(model.bands)}; "
                "give the --model that it was segmented with"
            )
        module = as_tile_network(model, options.output)
        if options.halo is not None:
            halo, stride = options.halo, options.halo_stride
            return model, state_network(module, raster.bands, raster.dtype, halo=halo, stride=stride)
        if options.halo_stride is not None:
            raise UsageError("--halo-stride goes with --halo; give both, or neither")
        with self._console.stages("analysis") as tell:
            return model, analyze_network(module, raster.bands, raster.dtype, tell=tell)


def _explain_scaling(model: SegmentationModel) -> str:
    """What the model does to pixels before its network sees them."""
    scaling = model.scaling
    if scaling.kind == "none":
        return "none, the network sees pixels as they are"
    pairs = list(zip(scaling.kinds, scaling.subtract, scaling.divide, strict=True))
    shown = [f"(x - {subtract:.5g}) / {divide:.5g}" for _, subtract, divide in pairs[:4]]
    more = f", ... ({len(pairs)})" if len(pairs) > len(shown) else ""
    return f"{', '.join(dict.fromkeys(scaling.kinds))}: {', '.join(shown)}{more}"


PROBING = "memory    measuring what the engine adds to this network, once on this machine"


def make_plan(
    console: Console, options: SegmentOptions, raster: Raster, network: Network, *, dashboard: bool, to_store: bool
) -> TilePlan:
    budget = find_budget(options.planning.memory)
    return plan_tiles(
        raster,
        network,
        options.planning,
        dashboard=dashboard,
        to_store=to_store,
        memory_of=memory_lookup(network, raster.shape_yx, budget, lambda: console.remark(PROBING)),
    )


def warn_of_precision(console: Console, plan: TilePlan) -> None:
    """Say where fewer bits may bring nothing."""
    if plan.precision == "int8" and has_int8_instructions() is False:
        console.remark(
            "precision this machine's processor has no 8-bit products (VNNI, AMX): int8 may be no faster than float32"
        )


def run_plan(console: Console, options: SegmentOptions, *, dashboard: bool = True, to_store: bool = False) -> None:
    """Show every decision that `segment` would make, without reading a pixel."""
    preparation = Preparation(options, console)
    raster, model, network = preparation.open([options.source])
    plan = make_plan(console, options, raster, network, dashboard=dashboard, to_store=to_store)
    if plan.precision == "int8":
        require_quantiser()
    warn_of_precision(console, plan)
    speed = measure_flops_per_s(device=plan.device)
    console.result(
        "\n".join([*explain_model(model), *preparation.explain(model), plan.explain(speed)]),
        {
            "model": model.name,
            **summarise_meaning(model),
            "bands": preparation.bands_json(model),
            "plan": plan.to_json(),
            "estimated_s": round(plan.estimate_s(speed), 1),
        },
    )


def explain_model(model: SegmentationModel) -> list[str]:
    """Lines on a model, what was taken for granted among them."""
    return [f"model     {model.name}", *model.remarks, f"task      {meaning_of(model).sentence()}"]


def summarise_meaning(model: SegmentationModel) -> dict[str, Any]:
    """What the network's values mean, as JSON."""
    meaning = meaning_of(model)
    return {
        "task": meaning.task,
        "activation": meaning.activation,
        "threshold": meaning.threshold if meaning.task == "binary" else None,
        "assumed": meaning.assumed or None,
    }


def run_proof(console: Console, options: SegmentOptions) -> bool:
    """Try on a small image what the plan takes for granted; returns whether it holds."""
    _, model, network = Preparation(options, console).open([options.source])
    began = time.perf_counter()
    proof = prove_network(network, options.planning.method)
    verdict = "proved: tiles equal the whole image" if proof.passed else "NOT proved: see above"
    rows = [[step.name, "holds" if step.passed else "FAILS", step.text] for step in proof.steps]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {result}  {text}" for name, result, text in rows]
    seconds = time.perf_counter() - began
    console.result(
        "\n".join(
            [
                f"model {model.name} by {proof.method}s on {proof.shape[0]} x {proof.shape[1]} px in float64, at the "
                f"logits, cores of {proof.core}:",
                *lines,
                f"{verdict} ({format_seconds(seconds)})",
            ]
        ),
        {
            "model": model.name,
            "method": proof.method,
            "shape": list(proof.shape),
            "core": proof.core,
            "proved": proof.passed,
            "steps": [{"name": s.name, "passed": s.passed, "text": s.text} for s in proof.steps],
        },
    )
    return proof.passed


def run_segment(
    console: Console,
    options: SegmentOptions,
    out: Path,
    cluster: ClusterOptions,
    writing: WriteOptions,
    *,
    report: Path | None = None,
) -> RunSummary:
    """Segment a raster; returns what was done, start-up counted from here.

    Args:
        report: a page on the run; written also when the run failed.
    """
    refuse_picture_name("segment", out)
    listener = RunListener(console, own_page=cluster.dashboard_address is not None)
    if report is None:
        return _segment(console, options, out, cluster, writing, listener)
    from ..base.page import require_page_target
    from .report import StoppedRun, write_report

    require_page_target(report, overwrite=True)
    stop = StoppedRun(source=options.source, command=tuple(sys.argv), model=options.model or "the shipped one")
    try:
        return _segment(console, options, out, cluster, writing, listener)
    except BaseException as error:
        stop.error = str(error) if isinstance(error, TilerError) else f"{type(error).__name__}: {error}".rstrip(": ")
        stop.is_brief = not isinstance(error, Exception)
        raise
    finally:
        stop.plan, stop.check, stop.peak_bytes = listener.plan, listener.check, listener.peak_bytes
        stop.loss = listener.loss
        stop.model = listener.model or stop.model
        try:
            write_report(console, out, report, stop if stop.error else None, trust=options.reading.trust)
            console.remark(f"report    {report}")
        except Exception as error:  # noqa: BLE001 - what became of the run is what is to be told
            console.remark(f"report    cannot be written: {error}")


def _segment(
    console: Console,
    options: SegmentOptions,
    out: Path,
    cluster: ClusterOptions,
    writing: WriteOptions,
    listener: RunListener,
) -> RunSummary:
    began = time.perf_counter()
    preparation = Preparation(options, console)
    raster, model, network = preparation.open([options.source])
    console.remark_lines([*explain_model(model), *preparation.explain(model)])
    listener.model = model.name
    try:
        summary = segment_raster(raster, model, network, out, options, cluster, writing, listener, since=began)
    finally:
        listener.close()
    for row, column, reason in summary.failed_tiles[:20]:
        console.remark(f"failed    tile {row},{column}: {reason}")
    if len(summary.failed_tiles) > 20:
        console.remark(f"failed    and {len(summary.failed_tiles) - 20} more, in {out}.run")
    if summary.undeclared_pixels:
        count = count_of(summary.undeclared_pixels, "pixel")
        console.remark(f"nodata    {count} of NaN or infinity, which the raster does not declare as nodata")
    if summary.not_finite_pixels:
        count = count_of(summary.not_finite_pixels, "pixel")
        console.remark(f"result    {count} of NaN or infinity, which the network gives where the raster has pixels")
    console.result(_sentence(summary, out), {"model": model.name, **summarise_meaning(model), **summary.to_json()})
    return summary


def segment_raster(
    raster: Raster,
    model: SegmentationModel,
    network: Network,
    out: Path,
    options: SegmentOptions,
    cluster: ClusterOptions | ClusterKeeper,
    writing: WriteOptions,
    listener: Listener,
    *,
    scope: Scope | None = None,
    since: float | None = None,
) -> RunSummary:
    """One raster, as the options say.

    Args:
        scope: which tiles; None: those that no call has done yet.
        since: `time.perf_counter()` from which start-up is counted; None: the call.
    """
    request = RunRequest(
        planning=options.planning,
        writing=writing,
        description=describe_output(model, options.output),
        fill=model.fill,
        cluster=cluster,
        listener=listener,
        scope=scope or Scope(),
        since=since,
    )
    return run_raster(raster, network, out, request)


def _sentence(summary: RunSummary, out: Path) -> str:
    failed = f", {len(summary.failed_tiles)} FAILED (--retry-failed tries them again)" if summary.failed_tiles else ""
    loss = f", {summary.precision}: {100 * summary.loss.flipped_share:.3g} % of pixels flipped" if summary.loss else ""
    if not summary.tiles:
        return f"{out}: nothing to do, all {count_of(summary.resumed_tiles, 'tile')} are there{failed}"
    read = ""
    if summary.read_amplification is not None:
        read = (
            f", blocks decoded {summary.read_amplification:.2f} x (planned {summary.predicted_read_amplification:.2f}, "
            f"and {summary.check_read_amplification:.2f} for the start check)"
        )
    return (
        f"{out}: {summary.pixels / 1e6:.1f} Mpx in {format_seconds(summary.seconds)} "
        f"({summary.mpx_per_s:.2f} Mpx/s, start-up {format_seconds(summary.startup_s)}), "
        f"{count_of(summary.tiles, 'tile')}{failed}, peak memory {format_bytes(summary.peak_bytes)} "
        f"(predicted {format_bytes(summary.predicted_peak_bytes)}){read}{loss}"
    )


class RunListener:
    """Shows a run's events."""

    def __init__(self, console: Console, *, own_page: bool) -> None:
        self._console = console
        self._own_page = own_page
        self._pixels = 0
        self._told = time.monotonic()
        self._open = ExitStack()
        self._step: Step | None = None
        self.plan: TilePlan | None = None
        self.check: StartCheck | None = None
        self.loss: PrecisionLoss | None = None
        self.model = ""
        self.peak_bytes = 0
        """Of what was seen as tiles ended."""

    def __call__(self, event: Event) -> None:
        match event:
            case RunPlanned(plan=plan, resumed=resumed, pixels=pixels, died=died, ignored=ignored):
                self.plan = plan
                self._console.remark_lines(plan.explain().split("\n"))
                warn_of_precision(self._console, plan)
                self._pixels = pixels
                if died:
                    self._console.remark(f"resume    the run before died: {died}")
                if resumed:
                    self._console.remark(f"resume    {resumed} of {len(plan.grid)} tiles are there already")
                if ignored:
                    self._console.remark(f"resume    {ignored}")
            case MemoryProbed():
                self._console.remark(PROBING)
            case ProgramsMade(made=made, total=total):
                now = time.monotonic()
                if made == total or now - self._told >= 5:
                    self._told = now
                    self._console.remark(f"programs  {made} of {total} made")
            case Calibrating(windows=windows):
                self._console.remark(f"precision calibrating int8 on {count_of(windows, 'window')} of the raster")
            case LossMeasured(loss=loss):
                self.loss = loss
                self._console.remark(f"loss      {loss.sentence()}")
            case ClusterReady(dashboard=dashboard, unplanned=unplanned):
                if unplanned:
                    self._console.remark(f"workers   {unplanned}")
                self._console.remark(f"dashboard {(self._own_page and dashboard) or 'none'}")
            case StartChecked(check=check):
                self.check = check
                self._console.remark(f"check     {check.sentence()}")
                if check.passed:
                    self._step = self._open.enter_context(self._console.step("segment", self._pixels))
            case TileFinished() if self._step is not None:
                self.peak_bytes = max(self.peak_bytes, event.memory_bytes)
                memory = format_bytes(event.memory_bytes)
                self._step.advance(event.record.pixels, f"{event.finished}/{event.total} tiles, memory {memory}")
            case TileFinished():
                pass

    def close(self) -> None:
        self._open.close()
