"""`outsize report`: a page on a run that opens anywhere: pictures, areas, plan, checks, speed, failures, provenance."""

from __future__ import annotations

import base64
import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...tiler.base.errors import OutputError
from ...tiler.base.text import format_bytes
from ...tiler.base.typed import find_misfit
from ...tiler.cluster.tile_map import group_failures
from ...tiler.engines.precision_loss import PrecisionLoss
from ...tiler.output.records import is_there, read_records, read_runs, run_folder, writing
from ...tiler.output.store import plan_of, read_header
from ...tiler.planning.plan import TilePlan
from ...tiler.runs.check import StartCheck
from ...tiler.system.files import upload_bytes
from ...tiler.system.machine import find_versions
from ..base.console import Console, count_of
from ..base.page import render_page, require_page_target
from .areas import Areas, count_areas
from .quicklook import Quicklook, make_quicklook

BINS = 120
"""Of the throughput's curve."""
GAP_S = 30.0
"""Between two tiles' ends: longer ones lie between two calls, and are cut out of the curve."""
LISTED = 500
"""Reasons of failed tiles in the table, and tiles of each."""


@dataclass(slots=True, kw_only=True)
class StoppedRun:
    """What is known of a run that stopped, which may have left nothing."""

    source: str
    command: tuple[str, ...] = ()
    model: str = ""
    error: str = ""
    plan: TilePlan | None = None
    check: StartCheck | None = None
    loss: PrecisionLoss | None = None
    peak_bytes: int = 0
    is_brief: bool = False
    """It was interrupted; whoever does that does not want to wait for pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Mpx/s over the time in which tiles ended, pauses between calls cut out."""

    seconds: float
    mpx_per_s: list[float]
    breaks: list[float]
    """Where a pause was cut out, in seconds."""


def run_report(console: Console, out: Path, target: Path | None, *, overwrite: bool, trust: bool = False) -> None:
    """Write the page on an output; beside it, OUT.html, where no other place is named.

    Args:
        trust: of the input, as in `open_raster`.
    """
    target = target if target is not None else out.with_name(f"{out.name.removesuffix('.zarr')}.html")
    require_page_target(target, overwrite=overwrite)
    read_header(out)
    size = write_report(console, out, target, trust=trust)
    console.result(f"{target}: {format_bytes(size)}", {"out": str(target), "bytes": size})


def write_report(
    console: Console, out: Path, target: Path, stop: StoppedRun | None = None, *, trust: bool = False
) -> int:
    """Write the page, also on a run that stopped; returns its bytes."""
    page = render_report(console, out, stop, trust=trust).encode()
    with writing(target):
        upload_bytes(target, page)
    return len(page)


def render_report(console: Console, out: Path, stop: StoppedRun | None = None, *, trust: bool = False) -> str:
    """The page's text."""
    runs = read_runs(run_folder(out))
    values: dict[str, Any] = {
        "out": str(out),
        "stop": stop,
        "plan": _plan_lines(stop.plan) if stop and stop.plan else None,
        "check": stop.check.sentence() if stop and stop.check else None,
        "check_passed": stop.check.passed if stop and stop.check else None,
        "loss": stop.loss.sentence() if stop and stop.loss else None,
        "runs": runs,
        "commands": {tuple(run.get("command", ())) for run in runs},
        "versions": find_versions(),
        "header": None,
    }
    try:
        header = read_header(out) if is_there(out) else None
    except OutputError:
        header = None  # somebody else's, which is why the run stopped
    if header is not None:
        pictures = not (stop and stop.is_brief)
        values.update(_describe_output(console, out, header, pictures=pictures, trust=trust))
    return render_page("report.html", "report", values, moment=_format_moment)


def _plan_lines(plan: TilePlan) -> list[list[str]]:
    return [line.split(maxsplit=1) for line in plan.explain().splitlines()]


def _read_checks(out: Path, header: dict[str, Any]) -> tuple[StartCheck | None, PrecisionLoss | None]:
    """What was measured when the output was begun."""
    check, loss = header.get("start_check"), header.get("precision_loss")
    try:
        found = StartCheck(**check) if check else None, PrecisionLoss.from_json(loss) if loss else None
        misfit = next(filter(None, (find_misfit(each) for each in found if each)), "")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        misfit = str(error)
    else:
        if not misfit:
            return found
    raise OutputError(f"{out} has damaged metadata: its checks: {misfit}; segment --overwrite makes it anew")


def _describe_output(
    console: Console, out: Path, header: dict[str, Any], *, pictures: bool, trust: bool
) -> dict[str, Any]:
    plan = plan_of(out, header)
    records = read_records(out)
    failed = sorted((at, str(r.get("error", ""))) for at, r in records.items() if r.get("state") == "failed")
    done = sum(record.get("state") == "done" for record in records.values())
    run = header.get("run")
    if run is not None and not records:
        done = len(plan.grid) - run["failed_tiles"]
        failed = [((tile["row"], tile["column"]), tile["error"]) for tile in run["failures"]]
    quicklook = make_quicklook(console, out, header, trust=trust) if pictures else None
    areas = count_areas(console, out, header) if pictures and header["kind"] == "class" else None
    check, loss = _read_checks(out, header)
    return {
        "header": header,
        "plan": _plan_lines(plan),
        "tiles": len(plan.grid),
        "tiles_text": count_of(len(plan.grid), "tile"),
        "done": done,
        "failed": [(reason, _list_tiles(cells)) for reason, cells in group_failures(failed)[:LISTED]],
        "failed_count": len(failed),
        "waiting": len(plan.grid) - done - len(failed),
        "run": run,
        "check": check.sentence() if check else None,
        "check_passed": check.passed if check else None,
        "loss": loss.sentence() if loss else None,
        "before": _as_data(quicklook.source) if quicklook and quicklook.source else None,
        "before_name": quicklook.source_name if quicklook else "",
        "after": _as_data(quicklook.result) if quicklook else None,
        "legend": [(name, _css(colour), share) for name, colour, share in quicklook.legend] if quicklook else [],
        "areas": areas,
        "area_rows": _area_rows(areas),
        "map": _as_data(draw_map(quicklook, plan, {at for at, _ in failed}, set(records))) if quicklook else None,
        "curve": _curve(measure_throughput(list(records.values()))),
    }


def _list_tiles(cells: list[tuple[int, int]]) -> str:
    more = f"; and {len(cells) - LISTED:,} more, in the run's folder" if len(cells) > LISTED else ""
    return "; ".join(f"{row},{column}" for row, column in cells[:LISTED]) + more


def _area_rows(areas: Areas | None) -> list[tuple[str, str, int, float, float | None]]:
    if areas is None:
        return []
    ordered = sorted(areas.classes, key=lambda entry: -entry.pixels)
    return [(c.name, _css(c.colour), c.pixels, 100 * c.share, c.hectares) for c in ordered]


def _format_moment(text: str) -> str:
    """2026-11-24T23:05:01+00:00 -> 2026-11-24 23:05:01"""
    return text[:19].replace("T", " ")


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _as_data(picture: Image.Image) -> str:
    """A picture inside a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_map(
    quicklook: Quicklook, plan: TilePlan, failed: set[tuple[int, int]], known: set[tuple[int, int]]
) -> Image.Image:
    """The grid of tiles over a grey picture: failed ones red, those that no call has done dimmed."""
    grey = (quicklook.source or quicklook.result).convert("L").convert("RGB")
    width, height = grey.size
    canvas = Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.35)
    draw = ImageDraw.Draw(canvas, "RGBA")
    rows, columns = plan.grid.counts
    y_edges = [round(min(1.0, row * plan.core[0] / plan.output_shape[1]) * height) for row in range(rows + 1)]
    x_edges = [round(min(1.0, column * plan.core[1] / plan.output_shape[2]) * width) for column in range(columns + 1)]
    if known:
        for row, column in (at for at in plan.grid if at not in known):
            box = (x_edges[column], y_edges[row], x_edges[column + 1], y_edges[row + 1])
            draw.rectangle(box, fill=(90, 100, 120, 170))
    if max(rows, columns) <= 100:
        for y in y_edges:
            draw.line((0, y, width, y), fill=(40, 50, 70, 90))
        for x in x_edges:
            draw.line((x, 0, x, height), fill=(40, 50, 70, 90))
    for row, column in failed:
        # A tile of a million is smaller than a pixel, and still to be seen.
        right, bottom = max(x_edges[column + 1], x_edges[column] + 3), max(y_edges[row + 1], y_edges[row] + 3)
        draw.rectangle(
            (x_edges[column], y_edges[row], right, bottom), fill=(215, 48, 31, 200), outline=(127, 0, 0, 255)
        )
    return canvas


def measure_throughput(records: list[dict[str, Any]]) -> Throughput | None:
    """Of tiles by the time of their end; None where too few have one."""
    ended = sorted((float(r["at"]), int(r["pixels"])) for r in records if r.get("at") and r.get("state") == "done")
    if len(ended) < 3:
        return None
    times = np.array([at for at, _ in ended])
    steps = np.diff(times)
    usual = max(GAP_S, 20 * statistics.median(steps.tolist()))
    long = steps > usual
    active = np.concatenate([[0.0], np.cumsum(np.where(long, 0, steps))])
    if active[-1] <= 0:
        return None
    bins = int(min(BINS, max(4, len(ended) // 4)))
    pixels, _ = np.histogram(active, bins, (0, active[-1]), weights=[pixels for _, pixels in ended])
    return Throughput(
        seconds=float(active[-1]),
        mpx_per_s=(pixels / (active[-1] / bins) / 1e6).tolist(),
        breaks=active[1:][long].tolist(),
    )


def _curve(throughput: Throughput | None) -> dict[str, Any] | None:
    """Points of the curve in a drawing of 720 x 160."""
    if throughput is None:
        return None
    top = max(throughput.mpx_per_s) * 1.1 or 1.0
    width = 720 / len(throughput.mpx_per_s)
    points: list[str] = []
    for index, rate in enumerate(throughput.mpx_per_s):
        y = 160 - 160 * rate / top
        points += [f"{index * width:.1f},{y:.1f}", f"{(index + 1) * width:.1f},{y:.1f}"]
    return {
        "points": " ".join(points),
        "top": top,
        "breaks": [f"{720 * at / throughput.seconds:.1f}" for at in throughput.breaks],
        "seconds": throughput.seconds,
    }
