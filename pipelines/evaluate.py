"""`outsize evaluate`: a class map against labels on the same grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..models.segmentation.metrics import Confusion
from ..tiler.errors import UsageError
from ..tiler.geometry import Grid
from ..tiler.georeference import Georeference
from ..tiler.memory import format_bytes
from ..tiler.meter import MemoryMeter
from ..tiler.plan import TilePlan
from ..tiler.raster import Raster, open_raster
from ..tiler.store import NODATA, open_array, read_header
from .console import Console, count_of, describe_memory, format_table

_BLOCK = 2048


def run_evaluate(console: Console, out: Path, labels: str) -> None:
    """Count every pixel where both the map and the labels hold a class, block by block."""
    header = read_header(out)
    if header["kind"] != "class":
        raise UsageError(f"evaluate needs a class map, {out} holds {header['kind']}; segment with --output class")
    truth = open_raster(labels)
    predicted = open_array(out, "class")
    plan = TilePlan.from_json(header["plan"])
    height, width = predicted.shape
    # Labels of the whole raster serve a map of a part of it too.
    whole = truth.shape_yx == plan.raster_shape[1:] and plan.scale == ("1", "1")
    if truth.bands != 1 or not (whole or truth.shape_yx == (height, width)):
        raise UsageError(
            f"labels must be one band on the output's grid of {height} x {width}, got {count_of(truth.bands, 'band')} "
            f"of {truth.shape_yx[0]} x {truth.shape_yx[1]}"
        )
    if truth.dtype.kind not in "ui":
        raise UsageError(f"labels must be whole numbers, {labels} has {truth.dtype}; convert them first")
    top, left = plan.output_origin if whole else (0, 0)
    _require_same_place(out, truth, labels, top, left)
    names = [entry["name"] for entry in header["classes"]]
    count = len(names) or 255
    total = Confusion(counts=np.zeros((count, count), np.int64))
    grid = Grid(shape=(height, width), cell=(_BLOCK, _BLOCK))
    reader = truth.open_reader()
    with MemoryMeter() as meter, console.step("evaluate", height * width) as step:
        for at in grid:
            window = grid.window(*at)
            place = replace(window, y=window.y + top, x=window.x + left)
            image = reader.read(place)
            missing, wanted = reader.read_missing(place, image), image[0]
            found = np.asarray(predicted[window.slices()])
            known = found != NODATA
            if missing is not None:
                known &= ~missing
            if truth.nodata is None:
                known &= wanted != NODATA
            outside = known & ((wanted < 0) | (wanted >= count))
            if outside.any():
                raise UsageError(f"{labels}: labels must be 0..{count - 1}, got {wanted[outside].max()} in {place}")
            wanted = np.where(known, wanted, NODATA).astype(np.uint8)
            total += Confusion.count(wanted, found, count)
            step.advance(window.pixels, describe_memory(meter.current_bytes))
    reader.close()
    if not total.pixels:
        raise UsageError(f"{out} and {labels} have no pixel in common that both know; are they of one scene?")
    present = np.flatnonzero(total.counts.sum(0) + total.counts.sum(1))
    rows = [
        [
            names[value] if names else str(value),
            f"{total.iou[value]:.4f}",
            f"{total.counts[value].sum() / total.pixels:.2%}",
            f"{total.counts[:, value].sum() / total.pixels:.2%}",
        ]
        for value in present
    ]
    console.result(
        f"accuracy {total.accuracy:.4f}, mean IoU {total.mean_iou:.4f}, {total.pixels / 1e6:.1f} Mpx compared, peak "
        f"memory {format_bytes(meter.peak_bytes)}\n" + format_table(("class", "IoU", "labelled", "mapped"), rows),
        {
            "pixels": total.pixels,
            "accuracy": total.accuracy,
            "mean_iou": total.mean_iou,
            "peak_bytes": meter.peak_bytes,
            "iou": {(names[v] if names else str(v)): total.iou[v] for v in present},
        },
    )


def _require_same_place(out: Path, truth: Raster, labels: str, top: int, left: int) -> None:
    """Both must lie on one grid, where both say where they lie."""
    ours, theirs = open_raster(out / "class").place, truth.place.moved(top, left)
    if ours.transform is None or theirs.transform is None:
        return
    step = max(abs(ours.affine.a), abs(ours.affine.b), abs(ours.affine.e))
    if ours.crs != theirs.crs or not np.allclose(ours.transform, theirs.transform, rtol=1e-9, atol=1e-3 * step):
        raise UsageError(
            f"labels must lie on the output's grid: {out} is at {_place(ours)}, {labels} at {_place(theirs)}"
        )


def _place(place: Georeference) -> str:
    crs = place.crs
    return f"{place.affine.c:.10g},{place.affine.f:.10g} in {crs.to_string()[:40] if crs else 'no CRS'}"
