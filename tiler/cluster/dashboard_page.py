"""The page /tilemap: the map over a grey picture, what it counts, throughput, workers and failures; by Bokeh."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# Bokeh's models take and have more than their types tell.

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from html import escape
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from bokeh.events import DocumentReady
from bokeh.layouts import column, row
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    Div,
    FixedTicker,
    HoverTool,
    Range1d,
    Select,
)
from bokeh.plotting import figure

from ..base.text import format_bytes, format_seconds
from .tile_map import DONE, FAILED, KEPT, RUNNING, STATES, WAITING, TileMap, group_failures, shrink_map

SIDE = 400
"""Blocks of the map along its longer side, at most: a screen shows no more."""
FRAME = 640
"""Of the map's longer side, in pixels of the screen."""
FRAME_LEAST = 20
"""Of its shorter side: a raster narrower than 1 : 32 is shown wider than it is."""
MARK = 8
"""Of a failed tile, at least: smaller ones are marked."""
GRID_TILES = 64
"""Along the longer side, at most, where lines are drawn between tiles."""
UPDATE_MS = 1000
LOST_MS = 4000
"""Without an update for so long, a page says that it knows no more."""
SIDE_WIDTH = 500
COLOURS = {
    WAITING: ("#b8bec8", 0.45),
    RUNNING: ("#2f7de1", 0.80),
    DONE: ("#2ca25f", 0.45),
    FAILED: ("#d7301f", 0.95),
    KEPT: ("#7b5ea7", 0.40),
}
"""Of each state: colour, and how much of the picture beneath it hides."""
TEXTS = {
    WAITING: "waiting",
    RUNNING: "running",
    DONE: "done",
    FAILED: "failed",
    KEPT: "done by an earlier call",
}
SHOWN_REASONS, SHOWN_WORKERS = 100, 100
SHOWN_TILES = 50
"""Of one reason."""
LOST = "<b>connection lost</b>: the scheduler has ended or does not answer; this is the last that it told"
TOOLTIP = """<div class="tile" style="max-width:340px;overflow-wrap:anywhere;font-size:12px">
<b>row $y{custom}, column $x{custom}</b>
<div>@state{custom}@seconds{custom}@worker{custom}</div><div style="color:#b3261e">@failure{custom}</div></div>"""

Image = npt.NDArray[np.uint32]


def _rgba(colour: str, alpha: float) -> int:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return round(255 * alpha) << 24 | blue << 16 | green << 8 | red


_PALETTE = np.array([_rgba(*COLOURS[state]) for state in range(len(STATES))], np.uint32)


def paint_states(states: npt.NDArray[np.uint8]) -> Image:
    """States as RGBA pixels."""
    return _PALETTE[states]


def paint_sketch(sketch: npt.NDArray[np.float32]) -> Image:
    """The grey picture as RGBA pixels, its 2nd to 98th percentile from black to white; what is unknown is clear."""
    known = np.isfinite(sketch)
    if not known.any():
        return np.zeros(sketch.shape, np.uint32)
    low, high = np.percentile(sketch[known], (2, 98))
    with np.errstate(invalid="ignore"):
        level = np.clip((sketch - low) / max(float(high - low), 1e-6) * 215 + 30, 0, 255)
    grey = np.where(known, level, 0).astype(np.uint32)
    return np.where(known, np.uint32(255) << 24 | grey << 16 | grey << 8 | grey, 0).astype(np.uint32)


class TileMaps(Protocol):
    """What a page shows: the maps that a scheduler keeps."""

    maps: dict[str, TileMap]
    pages: set[Callable[[], Awaitable[None]]]

    def describe_workers(self, tiles: TileMap | None) -> list[dict[str, Any]]: ...


class _Page:
    """One visitor's page."""

    def __init__(self, plugin: TileMaps) -> None:
        self._plugin = plugin
        self._shown: tuple[str, int] = ("", -1)
        self._known: list[str] = []
        self._failed_of: tuple[str, int] = ("", -1)
        self._sped: tuple[str, int] | None = None
        self.sketch = ColumnDataSource({"image": [], "dw": [], "dh": []})
        self.tiles = ColumnDataSource(
            {name: [] for name in ("image", "seconds", "worker", "state", "failure", "dw", "dh")}
        )
        self.failed = ColumnDataSource({name: [] for name in ("x", "y", "w", "h", "size")})
        self.speed = ColumnDataSource({"t": [], "mpx": []})
        self.workers = Div(text="", width=SIDE_WIDTH)
        self.failures = Div(text="", width=SIDE_WIDTH)
        self.select = Select(title="Run", options=[], width=420)
        self.select.on_change("value", lambda _attr, _old, _new: self.update())
        self.head = Div(text="", styles={"font-size": "14px"})
        self.legend = Div(text="", sizing_mode="stretch_width")
        self.lost = Div(text=LOST, visible=False, styles={"color": "#b3261e", "font-size": "14px"})
        self.beat = Div(text="", visible=False)
        self.watch = CustomJS(args={"lost": self.lost, "after": LOST_MS}, code=_WATCH_BEAT)
        self.beat.js_on_change("text", self.watch)
        self.plot = self._make_plot()
        self.root = self._lay_out()

    def _make_plot(self) -> Any:
        plot = figure(
            name="tilemap",
            x_range=Range1d(start=0, end=1),
            y_range=Range1d(start=1, end=0),
            tools="pan,wheel_zoom,box_zoom,reset",
            active_scroll="wheel_zoom",
            x_axis_label="pixels",
            y_axis_label="pixels",
            x_axis_location="above",
            background_fill_color="#eceff3",
            output_backend="canvas",
            width_policy="min",
            height_policy="min",
            frame_width=FRAME,
            frame_height=FRAME,
        )
        plot.grid.level = "overlay"
        plot.grid.grid_line_color = "#2a3344"
        plot.grid.grid_line_alpha = 0.4
        plot.toolbar.logo = None
        plot.xaxis.formatter.use_scientific = False
        plot.yaxis.formatter.use_scientific = False
        plot.image_rgba("image", x=0, y=0, dw="dw", dh="dh", source=self.sketch)
        tiles = plot.image_rgba("image", x=0, y=0, dw="dw", dh="dh", source=self.tiles)
        plot.rect(
            x="x", y="y", width="w", height="h", source=self.failed, fill_alpha=0, line_color="#7f0000", line_width=1
        )
        plot.scatter(
            x="x",
            y="y",
            size="size",
            marker="square",
            source=self.failed,
            color=COLOURS[FAILED][0],
            line_color="#7f0000",
        )
        self._names = CustomJSHover(args={"names": []}, code="return names[value] ? ' on ' + names[value] : '';")
        self._errors = CustomJSHover(args={"errors": []}, code="return errors[value] ?? '';")
        self._places = [CustomJSHover(args={"core": 1, "factor": 1}, code=_NAME_PLACE) for _ in range(2)]
        self._took = CustomJSHover(
            args={"factor": 1},
            code="return value >= 0 ? ', ' + value.toFixed(2) + (factor > 1 ? ' s a tile' : ' s') : '';",
        )
        texts = CustomJSHover(args={"names": [TEXTS[i] for i in range(len(STATES))]}, code="return names[value];")
        formatters = {"@state": texts, "@seconds": self._took, "@worker": self._names, "@failure": self._errors}
        formatters |= {"$y": self._places[0], "$x": self._places[1]}
        # One tool: two would cover each other.
        plot.add_tools(HoverTool(renderers=[tiles], tooltips=TOOLTIP, formatters=formatters))
        return plot

    def _lay_out(self) -> Any:
        speed = figure(
            name="throughput",
            title="Throughput",
            height=210,
            width=SIDE_WIDTH,
            x_axis_label="seconds since the run began",
            y_axis_label="Mpx/s",
            tools="",
            x_range=Range1d(start=0, end=1),
            y_range=Range1d(start=0, end=1),
        )
        speed.toolbar_location = None
        speed.step(x="t", y="mpx", source=self.speed, mode="before", line_width=2)
        self._speed_ranges = speed.x_range, speed.y_range
        wrap = {"flex-wrap": "wrap"}
        return column(
            row(self.select, self.head, sizing_mode="stretch_width", styles=wrap),
            self.lost,
            self.legend,
            row(self.plot, column(speed, self.workers, self.failures), sizing_mode="stretch_width", styles=wrap),
            self.beat,
            sizing_mode="stretch_width",
            name="tilemap_page",
        )

    def update(self) -> None:
        """Show what is known now; what has not changed is not sent again."""
        self.beat.text = str(time.monotonic())
        maps = self._plugin.maps
        self._offer(list(maps.values()))
        tiles = maps.get(self.select.value)
        if tiles is None:
            self.head.text = "No run of outsize has been here yet."
            return
        self._describe(tiles)
        self._show_workers(tiles)
        self._show_speed(tiles)
        if (tiles.run, tiles.version) == self._shown:
            return
        if self._shown[0] != tiles.run:
            self._frame(tiles)
        self._shown = tiles.run, tiles.version
        self._show_map(tiles)

    def _offer(self, maps: list[TileMap]) -> None:
        """The runs to choose from; a new one is shown to those who watched the last."""
        names = [tiles.run for tiles in maps]
        if names == self._known:
            return
        followed = not self._known or self.select.value == self._known[-1]
        self._known = names
        self.select.options = [
            (tiles.run, f"{tiles.title} ({time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(tiles.began))})")
            for tiles in reversed(maps)
        ]
        if followed or self.select.value not in names:
            self.select.value = names[-1]

    def _frame(self, tiles: TileMap) -> None:
        """The raster's true aspect."""
        height, width = tiles.shape
        self.plot.frame_width, self.plot.frame_height = frame_size(tiles.shape)
        # Where there is room for it.
        self.plot.toolbar_location = "right" if height > width else "below"
        for axis, side in ((self.plot.xaxis, self.plot.frame_width), (self.plot.yaxis, self.plot.frame_height)):
            axis.ticker.desired_num_ticks = max(1, side // 90)
        # Old bounds would clamp the new ranges.
        for shown in (self.plot.x_range, self.plot.y_range):
            shown.bounds = None
        self.plot.x_range.update(start=0, end=width, bounds=(0, width), reset_start=0, reset_end=width)
        self.plot.y_range.update(start=height, end=0, bounds=(0, height), reset_start=height, reset_end=0)
        has_lines = max(tiles.counts) <= GRID_TILES
        self.plot.grid.visible = has_lines
        if has_lines:
            for grid, extent, side in zip((self.plot.ygrid, self.plot.xgrid), tiles.shape, tiles.core, strict=True):
                grid.ticker = FixedTicker(ticks=list(range(side, extent, side)))

    def _show_map(self, tiles: TileMap) -> None:
        blocks = shrink_map(tiles, SIDE)
        down, across = blocks.states.shape
        factor = blocks.factor
        shown = sorted(tiles.failures.items())
        scale = min(side / extent for side, extent in zip(frame_size(tiles.shape), tiles.shape, strict=True))
        # As far around as its mark hides.
        reach = round(MARK / 2 / max(1e-9, scale * min(tiles.core) * factor))
        self.tiles.data = {
            "image": [paint_states(blocks.states)],
            # Bokeh writes "NaN" for nan, whatever the formatter.
            "seconds": [np.nan_to_num(blocks.seconds, nan=-1)],
            "worker": [blocks.worker if factor == 1 else np.full_like(blocks.worker, -1)],
            "state": [blocks.states],
            "failure": [_near_failures([cell for cell, _ in shown], blocks.states.shape, factor, reach)],
            # The last row and column of tiles may be narrower than the others: the image is drawn over whole ones.
            "dw": [across * factor * tiles.core[1]],
            "dh": [down * factor * tiles.core[0]],
        }
        height, width = tiles.sketch.shape
        self.sketch.data = {
            "image": [paint_sketch(tiles.sketch)],
            "dw": [width * tiles.cell[1]],
            "dh": [height * tiles.cell[0]],
        }
        self._names.args = {"names": [self._name_of(address) for address in tiles.workers]}
        self._took.args = {"factor": factor}
        for place, core in zip(self._places, tiles.core, strict=True):
            place.args = {"core": core, "factor": factor}
        if self._failed_of != (tiles.run, len(tiles.failures)):
            self._failed_of = tiles.run, len(tiles.failures)
            named = factor > 1 or reach > 0
            self._errors.args = {
                "errors": [f"failed at {y}, {x}: {error}" if named else error for (y, x), error in shown]
            }
            high, wide = tiles.core
            mark = MARK if scale * min(tiles.core) < MARK else 0
            self.failed.data = {
                "x": [(x + 0.5) * wide for (_, x), _ in shown],
                "y": [(y + 0.5) * high for (y, _), _ in shown],
                "w": [wide] * len(shown),
                "h": [high] * len(shown),
                "size": [mark] * len(shown),
            }
            self.failures.text = _table(
                f"Failed tiles ({tiles.count()['failed']:,})",
                ("why", "tiles (row, column)"),
                [(reason, _list_cells(cells)) for reason, cells in group_failures(shown)[:SHOWN_REASONS]],
            )

    def _name_of(self, address: str) -> str:
        return address.removeprefix("tcp://").removeprefix("tls://")

    def _describe(self, tiles: TileMap) -> None:
        counts, now = tiles.count(), time.time()
        eta = tiles.eta_s(now)
        elapsed = (tiles.ended or now) - tiles.began
        finished = counts["done"] + counts["kept"] + counts["failed"]
        total = tiles.counts[0] * tiles.counts[1]
        parts = [f"{tiles.rate(now) / 1e6:.2f} Mpx/s {'in all' if tiles.ended else 'now'}"]
        if tiles.how:
            verb = "finished" if tiles.how == "finished" else f"stopped: {escape(tiles.how)}"
            parts.append(f"{verb} after {format_seconds(elapsed)}")
        else:
            parts.append(f"{format_seconds(elapsed)} so far")
            if eta is not None:
                parts.append(f"about {format_seconds(eta)} to go")
            elif finished < total:
                parts.append("time to go unknown yet")
        self.head.text = (
            f"<b>{100 * finished / total:.1f} %</b> of {total:,} tiles ({_rows_columns(tiles.counts)}), "
            f"pixels: {_rows_columns(tiles.shape)}<br>{', '.join(parts)}"
        )
        chips = [
            f'<span style="white-space:nowrap;margin-right:18px"><span style="display:inline-block;width:12px;'
            f"height:12px;border:1px solid #667;background:{COLOURS[state][0]};margin-right:5px;vertical-align:-1px"
            f'"></span>{TEXTS[state]} <b>{counts[STATES[state]]:,}</b></span>'
            for state in (WAITING, RUNNING, DONE, KEPT, FAILED)
        ]
        self.legend.text = "".join(chips)

    def _show_workers(self, tiles: TileMap) -> None:
        workers = self._plugin.describe_workers(tiles)
        self.workers.text = _table(
            f"Workers ({len(workers)})",
            ("address", "state", "tiles", "memory"),
            [
                (
                    self._name_of(worker["worker"]),
                    f"{worker['running']} running" if worker["running"] else "idle",
                    f"{worker['done']:,}",
                    format_bytes(worker["memory_bytes"]),
                )
                for worker in workers[:SHOWN_WORKERS]
            ],
        )

    def _show_speed(self, tiles: TileMap) -> None:
        state = (tiles.run, tiles.version)
        if tiles.ended is not None and self._sped == state:
            return
        self._sped = state
        times, rates = tiles.history.rates(tiles.ended or time.time())
        self.speed.data = {"t": [0.0, *times], "mpx": [rates[0] if rates else 0.0, *rates]}
        self._speed_ranges[0].end = max(10.0, *times) if times else 10.0
        self._speed_ranges[1].end = 1.15 * max(rates, default=1.0) or 1.0


_WATCH_BEAT = """
lost.setv({visible: false}, {sync: false});
clearTimeout(window.outsize_beat);
window.outsize_beat = setTimeout(() => lost.setv({visible: true}, {sync: false}), after);
"""
_NAME_PLACE = """
const first = Math.floor(value / core / factor) * factor;
return factor > 1 ? first + ' to ' + (first + factor - 1) : String(first);
"""


def frame_size(shape: tuple[int, int]) -> tuple[int, int]:
    """(width, height) on the screen of a raster of (height, width): square pixels, as far as it is not too narrow."""
    height, width = shape
    scale = FRAME / max(shape)
    return max(FRAME_LEAST, round(width * scale)), max(FRAME_LEAST, round(height * scale))


def _near_failures(
    cells: list[tuple[int, int]], shape: tuple[int, int], factor: int, reach: int
) -> npt.NDArray[np.int16]:
    """For each block the number of a failed tile in it, else of one within `reach` blocks; -1 where there is none."""
    near = np.full(shape, -1, np.int16)
    for blocks in (reach, 0):
        for number, (y, x) in enumerate(cells):
            row, column = y // factor, x // factor
            near[max(0, row - blocks) : row + blocks + 1, max(0, column - blocks) : column + blocks + 1] = number
    return near


def _list_cells(cells: list[tuple[int, int]]) -> str:
    more = f"; and {len(cells) - SHOWN_TILES:,} more" if len(cells) > SHOWN_TILES else ""
    return "; ".join(f"{y},{x}" for y, x in cells[:SHOWN_TILES]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _rows_columns(counts: tuple[int, int]) -> str:
    return f"{_count(counts[0], 'row')} x {_count(counts[1], 'column')}"


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """HTML; Bokeh's own tables do not show data that is replaced."""
    if not rows:
        return f"<b>{title}</b>"
    style = "text-align:left;padding:2px 14px 2px 0;vertical-align:top;font-variant-numeric:tabular-nums"
    short, long = "white-space:nowrap", "overflow-wrap:anywhere;min-width:170px"
    head = "".join(f'<th style="{style};{short};font-weight:normal;color:#667">{escape(name)}</th>' for name in header)
    lines = [
        "".join(f'<td style="{style};{short if len(cell) < 30 else long}">{escape(cell)}</td>' for cell in cells)
        for cells in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<b>{title}</b><div style="max-height:230px;overflow:auto"><table style="border-collapse:collapse">'
        f"<tr>{head}</tr>{body}</table></div>"
    )


def open_page(plugin: TileMaps, extra: dict[str, Any], document: Any) -> None:
    """Fill a new visitor's document."""
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    page = _Page(plugin)
    page.update()

    async def refresh() -> None:
        shown = asyncio.get_running_loop().create_future()

        def show() -> None:
            page.update()
            shown.set_result(None)

        document.add_next_tick_callback(show)
        await shown

    plugin.pages.add(refresh)
    document.on_session_destroyed(lambda _: plugin.pages.discard(refresh))
    document.title = "Dask: Tile map"
    document.add_root(page.root)
    # From the first moment: the scheduler may be gone before it has sent a beat.
    document.js_on_event(DocumentReady, page.watch)
    document.add_periodic_callback(page.update, UPDATE_MS)
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)
    document.theme = BOKEH_THEME
