"""A quicklook: input and result side by side, with a legend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, log1p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ...models.segmentation.networks.palette import default_colour
from ...tiler.base.dtypes import output_nodata
from ...tiler.base.errors import RasterError
from ...tiler.base.geometry import Grid, Window, halve
from ...tiler.output.store import LEVELS
from ...tiler.rasters.opening import open_raster
from ...tiler.rasters.parts import open_reference
from ...tiler.rasters.raster import Raster
from ..base.console import Console, Step
from .writers import Export

SIDE = 900
"""Longest side of each picture, in pixels."""
PATIENCE = 64
"""Windows that cannot be read and are tried by halves: a source that is gone altogether must not take hours."""
_ROWS, _COLUMNS = 512, 2048
_NO_CLASS = -1
_MOST_NAMED = 255
"""Classes in the legend."""
_INK, _PAPER, _GREY = (30, 32, 36), (255, 255, 255), (225, 227, 230)

Rgb = npt.NDArray[np.uint8]


def _shrink_factor(shape_yx: tuple[int, int]) -> int:
    return max(1, -(-max(shape_yx) // SIDE))


def _read_small(
    raster: Raster, bands: list[int], factor: int, region: Window, *, average: bool, step: Step
) -> npt.NDArray[Any]:
    """(bands, h, w) of a region shrunk by a whole factor, strip by strip: block means, or each block's first pixel."""
    # A side shorter than the factor is shrunk to one pixel.
    fy, fx = (min(factor, extent) for extent in region.shape)
    height, width = region.height // fy, region.width // fx
    small = np.empty((len(bands), height, width), np.float32 if average else raster.dtype)
    reader = raster.open_reader()
    try:
        cell = (max(fy, _ROWS // fy * fy), max(fx, _COLUMNS // fx * fx))
        grid = Grid(shape=(height * fy, width * fx), cell=cell)
        patience, is_empty = PATIENCE, True
        windows = [grid.window(*at).clamp(region.shape) for at in reversed(list(grid))]
        while windows:
            inside = windows.pop()
            window = replace(inside, y=inside.y + region.y, x=inside.x + region.x)
            y, x = inside.y // fy, inside.x // fx
            part = small[:, y : y + max(1, inside.height // fy), x : x + max(1, inside.width // fx)]
            try:
                image = reader.read(window)
                missing = reader.read_missing(window, image)
            except RasterError:
                if not average:
                    raise
                # A damaged block leaves a hole in the picture, no larger than need be.
                reader.close()
                reader, part[:] = raster.open_reader(), np.nan
                if patience > 0 and (halves := halve(inside, raster.block, (fy, fx))):
                    patience -= 1
                    windows.extend(halves)
                    continue
            else:
                is_empty = False
                part[:] = _shrink(image[bands], missing, (fy, fx)) if average else image[bands][:, ::fy, ::fx]
            step.advance(window.pixels)
    finally:
        reader.close()
    if is_empty:
        raise RasterError(f"{raster.path}: no part of it can be read")
    return small


def _shrink(
    block: npt.NDArray[Any], missing: npt.NDArray[np.bool_] | None, factor_yx: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Means of parts; one with any nodata pixel counts as nodata: no dark rims."""
    fy, fx = factor_yx
    values = block.astype(np.float32)
    if missing is not None:
        values[:, missing] = np.nan
    h, w = values.shape[1] // fy, values.shape[2] // fx
    with np.errstate(invalid="ignore"):
        return values[:, : h * fy, : w * fx].reshape(len(block), h, fy, w, fx).mean((2, 4))


def _display_bands(raster: Raster) -> list[int]:
    """Red, green, blue by name; else the first three; else the first."""
    names = [name.lower() for name in raster.band_names]
    if all(colour in names for colour in ("red", "green", "blue")):
        return [names.index(colour) for colour in ("red", "green", "blue")]
    return [0, 1, 2] if raster.bands >= 3 else [0]


def _stretch(values: npt.NDArray[Any]) -> Rgb:
    """Brightness between the 1st and 99th percentile of all shown bands together, so that colours stay."""
    valid = values[np.isfinite(values)]
    low, high = np.percentile(valid, (1, 99)) if valid.size else (0, 1)
    scaled = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    grey = np.nan_to_num(scaled * 255, nan=_GREY[0]).astype(np.uint8)
    return np.moveaxis(grey if grey.shape[0] == 3 else np.repeat(grey[:1], 3, axis=0), 0, -1)


def _colour_classes(classes: npt.NDArray[np.int64], header: dict[str, Any]) -> Rgb:
    """Of class numbers, _NO_CLASS where there is none."""
    count = max(len(header["classes"]), int(classes.max(initial=0)) + 1)
    palette = np.array([*(default_colour(value) for value in range(count)), _GREY], np.uint8)
    for entry in header["classes"]:
        palette[entry["value"]] = entry["colour"]
    return palette[classes]


def find_classes(values: npt.NDArray[Any], kind: str, header: dict[str, Any]) -> npt.NDArray[np.int64] | None:
    """Class numbers of the small result, _NO_CLASS where there is none; None: its values are no classes.

    Args:
        values: (channels, h, w); of floats means, else stored values.
    """
    missing = ~np.isfinite(values).all(0) if values.dtype.kind == "f" else values[0] == output_nodata(values.dtype)
    if kind == "class":
        found = values[0].astype(np.int64)
    elif kind == "values" or header.get("task") == "multilabel":
        return None
    elif header.get("task") == "binary" and len(values) == 1:
        share = header.get("threshold") or 0.5
        found = (values[0] > (LEVELS * share if kind == "probability" else log(share) - log1p(-share))).astype(np.int64)
    elif len(values) == 1:
        return None
    else:
        found = np.argmax(np.where(missing, 0, values), 0)
    return np.where(missing, _NO_CLASS, found)


def _paint_values(values: npt.NDArray[Any]) -> Rgb:
    """The first three channels as red, green and blue, or the only one in grey."""
    nodata = output_nodata(values.dtype)
    shown = values[:3] if len(values) >= 3 else values[:1]
    return _stretch(np.where(shown == nodata, np.nan, shown) if values.dtype.kind != "f" else shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quicklook:
    """Small pictures of input and result, and what their colours mean."""

    source: Image.Image | None
    """None where the input is not at its place any more."""
    source_name: str
    result: Image.Image
    result_name: str
    legend: list[tuple[str, tuple[int, int, int], float]]
    """Name, colour and share of each class; shares of what the small picture shows."""


def make_quicklook(console: Console, out: Path, header: dict[str, Any], *, trust: bool = False) -> Quicklook:
    """Shrink the input (where it is still at its place) and the result.

    Args:
        trust: of the input, as in `open_raster`.
    """
    kind = header["kind"]
    result = open_raster(out / kind)
    factor = _shrink_factor(result.shape_yx)
    source: Raster | None = None
    try:
        source = open_reference(header["source"], trust=trust)
    except RasterError as error:
        console.remark(f"quicklook without the input: {error}")
    picture = None
    whole = Window.whole(result.shape_yx)
    y, x, height, width = header["plan"]["region"]
    seen = Window(y=y, x=x, height=height, width=width)
    with console.step("quicklook", whole.pixels + (seen.pixels if source else 0)) as step:
        if source is not None:
            own = _shrink_factor(seen.shape)
            try:
                small = _read_small(source, _display_bands(source), own, seen, average=True, step=step)
                picture = _enlarge(Image.fromarray(_stretch(small)))
            except RasterError as error:
                console.remark(f"quicklook without the input: {error}")
        bands = list(range(result.bands))
        values = _read_small(result, bands, factor, whole, average=result.dtype.kind == "f", step=step)
    classes = find_classes(values, kind, header)
    painted = _paint_values(values) if classes is None else _colour_classes(classes, header)
    return Quicklook(
        source=picture,
        source_name=Path(source.path).name if source else "",
        result=_enlarge(Image.fromarray(painted)),
        result_name=header["model"] or kind,
        legend=[] if classes is None else _make_legend(classes, header),
    )


def _make_legend(
    classes: npt.NDArray[np.int64], header: dict[str, Any]
) -> list[tuple[str, tuple[int, int, int], float]]:
    """Name, colour and share of each class; of very many those that cover most."""
    shares = np.bincount(classes[classes != _NO_CLASS], minlength=len(header["classes"]))
    valid = max(1, int(shares.sum()))
    known = header["classes"] or [
        {"value": int(value), "name": f"class {value}", "colour": default_colour(int(value))}
        for value in np.flatnonzero(shares)
    ]
    if len(known) > _MOST_NAMED:
        largest = set(np.argsort(-shares, kind="stable")[:_MOST_NAMED].tolist())
        known = [entry for entry in known if entry["value"] in largest and shares[entry["value"]]]
    return [(e["name"], tuple(e["colour"]), float(shares[e["value"]] / valid)) for e in known]


def write_quicklook(export: Export, target: Path) -> None:
    """Draw input and result side by side, with captions and the classes' shares."""
    found = make_quicklook(export.console, export.out, export.header, trust=export.trust)
    _compose(found).save(target, optimize=True)


def _enlarge(picture: Image.Image) -> Image.Image:
    """A small picture by a whole factor, so that its pixels stay pixels."""
    factor = max(1, SIDE // 2 // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _compose(found: Quicklook) -> Image.Image:
    margin, caption = 16, 30
    font = ImageFont.load_default(size=16)
    panels = [(f"input: {found.source_name}", found.source)] if found.source else []
    panels.append((f"result: {found.result_name}", found.result))
    tallest = max(picture.height for _, picture in panels)
    width = max(sum(picture.width for _, picture in panels) + margin * (len(panels) + 1), 420)
    entries: list[tuple[Any, str]] = [(colour, f"{name} {100 * share:.1f} %") for name, colour, share in found.legend]
    entries.append((_GREY, "nodata"))
    rows = _legend_rows(entries, font, width - 2 * margin)
    canvas = Image.new("RGB", (width, margin + caption + tallest + margin + 28 * len(rows) + margin), _PAPER)
    draw = ImageDraw.Draw(canvas)
    x = margin
    for text, picture in panels:
        draw.text((x, margin), text, fill=_INK, font=font)
        canvas.paste(picture, (x, margin + caption))
        x += picture.width + margin
    y = margin + caption + tallest + margin
    for row in rows:
        x = margin
        for colour, text, advance in row:
            draw.rectangle((x, y + 2, x + 16, y + 18), fill=colour, outline=_INK)
            draw.text((x + 24, y), text, fill=_INK, font=font)
            x += advance
        y += 28
    return canvas


def _legend_rows(entries: list[tuple[Any, str]], font: Any, width: int) -> list[list[tuple[Any, str, int]]]:
    rows: list[list[tuple[Any, str, int]]] = [[]]
    used = 0
    for colour, text in entries:
        advance = int(font.getlength(text)) + 48
        if rows[-1] and used + advance > width:
            rows.append([])
            used = 0
        rows[-1].append((colour, text, advance))
        used += advance
    return rows
