"""What a terminal shows: results to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ...tiler.base.errors import UsageError
from ...tiler.base.text import format_bytes, format_seconds, one_line

MOST_SHOWN = 20
"""Lines on a terminal of things of one kind that went wrong."""
LONG_S = 5.0
"""Of silence, after which a command says what it does."""


class Step(Protocol):
    """A long piece of work in progress."""

    def advance(self, pixels: int, detail: str = "") -> None:
        """`pixels` more are done; `detail` is shown at the end of the line."""
        ...


class Console:
    """One command's output: text, or with `as_json` one JSON object on the last line of stdout."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    def remark(self, text: str) -> None:
        """A line for people, on stderr."""
        print(one_line(text), file=sys.stderr, flush=True)

    def remark_lines(self, lines: Sequence[str]) -> None:
        """Several."""
        for line in lines:
            self.remark(line)

    def remark_first(self, lines: Sequence[str], rest: str) -> None:
        """The first of many lines; then how many more there are, with what `rest` says of them."""
        for line in lines[:MOST_SHOWN]:
            self.remark(line)
        if len(lines) > MOST_SHOWN:
            self.remark(f"{len(lines) - MOST_SHOWN:,} more {rest}")

    def result(self, text: str, values: dict[str, Any]) -> None:
        """The command's result: text for people, or its values as JSON."""
        print(json.dumps(values) if self.as_json else printable(text), flush=True)

    @contextmanager
    def stages(self, label: str) -> Iterator[Callable[[str], None]]:
        """Work in stages that is told of only where it takes long: its stage by then, and each that comes after it."""
        began, lock = time.monotonic(), threading.Lock()
        stage, ended = "", False

        def tell(new: str) -> None:
            nonlocal stage
            with lock:
                stage = new
                if time.monotonic() - began >= LONG_S:
                    show()

        def show() -> None:
            self.remark(f"{label:<9} {stage}, {format_seconds(time.monotonic() - began)} so far")

        def show_late() -> None:
            with lock:
                if not ended and stage:
                    show()

        timer = threading.Timer(LONG_S, show_late)
        timer.daemon = True
        timer.start()
        try:
            yield tell
        finally:
            with lock:
                ended = True
            timer.cancel()

    @contextmanager
    def step(self, label: str, pixels: int, *, counts_pixels: bool = True, done: int = 0) -> Iterator[Step]:
        """Progress of work on that many pixels: a bar on a terminal, a line now and then elsewhere.

        Args:
            counts_pixels: False: `pixels` are parts of some other work, whose speed says nothing.
            done: pixels that an earlier call did, and no time is counted for.
        """
        if sys.stderr.isatty():
            with _bar(label, pixels, counts_pixels, done) as bar:
                yield bar
        else:
            lines = _Lines(label, pixels, counts_pixels, done)
            yield lines
            lines.close()


class SilentConsole(Console):
    """Shows nothing: for callers that are no commands."""

    def remark(self, text: str) -> None:
        del text

    def result(self, text: str, values: dict[str, Any]) -> None:
        del text, values

    @contextmanager
    def step(self, label: str, pixels: int, *, counts_pixels: bool = True, done: int = 0) -> Iterator[Step]:
        del label, pixels, counts_pixels, done
        yield _Unseen()


class _Unseen:
    def advance(self, pixels: int, detail: str = "") -> None:
        del pixels, detail


def printable(text: str) -> str:
    """A text of several lines; each moves no cursor and paints nothing."""
    return "".join(c if c in "\n\t" else one_line(c) for c in text)


def _rate(pixels: int, seconds: float) -> str:
    return f"{pixels / seconds / 1e6:.2f} Mpx/s" if seconds > 0 else ""


@contextmanager
def _bar(label: str, pixels: int, counts_pixels: bool, before: int) -> Iterator[Step]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    class Bar:
        def __init__(self, progress: Progress) -> None:
            self.progress = progress
            self.task = progress.add_task(label, total=pixels, completed=before, rate="", detail="")
            self.done, self.began = before, time.monotonic()

        def advance(self, pixels: int, detail: str = "") -> None:
            self.done += pixels
            rate = _rate(self.done - before, time.monotonic() - self.began) if counts_pixels else ""
            self.progress.update(self.task, completed=self.done, rate=rate, detail=one_line(detail))

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[detail]}", markup=False),  # names may hold brackets
    )
    with Progress(*columns, console=RichConsole(stderr=True), refresh_per_second=5) as progress:
        yield Bar(progress)


class _Lines:
    """At most one line every five seconds, and one at the end."""

    def __init__(self, label: str, pixels: int, counts_pixels: bool, done: int = 0) -> None:
        self.label, self.pixels, self.counts_pixels = label, pixels, counts_pixels
        self.before, self.done, self.detail = done, done, ""
        self.began = self.printed = time.monotonic()

    def advance(self, pixels: int, detail: str = "") -> None:
        self.done += pixels
        self.detail = detail
        now = time.monotonic()
        if now - self.printed >= 5:
            self.printed = now
            new = self.done - self.before
            left = (self.pixels - self.done) * (now - self.began) / new if new else 0
            self._print(f"ETA {format_seconds(left)}")

    def _print(self, end: str) -> None:
        share = 100 * self.done / self.pixels if self.pixels else 100
        rate = _rate(self.done - self.before, time.monotonic() - self.began) if self.counts_pixels else ""
        parts = [f"{share:.0f} %", rate, end, self.detail]
        line = f"{self.label}: {', '.join(part for part in parts if part)}"
        print(one_line(line), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.done:
            self._print(f"took {format_seconds(time.monotonic() - self.began)}")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = map(one_line, cells)
        return "  ".join(
            [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def format_rate(rate: float) -> str:
    """1e-3, 2.5e-2: of what is rare."""
    digits, exponent = f"{rate:.9e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def count_of(number: int, noun: str) -> str:
    """1 band, 4 bands, 2 processes."""
    ending = "" if number == 1 else ("es" if noun.endswith("s") else "s")
    return f"{number} {noun}{ending}"


def refuse_picture_name(command: str, out: Path) -> None:
    """Commands that write Zarr stores do not write pictures, whatever the name says.

    Raises:
        UsageError: a name that ends as a picture's does.
    """
    if out.suffix.lower() in (".tif", ".tiff", ".png", ".jp2"):
        then = f", then: outsize export {out.stem}.zarr {out.name}" if command == "segment" else ""
        raise UsageError(f"{command} writes a Zarr store, got {out.name}; name it {out.stem}.zarr{then}")


def describe_memory(current: int) -> str:
    return f"memory {format_bytes(current)}"
