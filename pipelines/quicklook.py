"""A quicklook: input and result side by side, with a legend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..models.segmentation.palette import default_colour
from ..tiler.errors import RasterError
from ..tiler.geometry import Grid, Window, halve
from ..tiler.raster import Raster, open_raster
from ..tiler.raster_parts import open_reference
from ..tiler.store import NODATA
from .console import Console, Step

SIDE = 900
"""Longest side of each picture, in pixels."""
PATIENCE = 64
"""Windows that cannot be read and are tried by halves: a source that is gone altogether must not take hours."""
_ROWS, _COLUMNS = 512, 2048
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


def _colour_classes(classes: npt.NDArray[Any], header: dict[str, Any]) -> Rgb:
    palette = np.array([default_colour(value) for value in range(256)], np.uint8)
    for entry in header["classes"]:
        palette[entry["value"]] = entry["colour"]
    palette[NODATA] = _GREY
    return palette[classes]


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


def make_quicklook(console: Console, out: Path, header: dict[str, Any]) -> Quicklook:
    """Shrink the input (where it is still at its place) and the result."""
    kind = header["kind"]
    result = open_raster(out / kind)
    factor = _shrink_factor(result.shape_yx)
    source: Raster | None = None
    try:
        source = open_reference(header["source"])
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
        if kind == "logits":
            values = _read_small(result, list(range(result.bands)), factor, whole, average=True, step=step)
            classes = np.where(np.isfinite(values).all(0), np.argmax(values, 0), NODATA)
        else:
            values = _read_small(result, list(range(result.bands)), factor, whole, average=False, step=step)
            classes = values[0] if kind == "class" else np.where(values[0] == NODATA, NODATA, np.argmax(values, 0))
    shares = np.bincount(classes.astype(np.uint8).ravel(), minlength=256)
    valid = max(1, int(shares[:NODATA].sum()))
    known = header["classes"] or [
        {"value": int(value), "name": f"class {value}", "colour": default_colour(int(value))}
        for value in np.flatnonzero(shares[:NODATA])
    ]
    return Quicklook(
        source=picture,
        source_name=Path(source.path).name if source else "",
        result=_enlarge(Image.fromarray(_colour_classes(classes.astype(np.uint8), header))),
        result_name=header["model"] or kind,
        legend=[(e["name"], tuple(e["colour"]), float(shares[e["value"]] / valid)) for e in known],
    )


def save_quicklook(console: Console, out: Path, header: dict[str, Any], target: Path) -> None:
    """Draw input and result side by side, with captions and the classes' shares."""
    _compose(make_quicklook(console, out, header)).save(target, optimize=True)


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
