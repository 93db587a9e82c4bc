"""The page /tilemap: the map over a grey picture, what it counts, throughput, workers and failures; by Bokeh."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# Bokeh's models take and have more than their types tell.

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from bokeh.layouts import column, row
from bokeh.models import (
    ColumnDataSource,
    CustomJSHover,
    Div,
    HoverTool,
    Range1d,
    Select,
)
from bokeh.plotting import figure

from .memory import format_bytes
from .plan import format_seconds
from .tile_map import DONE, FAILED, KEPT, RUNNING, STATES, WAITING, TileMap, shrink_map

if TYPE_CHECKING:
    from .dashboard import TileMapPlugin

SIDE = 400
"""Blocks of the map along its longer side, at most: a screen shows no more."""
UPDATE_MS = 1000
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
SHOWN_FAILURES, SHOWN_WORKERS = 200, 100

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


class _Page:
    """One visitor's page."""

    def __init__(self, plugin: TileMapPlugin) -> None:
        self._plugin = plugin
        self._shown: tuple[str, int] = ("", -1)
        self._known: list[str] = []
        self._failed_of: tuple[str, int] = ("", -1)
        self.sketch = ColumnDataSource({"image": [], "dw": [], "dh": []})
        self.tiles = ColumnDataSource(
            {name: [] for name in ("image", "row", "column", "seconds", "worker", "state", "dw", "dh")}
        )
        self.failed = ColumnDataSource({name: [] for name in ("x", "y", "w", "h", "row", "column", "error")})
        self.speed = ColumnDataSource({"t": [], "mpx": []})
        self.workers = Div(text="", width=520)
        self.failures = Div(text="", width=520)
        self.select = Select(title="Run", options=[], width=420)
        self.select.on_change("value", lambda _attr, _old, _new: self.update())
        self.head = Div(text="", sizing_mode="stretch_width", styles={"font-size": "14px"})
        self.legend = Div(text="", sizing_mode="stretch_width")
        self.plot = self._make_plot()
        self.root = self._lay_out()

    def _make_plot(self) -> Any:
        plot = figure(
            name="tilemap",
            match_aspect=False,
            x_range=Range1d(start=0, end=1),
            y_range=Range1d(start=1, end=0),
            tools="pan,wheel_zoom,box_zoom,reset",
            active_scroll="wheel_zoom",
            x_axis_label="pixels",
            y_axis_label="pixels",
            x_axis_location="above",
            background_fill_color="#eceff3",
            output_backend="canvas",
            width=720,
            height=720,
        )
        plot.grid.visible = False
        plot.toolbar.logo = None
        plot.xaxis.formatter.use_scientific = False
        plot.yaxis.formatter.use_scientific = False
        plot.image_rgba("image", x=0, y=0, dw="dw", dh="dh", source=self.sketch)
        tiles = plot.image_rgba("image", x=0, y=0, dw="dw", dh="dh", source=self.tiles)
        failed = plot.rect(
            x="x", y="y", width="w", height="h", source=self.failed, fill_alpha=0, line_color="#7f0000", line_width=1
        )
        self._names = CustomJSHover(
            args={"names": []}, code="const n = names[Math.round(value)]; return n === undefined ? '' : n;"
        )
        texts = CustomJSHover(args={"names": [TEXTS[i] for i in range(len(STATES))]}, code="return names[value];")
        number = CustomJSHover(code="return isFinite(value) ? value.toFixed(2) + ' s' : '';")
        plot.add_tools(
            HoverTool(
                renderers=[tiles],
                tooltips=[
                    ("tile", "row @row, column @column"),
                    ("state", "@state{custom}"),
                    ("took", "@seconds{custom}"),
                    ("worker", "@worker{custom}"),
                ],
                formatters={"@state": texts, "@seconds": number, "@worker": self._names},
            ),
            HoverTool(renderers=[failed], tooltips=[("failed", "row @row, column @column"), ("error", "@error")]),
        )
        return plot

    def _lay_out(self) -> Any:
        speed = figure(
            title="Throughput",
            height=210,
            width=520,
            x_axis_label="seconds since the run began",
            y_axis_label="Mpx/s",
            tools="",
            x_range=Range1d(start=0, end=1),
            y_range=Range1d(start=0, end=1),
        )
        speed.toolbar_location = None
        speed.step(x="t", y="mpx", source=self.speed, mode="before", line_width=2)
        self._speed_ranges = speed.x_range, speed.y_range
        return column(
            row(self.select, self.head, sizing_mode="stretch_width"),
            self.legend,
            row(self.plot, column(speed, self.workers, self.failures)),
            sizing_mode="stretch_width",
            name="tilemap_page",
        )

    def update(self) -> None:
        """Show what is known now; what has not changed is not sent again."""
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
            (tiles.run, f"{tiles.title} ({time.strftime('%H:%M:%S', time.localtime(tiles.began))})")
            for tiles in reversed(maps)
        ]
        if followed or self.select.value not in names:
            self.select.value = names[-1]

    def _frame(self, tiles: TileMap) -> None:
        """The raster's true aspect."""
        height, width = tiles.shape
        scale = min(780 / width, 700 / height)
        self.plot.width, self.plot.height = round(max(240, width * scale) + 80), round(max(200, height * scale) + 60)
        self.plot.x_range.update(start=0, end=width, bounds=(0, width), reset_start=0, reset_end=width)
        self.plot.y_range.update(start=height, end=0, bounds=(0, height), reset_start=height, reset_end=0)

    def _show_map(self, tiles: TileMap) -> None:
        blocks = shrink_map(tiles, SIDE)
        down, across = blocks.states.shape
        # The last row and column of tiles may be narrower than the others: the image is drawn over whole ones.
        whole = {
            "dw": [across * blocks.factor * tiles.core[1]],
            "dh": [down * blocks.factor * tiles.core[0]],
        }
        rows, columns = np.indices(blocks.states.shape, np.int32) * blocks.factor
        self.tiles.data = {
            "image": [paint_states(blocks.states)],
            "row": [rows],
            "column": [columns],
            "seconds": [blocks.seconds],
            "worker": [blocks.worker.astype(np.int32)],
            "state": [blocks.states],
            **whole,
        }
        height, width = tiles.sketch.shape
        self.sketch.data = {
            "image": [paint_sketch(tiles.sketch)],
            "dw": [width * tiles.cell[1]],
            "dh": [height * tiles.cell[0]],
        }
        self._names.args = {"names": [self._name_of(address) for address in tiles.workers]}
        if self._failed_of != (tiles.run, len(tiles.failures)):
            self._failed_of = tiles.run, len(tiles.failures)
            shown = sorted(tiles.failures.items())[:SHOWN_FAILURES]
            high, wide = tiles.core
            self.failed.data = {
                "x": [(x + 0.5) * wide for (_, x), _ in shown],
                "y": [(y + 0.5) * high for (y, _), _ in shown],
                "w": [wide] * len(shown),
                "h": [high] * len(shown),
                "row": [y for (y, _), _ in shown],
                "column": [x for (_, x), _ in shown],
                "error": [error for _, error in shown],
            }
            self.failures.text = _table(
                f"Failed tiles ({tiles.count()['failed']:,})",
                ("row", "column", "why"),
                [(str(y), str(x), error) for (y, x), error in shown],
            )

    def _name_of(self, address: str) -> str:
        return address.removeprefix("tcp://").removeprefix("tls://")

    def _describe(self, tiles: TileMap) -> None:
        counts, now = tiles.count(), time.time()
        eta = tiles.eta_s(now)
        elapsed = (tiles.ended or now) - tiles.began
        parts = [f"{tiles.rate(now) / 1e6:.2f} Mpx/s {'in all' if tiles.ended else 'now'}"]
        if tiles.how:
            verb = "finished" if tiles.how == "finished" else f"stopped: {escape(tiles.how)}"
            parts.append(f"{verb} after {format_seconds(elapsed)}")
        else:
            parts.append(f"{format_seconds(elapsed)} so far")
            parts.append(f"about {format_seconds(eta)} to go" if eta is not None else "time to go unknown yet")
        finished = counts["done"] + counts["kept"] + counts["failed"]
        total = tiles.counts[0] * tiles.counts[1]
        self.head.text = (
            f"<b>{100 * finished / total:.1f} %</b> of {total:,} tiles ({tiles.counts[0]} x {tiles.counts[1]}), "
            f"{tiles.shape[0]:,} x {tiles.shape[1]:,} px<br>{', '.join(parts)}"
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
        times, rates = tiles.history.rates(tiles.ended or time.time())
        self.speed.data = {"t": [0.0, *times], "mpx": [rates[0] if rates else 0.0, *rates]}
        self._speed_ranges[0].end = max(10.0, *times) if times else 10.0
        self._speed_ranges[1].end = 1.15 * max(rates, default=1.0) or 1.0


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """HTML; Bokeh's own tables do not show data that is replaced."""
    if not rows:
        return f"<b>{title}</b>"
    style = "text-align:left;padding:2px 14px 2px 0;vertical-align:top;font-variant-numeric:tabular-nums"
    head = "".join(f'<th style="{style};font-weight:normal;color:#667">{escape(name)}</th>' for name in header)
    lines = ["".join(f'<td style="{style}">{escape(cell)}</td>' for cell in cells) for cells in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<b>{title}</b><div style="max-height:230px;overflow:auto"><table style="border-collapse:collapse">'
        f"<tr>{head}</tr>{body}</table></div>"
    )


def open_page(plugin: TileMapPlugin, extra: dict[str, Any], document: Any) -> None:
    """Fill a new visitor's document."""
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    page = _Page(plugin)
    page.update()
    document.title = "Dask: Tile map"
    document.add_root(page.root)
    document.add_periodic_callback(page.update, UPDATE_MS)
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)
    document.theme = BOKEH_THEME
