"""The tile map: the state of every tile of a run, kept from messages. Numbers only; it knows neither Dask nor Bokeh."""

from __future__ import annotations

import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Cell = tuple[int, int]
Message = dict[str, Any]

TOPIC = "outsize-tiles"
"""Of Dask's events that carry these messages."""
WAITING, RUNNING, DONE, FAILED, KEPT = range(5)
STATES = ("waiting", "running", "done", "failed", "kept")
"""Names by number; kept: done by an earlier call."""
SKETCH_SIDE = 512
"""Of the grey picture under the map, at most, in cells."""
SKETCH_CELLS = 16
"""Along one tile, at most."""
SAMPLES = 4
"""Pixels along one cell of the picture that count in its mean, about."""
BUCKETS = 240
"""Of the throughput's history; when they are full, two become one."""
NOW_S = 15.0
"""What "now" means for throughput."""
LISTED = 1000
"""Failed tiles whose reasons are kept."""
_WINDOW = re.compile(r"\bwindow \d+,\d+,\d+,\d+ ")
"""In the reason of a tile that cannot be read."""


def begin_message(
    *,
    run: str,
    title: str,
    shape: tuple[int, int],
    core: tuple[int, int],
    counts: tuple[int, int],
    kept: npt.NDArray[np.bool_] | None = None,
    at: float | None = None,
) -> Message:
    """A run begins.

    Args:
        shape: (height, width) of what is made, in pixels.
        core: of a tile, at most.
        counts: tiles down and across.
        kept: (down, across) where nothing is to do.
    """
    return {
        "type": "begin",
        "run": run,
        "title": title,
        "shape": list(shape),
        "core": list(core),
        "counts": list(counts),
        "kept": b"" if kept is None else zlib.compress(np.packbits(kept).tobytes(), 1),
        "at": time.time() if at is None else at,
    }


def kept_cells(counts: tuple[int, int], todo: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """(down, across) where nothing is to do; `todo` is (cells, 2)."""
    kept = np.ones(counts, np.bool_)
    kept[tuple(np.asarray(todo, np.int64).reshape(-1, 2).T)] = False
    return kept


def tile_message(
    run: str, cell: Cell, state: str, *, seconds: float = 0.0, worker: str = "", error: str = "", sketch: Any = b""
) -> Message:
    """A tile is in another state.

    Args:
        sketch: bytes of its part of the grey picture, float32, as many cells as `sketch_shape` says.
    """
    return {
        "type": "tile",
        "run": run,
        "row": cell[0],
        "column": cell[1],
        "state": state,
        "seconds": seconds,
        "worker": worker,
        "error": error,
        "sketch": sketch,
    }


def backdrop_message(run: str, grey: npt.NDArray[np.float32]) -> Message:
    """A first, coarse picture of the whole, until tiles bring their own parts."""
    return {"type": "backdrop", "run": run, "shape": list(grey.shape), "sketch": grey.tobytes()}


def end_message(run: str, how: str) -> Message:
    """A run ended: "finished", or what stopped it."""
    return {"type": "end", "run": run, "how": how}


def sketch_cell(core: tuple[int, int], counts: tuple[int, int]) -> tuple[int, int]:
    """Pixels down and across of one cell of the grey picture: whole cells along a core."""
    wanted = max(1, min(SKETCH_CELLS, SKETCH_SIDE // max(counts)))
    cells = [next(n for n in range(min(wanted, side), 0, -1) if side % n == 0) for side in core]
    return core[0] // cells[0], core[1] // cells[1]


def make_sketch(
    image: Array, core: tuple[int, int], counts: tuple[int, int], missing: npt.NDArray[np.bool_] | None = None
) -> bytes:
    """A tile's pixels (bands, height, width) as its part of the grey picture; empty where that fails, since no tile may
    fail for its picture."""
    try:
        return shrink(image, sketch_cell(core, counts), missing).tobytes()
    except Exception:  # noqa: BLE001
        return b""


def shrink(
    image: Array, cell: tuple[int, int], missing: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.float32]:
    """(bands, height, width) as grey cells: of each the mean of some pixels and up to three bands; nan where all are
    nodata."""
    steps = [max(1, size // SAMPLES) for size in cell]
    rows, columns = (slice(None, None, step) for step in steps)
    with np.errstate(over="ignore", invalid="ignore"):
        grey = image[:3, rows, columns].astype(np.float32).mean(0)
    known = np.isfinite(grey)
    if missing is not None:
        known &= ~missing[rows, columns]
    edges = [
        # The first sample of every cell.
        -(-np.arange(0, extent, size) // step)
        for extent, size, step in zip(image.shape[1:], cell, steps, strict=True)
    ]
    edges = [np.minimum(edge, extent - 1) for edge, extent in zip(edges, grey.shape, strict=True)]

    def total(values: Array) -> Array:
        return np.add.reduceat(np.add.reduceat(values, edges[0], 0), edges[1], 1)

    with np.errstate(invalid="ignore", divide="ignore"):
        return (total(np.where(known, grey, 0)) / total(known.astype(np.float32))).astype(np.float32)


def group_failures(failures: Iterable[tuple[Cell, str]]) -> list[tuple[str, list[Cell]]]:
    """Tiles by their reason, that of most tiles first; without the window, which is the tile's own."""
    found: dict[str, list[Cell]] = {}
    for cell, reason in failures:
        found.setdefault(_WINDOW.sub("", reason), []).append(cell)
    return sorted(found.items(), key=lambda entry: -len(entry[1]))


@dataclass
class History:
    """Pixels done over time, in a bounded number of buckets."""

    began: float
    width_s: float = 1.0
    buckets: list[int] = field(default_factory=lambda: [0])

    def add(self, at: float, pixels: int) -> None:
        index = self._reach(at)
        self.buckets[index] += pixels

    def _reach(self, at: float) -> int:
        """The bucket of a time; there is one afterwards."""
        index = max(0, int((at - self.began) / self.width_s))
        while index >= BUCKETS:
            paired = [*self.buckets, *([0] if len(self.buckets) % 2 else [])]
            self.buckets = [a + b for a, b in zip(paired[::2], paired[1::2], strict=True)]
            self.width_s *= 2
            index = max(0, int((at - self.began) / self.width_s))
        self.buckets += [0] * (index + 1 - len(self.buckets))
        return index

    def rates(self, now: float) -> tuple[list[float], list[float]]:
        """(seconds since the beginning, Mpx/s) of each bucket until now; the last one only as far as it has come."""
        self._reach(now)
        times, rates = list[float](), list[float]()
        for index, pixels in enumerate(self.buckets):
            start = index * self.width_s
            span = min(self.width_s, now - self.began - start)
            if span >= min(1.0, self.width_s / 2):
                times.append(start + span)
                rates.append(pixels / span / 1e6)
        return times, rates


class TileMap:
    """One run."""

    def __init__(self, begin: Message) -> None:
        self.run, self.title = str(begin["run"]), str(begin["title"])
        self.shape: tuple[int, int] = (int(begin["shape"][0]), int(begin["shape"][1]))
        self.core: tuple[int, int] = (int(begin["core"][0]), int(begin["core"][1]))
        self.counts: tuple[int, int] = (int(begin["counts"][0]), int(begin["counts"][1]))
        self.began = float(begin["at"])
        self.worked: float | None = None
        """When the first tile began: until then the engine is set up and checked, which no tile's time tells of."""
        self.ended: float | None = None
        self.how = ""
        self.states = np.zeros(self.counts, np.uint8)
        if begin["kept"]:
            bits = np.frombuffer(zlib.decompress(begin["kept"]), np.uint8)
            kept = np.unpackbits(bits, count=self.states.size).reshape(self.counts).astype(bool)
            self.states[kept] = KEPT
        self.seconds = np.full(self.counts, np.nan, np.float32)
        self.worker = np.full(self.counts, -1, np.int16)
        self.workers: list[str] = []
        """Addresses, by the number in `worker`."""
        self.done_by: Counter[str] = Counter()
        self.failures: dict[Cell, str] = {}
        self.cell = sketch_cell(self.core, self.counts)
        size = (-(-extent // side) for extent, side in zip(self.shape, self.cell, strict=True))
        self.sketch = np.full(tuple(size), np.nan, np.float32)
        self.history = History(self.began)
        self.pixels_done = self.pixels_failed = 0
        self.pixels = int(self._pixels_of(self.states != KEPT))
        self.recent: list[tuple[float, int]] = []
        """(time, pixels done until then), a little more than `NOW_S` of them."""
        self.version = 0
        """Grows with every message."""

    def _pixels_of(self, chosen: npt.NDArray[np.bool_]) -> int:
        sides = [
            np.minimum(side, extent - side * np.arange(count))
            for side, extent, count in zip(self.core, self.shape, self.counts, strict=True)
        ]
        return int(sides[0] @ chosen.astype(np.int64) @ sides[1])

    def _pixels_at(self, cell: Cell) -> int:
        sides = [min(c, extent - at * c) for c, extent, at in zip(self.core, self.shape, cell, strict=True)]
        return sides[0] * sides[1]

    def apply(self, message: Message, at: float | None = None) -> None:
        """Take a message of this run."""
        now = time.time() if at is None else at
        self.version += 1
        if message["type"] == "end":
            self.ended, self.how = now, str(message["how"])
            self.states[self.states == RUNNING] = WAITING
        elif message["type"] == "backdrop":
            self._paint_back(message)
        elif message["type"] == "tile":
            self._set(message, now)

    def _set(self, message: Message, now: float) -> None:
        cell = int(message["row"]), int(message["column"])
        state = STATES.index(message["state"])
        self.states[cell] = state
        if self.worked is None:
            self.worked = now - float(message["seconds"])
        if message["worker"]:
            self.worker[cell] = self._number_of(message["worker"])
        if state not in (DONE, FAILED):
            return
        fresh = np.isnan(self.seconds[cell])  # Dask may do a tile twice
        self.seconds[cell] = message["seconds"]
        failed_before = self.failures.pop(cell, None) is not None
        pixels = self._pixels_at(cell)
        if fresh and state == FAILED:
            self.pixels_failed += pixels
        elif state == DONE and (fresh or failed_before):
            self.pixels_failed -= pixels if failed_before else 0
            self.pixels_done += pixels
            self.done_by[message["worker"]] += 1
            self.history.add(now, pixels)
            self.recent.append((now, self.pixels_done))
            if self.recent[0][0] < now - 2 * NOW_S:
                self.recent = [entry for entry in self.recent if entry[0] >= now - NOW_S]
        if state == FAILED and len(self.failures) < LISTED:
            self.failures[cell] = message["error"]
        if message["sketch"]:
            self._paint(message)

    def _number_of(self, worker: str) -> int:
        if worker not in self.workers:
            self.workers.append(worker)
        return self.workers.index(worker)

    def _paint(self, message: Message) -> None:
        """A tile's part of the grey picture."""
        y, x = int(message["row"]) * self.core[0] // self.cell[0], int(message["column"]) * self.core[1] // self.cell[1]
        height, width = (
            min(core // cell, extent - start)
            for core, cell, extent, start in zip(self.core, self.cell, self.sketch.shape, (y, x), strict=True)
        )
        part = np.frombuffer(message["sketch"], np.float32)
        if part.size == height * width:
            self.sketch[y : y + height, x : x + width] = part.reshape(height, width)

    def _paint_back(self, message: Message) -> None:
        """A coarse picture, where nothing better is known."""
        coarse = np.frombuffer(message["sketch"], np.float32).reshape(message["shape"])
        rows, columns = (
            np.arange(extent) * size // extent for extent, size in zip(self.sketch.shape, coarse.shape, strict=True)
        )
        unknown = np.isnan(self.sketch)
        self.sketch[unknown] = coarse[np.ix_(rows, columns)][unknown]

    def lose(self, worker: str) -> None:
        """A worker is gone; what it had is waiting again."""
        if worker in self.workers and self.ended is None:
            self.states[(self.states == RUNNING) & (self.worker == self.workers.index(worker))] = WAITING
            self.version += 1

    def count(self) -> dict[str, int]:
        """Tiles in each state."""
        found = np.bincount(self.states.ravel(), minlength=len(STATES))
        return {name: int(number) for name, number in zip(STATES, found, strict=True)}

    def count_running(self) -> dict[str, int]:
        """Tiles that each worker is at."""
        found = np.bincount(self.worker[self.states == RUNNING] + 1, minlength=len(self.workers) + 1)
        return {worker: int(number) for worker, number in zip(self.workers, found[1:], strict=True)}

    def rate(self, now: float | None = None) -> float:
        """Pixels done a second: of the last seconds, or since the first tile began once the run has ended."""
        now = self.ended or (time.time() if now is None else now)
        since = self.began if self.worked is None else self.worked
        if self.ended is not None or now - since <= NOW_S:
            return self.pixels_done / max(1e-3, now - since)
        before = next((pixels for when, pixels in reversed(self.recent) if when < now - NOW_S), None)
        if before is None:
            before = self.recent[0][1] if self.recent and len(self.recent) > 1 else 0
        return (self.pixels_done - before) / NOW_S

    def eta_s(self, now: float | None = None) -> float | None:
        """Seconds to go at the pace since the first tile began; None where nothing is known, or nothing is left."""
        now = time.time() if now is None else now
        over = self.pixels_done + self.pixels_failed
        left = self.pixels - over
        if self.ended is not None or self.worked is None or not over or left <= 0:
            return None
        return left * (now - self.worked) / over

    def to_json(self, now: float | None = None) -> dict[str, Any]:
        now = time.time() if now is None else now
        eta = self.eta_s(now)
        return {
            "run": self.run,
            "title": self.title,
            "shape": list(self.shape),
            "grid": list(self.counts),
            "core": list(self.core),
            "state": self.how or "running",
            "tiles": self.count(),
            "seconds": round((self.ended or now) - self.began, 3),
            "mpx_per_s": round(self.rate(now) / 1e6, 4),
            "eta_s": None if eta is None else round(eta, 1),
            "failed": [
                {"row": row, "column": column, "error": error} for (row, column), error in sorted(self.failures.items())
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A map shrunk for a screen: blocks of `factor` x `factor` tiles."""

    factor: int
    states: npt.NDArray[np.uint8]
    """Of each block: failed if any tile is, else running if any is, else what half of them are."""
    share: npt.NDArray[np.float32]
    """Of its tiles that are done."""
    seconds: npt.NDArray[np.float32]
    """Of its tiles, in the mean; nan where none is done."""
    worker: npt.NDArray[np.int16]


def shrink_map(tiles: TileMap, side: int) -> Blocks:
    """A map of at most `side` blocks along its longer side."""
    factor = max(1, -(-max(tiles.counts) // side))
    finished = (tiles.states == DONE) | (tiles.states == KEPT)
    if factor == 1:
        return Blocks(
            factor=1,
            states=tiles.states.copy(),
            share=finished.astype(np.float32),
            seconds=tiles.seconds.copy(),
            worker=tiles.worker.copy(),
        )
    edges = [np.arange(0, count, factor) for count in tiles.counts]

    def total(values: Array) -> Array:
        return np.add.reduceat(np.add.reduceat(values, edges[0], 0), edges[1], 1)

    ones = total(np.ones(tiles.counts, np.int32))
    share = (total(finished.astype(np.int32)) / ones).astype(np.float32)
    kept = total((tiles.states == KEPT).astype(np.int32))
    known = np.isfinite(tiles.seconds)
    timed = total(known.astype(np.int32))
    with np.errstate(invalid="ignore", divide="ignore"):
        seconds = (total(np.where(known, tiles.seconds, 0)) / timed).astype(np.float32)
    states = np.where(share >= 0.5, np.where(2 * kept >= ones, KEPT, DONE), WAITING).astype(np.uint8)
    states[total((tiles.states == RUNNING).astype(np.int32)) > 0] = RUNNING
    states[total((tiles.states == FAILED).astype(np.int32)) > 0] = FAILED
    worker = np.maximum.reduceat(np.maximum.reduceat(tiles.worker, edges[0], 0), edges[1], 1)
    return Blocks(factor=factor, states=states, share=share, seconds=seconds, worker=worker)
