"""`outsize segment SRC... --out-dir DIR`: many scenes, one after the other, past those that fail."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from ...models.segmentation.networks.model import SegmentationModel
from ...tiler.base.errors import OutputError, TilerError
from ...tiler.base.text import format_bytes, format_seconds
from ...tiler.cluster.client import ClusterError, ClusterKeeper, ClusterOptions
from ...tiler.output.options import WriteOptions
from ...tiler.output.records import writing
from ...tiler.runs.events import ClusterReady, Event, MemoryProbed, RunPlanned, TileFinished
from ...tiler.runs.summary import RunSummary
from ...tiler.system.files import append_line, make_folder
from ...tiler.system.machine import measure_flops_per_s
from ...tiler.system.places import is_remote, require_lasting
from ..base.console import Console, Step, count_of, format_table
from .run import PROBING, Preparation, SegmentOptions, explain_model, make_plan, segment_raster
from .scenes import BatchScene

SUMMARY = "batch.jsonl"
"""In the output folder: one line for each scene of each call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneResult:
    """What became of a scene."""

    scene: BatchScene
    out: Path
    state: str
    """"done"; "partial": with failed tiles; "failed"."""
    error: str = ""
    summary: RunSummary | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.scene.name,
            "source": list(self.scene.paths),
            "out": str(self.out),
            "state": self.state,
            "error": self.error,
            **({"run": self.summary.to_json()} if self.summary else {}),
        }


def run_dry(
    console: Console, scenes: list[BatchScene], options: SegmentOptions, folder: Path, *, dashboard: bool
) -> bool:
    """List plan and cost of each scene, without reading a pixel; whether all can be planned."""
    preparation, speed_on = Preparation(options, console), cache(lambda device: measure_flops_per_s(device=device))
    rows: list[list[str]] = []
    values: list[dict[str, Any]] = []
    total_s, total_bytes, told = 0.0, 0, list[str]()
    for scene in scenes:
        said: dict[str, Any] = {"name": scene.name, "source": list(scene.paths), "out": str(_place(folder, scene))}
        try:
            raster, model, network = preparation.open(scene.paths, scene.bands)
            told = _explain(console, preparation, model, told)
            plan = make_plan(console, options, raster, network, dashboard=dashboard, to_store=is_remote(folder))
        except TilerError as error:
            rows.append([scene.name, "cannot be planned", "", "", "", "", ""])
            values.append({**said, "error": str(error)})
            console.remark(f"failed    {scene.label}: {error}")
            continue
        seconds = plan.estimate_s(speed_on(plan.device))
        total_s, total_bytes = total_s + seconds, total_bytes + plan.output_bytes
        values.append(
            {
                **said,
                **plan.summarise(),
                "flops": plan.flops,
                "output_bytes": plan.output_bytes,
                "estimated_s": round(seconds, 1),
            }
        )
        rows.append(
            [
                scene.name,
                f"{raster.shape_yx[0]} x {raster.shape_yx[1]}",
                str(len(plan.grid)),
                format_bytes(plan.memory.total_bytes),
                f"{plan.flops / 1e12:.3g} TFLOP",
                format_bytes(plan.output_bytes),
                format_seconds(seconds),
            ]
        )
    table = format_table(["scene", "pixels", "tiles", "memory", "work", "output at most", "time"], rows)
    text = f"{table}\n{count_of(len(scenes), 'scene')}, {format_bytes(total_bytes)} of output at most, about "
    console.result(
        f"{text}{format_seconds(total_s)} and a start-up for each",
        {"scenes": values, "output_bytes": total_bytes, "estimated_s": round(total_s, 1)},
    )
    return all("error" not in value for value in values)


def run_batch(
    console: Console,
    scenes: list[BatchScene],
    options: SegmentOptions,
    folder: Path,
    cluster: ClusterOptions,
    writing: WriteOptions,
) -> list[SceneResult]:
    """Segment scenes into DIR/NAME.zarr; one that fails does not stop the others.

    Raises:
        ClusterError: the scheduler is gone.
        OutputError: the folder cannot be made or written.
    """
    _require_writable(folder)
    began, results = time.monotonic(), list[SceneResult]()
    preparation = Preparation(options, console)
    sizes = [_count_pixels(preparation, scene) for scene in scenes]
    dashboard = cluster.dashboard_address is not None
    told: list[str] = []
    with ClusterKeeper(cluster) as keeper, console.step("batch", sum(sizes)) as step:
        for number, (scene, pixels) in enumerate(zip(scenes, sizes, strict=True), 1):
            listener = _SceneListener(console, step, f"scene {number}/{len(scenes)} {scene.name}", own_page=dashboard)
            out = _place(folder, scene)
            scene_began = time.perf_counter()
            try:
                raster, model, network = preparation.open(scene.paths, scene.bands)
                told = _explain(console, preparation, model, told)
                summary = segment_raster(
                    raster, model, network, out, options, keeper, writing, listener, since=scene_began
                )
                state = "partial" if summary.failed_tiles else "done"
                result = SceneResult(scene=scene, out=out, state=state, summary=summary)
            except ClusterError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a scene raises must not end the batch
                reason = str(error) if isinstance(error, TilerError) else f"{type(error).__name__}: {error}"
                result = SceneResult(scene=scene, out=out, state="failed", error=" ".join(reason.split()))
            step.advance(max(0, pixels - listener.pixels))
            results.append(result)
            _note(folder, result)
            console.remark(f"[{number}/{len(scenes)}] {describe_result(result)}")
    console.result(
        _sentence(results, folder, time.monotonic() - began),
        {
            "scenes": len(results),
            **{state: sum(r.state == state for r in results) for state in ("done", "partial", "failed")},
            "seconds": round(time.monotonic() - began, 3),
            "results": [result.to_json() for result in results],
        },
    )
    return results


def _explain(console: Console, preparation: Preparation, model: SegmentationModel, told: list[str]) -> list[str]:
    """Say what a model is and which bands go into it, where that is not what was told of the scene before; what is
    told now."""
    lines = [*explain_model(model), *preparation.explain(model)]
    if lines != told:
        console.remark_lines(lines)
    return lines


def _require_writable(folder: Path) -> None:
    """The folder is made, and takes a line; before the first scene is begun."""
    require_lasting(folder)
    try:
        with writing(folder):
            make_folder(folder)
            if not is_remote(folder):
                (folder / SUMMARY).open("a").close()
    except OutputError as error:
        raise OutputError(f"{str(error).split('; ')[0]}; choose another --out-dir") from error


def _note(folder: Path, result: SceneResult) -> None:
    said = {"at": datetime.now().astimezone().isoformat(), **result.to_json()}
    with writing(folder):
        append_line(folder / SUMMARY, json.dumps(said))


def _place(folder: Path, scene: BatchScene) -> Path:
    return folder / f"{scene.name}.zarr"


def _count_pixels(preparation: Preparation, scene: BatchScene) -> int:
    """Of one scene, for the display; 0 where it cannot be opened, which its turn tells."""
    try:
        height, width = preparation.open(scene.paths, scene.bands)[0].shape_yx
    except Exception:  # noqa: BLE001
        return 0
    return height * width


def describe_result(result: SceneResult) -> str:
    """In one line."""
    summary = result.summary
    if summary is None:
        return f"{result.scene.name}: FAILED: {result.error}"
    if not summary.tiles:
        done = f"nothing to do, all {count_of(summary.resumed_tiles, 'tile')} are there"
    else:
        done = f"{summary.pixels / 1e6:.1f} Mpx in {format_seconds(summary.seconds)} ({summary.mpx_per_s:.2f} Mpx/s)"
    failed = f", {count_of(len(summary.failed_tiles), 'tile')} FAILED" if summary.failed_tiles else ""
    undeclared = summary.undeclared_pixels
    strange = f", {count_of(undeclared, 'pixel')} of undeclared NaN or infinity" if undeclared else ""
    if summary.not_finite_pixels:
        strange += f", {count_of(summary.not_finite_pixels, 'pixel')} where the network gives NaN or infinity"
    return f"{result.out}: {done}{failed}{strange}"


def _sentence(results: list[SceneResult], folder: Path, seconds: float) -> str:
    pixels = sum(result.summary.pixels for result in results if result.summary)
    parts = [f"{sum(r.state == 'done' for r in results)} of {count_of(len(results), 'scene')} done"]
    for state, words in (("partial", "with failed tiles (--retry-failed tries them again)"), ("failed", "FAILED")):
        count = sum(result.state == state for result in results)
        parts += [f"{count} {words}"] if count else []
    peak = max((result.summary.peak_bytes for result in results if result.summary), default=0)
    return (
        f"{folder}: {', '.join(parts)}; {pixels / 1e6:.1f} Mpx in {format_seconds(seconds)}, peak memory "
        f"{format_bytes(peak)}; each scene in {SUMMARY}"
    )


class _SceneListener:
    """One scene's tiles on the batch's display."""

    def __init__(self, console: Console, step: Step, label: str, *, own_page: bool) -> None:
        self._console, self._step, self._label, self._own_page = console, step, label, own_page
        self.pixels = 0

    def __call__(self, event: Event) -> None:
        match event:
            case RunPlanned(plan=plan, pixels=pixels, died=died, ignored=ignored):
                if died:
                    self._console.remark(f"resume    {self._label}: the run before died: {died}")
                if ignored:
                    self._console.remark(f"resume    {self._label}: {ignored}")
                there = plan.output_shape[1] * plan.output_shape[2] - pixels
                self._advance(there, f"{self._label}, planned")
            case MemoryProbed():
                self._console.remark(PROBING)
            case ClusterReady(dashboard=dashboard, unplanned=unplanned):
                if unplanned:
                    self._console.remark(f"workers   {self._label}: {unplanned}")
                if dashboard and self._own_page:
                    self._step.advance(0, f"{self._label}, dashboard {dashboard}")
            case TileFinished():
                memory = format_bytes(event.memory_bytes)
                detail = f"{self._label}, {event.finished}/{event.total} tiles, memory {memory}"
                self._advance(event.record.pixels, detail)
            case _:
                pass

    def _advance(self, pixels: int, detail: str) -> None:
        self.pixels += pixels
        self._step.advance(pixels, detail)
