"""Reading plans: the order of tiles, and the decoded blocks kept along it, so that each block is decoded about once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..base.geometry import Window
from ..base.text import MB
from .block_cache import READ_BYTES

if TYPE_CHECKING:
    from ..base.tile import Span

GDAL_CACHE_BYTES = 64 * MB
DECODE_BYTES_PER_S = 300 * MB
"""Of one core, for DEFLATE and the like; only for weighing decoding against changes of program."""
CLOSE = 1.01
"""Of ways between which a run's time differs by less, the one that keeps least is taken."""
SMALL_BYTES = 64 * MB
"""Of a cache that is not worth saving on: of those up to that the one that decodes least is taken."""
MUCH_READ = 2.0
"""Amplification above which a way is taken only where no other fits; a plan then looks for smaller cores, and says what
else helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What of a raster decides how it is read."""

    shape_yx: tuple[int, int]
    block: tuple[int, int]
    """(height, width) of the blocks that are decoded together."""
    pixel_bytes: int
    """Of all that is decoded for a pixel."""
    decoder_bytes: int
    """Of one block as its decoder holds it, bands that are not wanted too."""
    has_gdal: bool

    def blocks(self, rows: Sequence[Span], columns: Sequence[Span]) -> tuple[int, int]:
        """(rows, columns) of blocks from the first to the last that those spans touch."""
        counts: list[int] = []
        for spans, size, extent in zip((rows, columns), self.block, self.shape_yx, strict=True):
            first = min(span.window[0] for span in spans) // size
            counts.append(-(-min(max(span.window[1] for span in spans), extent) // size) - first)
        return counts[0], counts[1]

    @property
    def is_wide(self) -> bool:
        """Whether one block has all columns."""
        return self.block[1] >= self.shape_yx[1]

    @property
    def block_bytes(self) -> int:
        """Of one block as it is kept; blocks may be larger than the raster."""
        height, width = (min(pair) for pair in zip(self.block, self.shape_yx, strict=True))
        return height * width * self.pixel_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingPlan:
    """How a worker reads."""

    strip_rows: int
    """Rows of tiles that are done together."""
    strips_first: bool
    """All kinds of tiles of one strip before the next strip; else all strips of one kind before the next kind."""
    cache_bytes: int
    """Of decoded blocks that it keeps."""
    held_bytes: int
    """Beside the windows: those, and what is being decoded."""
    amplification: float
    """Pixels decoded for each wanted one, by all workers, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """One way to go through the tiles."""

    strip_rows: int
    strips_first: bool
    kept_bytes: int
    amplification: float
    """By one worker."""


def plan_reading(
    rows: Sequence[Span],
    columns: Sequence[Span],
    source: Source,
    region: Window,
    *,
    room_bytes: int,
    work_s: float,
    switch_s: float,
    workers: int = 1,
) -> ReadingPlan:
    """The way through the tiles that takes the least time of decoding blocks and changing programs, of those whose
    blocks fit; of those that take nearly as little, the one that keeps least.

    The ways: all blocks are kept; those of a whole strip of tiles are, so that blocks as wide as the raster are decoded
    once, not once for each column of tiles; tiles go column by column through strips, and what two neighbouring columns
    share is kept; and where none of these fits, nothing is.

    Args:
        region: what is wanted, in pixels of the raster.
        room_bytes: of each worker, beside what reading without any cache takes.
        work_s: of one core, for computing all tiles.
        switch_s: of changing from one kind of tile to another.
    """
    least = least_held_bytes(rows, columns, source)
    nothing_kept, *others = _find_ways(rows, columns, source, region)
    ways = [way for way in others if _hold(source, rows, columns, way.kept_bytes) - least <= room_bytes]
    ways = [way for way in ways if way.amplification <= MUCH_READ] or ways or [nothing_kept]
    decode_s = region.pixels * source.pixel_bytes / DECODE_BYTES_PER_S
    costs = [
        work_s + way.amplification * decode_s + workers * switch_s * _count_switches(rows, columns, source, way)
        for way in ways
    ]
    way = min(
        (way for way, cost in zip(ways, costs, strict=True) if cost <= CLOSE * min(costs)),
        key=lambda way: (max(way.kept_bytes, SMALL_BYTES), way.amplification),
    )
    # Workers share no blocks, and neighbouring tiles go to different ones: each may decode what one alone would.
    return ReadingPlan(
        strip_rows=way.strip_rows,
        strips_first=way.strips_first,
        cache_bytes=way.kept_bytes,
        held_bytes=_hold(source, rows, columns, way.kept_bytes),
        amplification=min(workers * way.amplification, nothing_kept.amplification),
    )


def least_held_bytes(rows: Sequence[Span], columns: Sequence[Span], source: Source) -> int:
    """What reading holds beside the windows where no block is kept."""
    return _hold(source, rows, columns, 0)


def _find_ways(rows: Sequence[Span], columns: Sequence[Span], source: Source, region: Window) -> Iterator[_Way]:
    """The first keeps nothing."""
    heights = [(kind_of(span), index) for index, span in enumerate(rows)]
    widths = [kind_of(span) for span in columns]
    alone = [(kind, index) for index, kind in enumerate(widths)]

    def decoded(by_row: Sequence[Hashable], by_column: Sequence[Hashable]) -> float:
        """Pixels decoded for each wanted one; those of the rows times those of the columns."""
        down = _count_decoded(rows, by_row, source.block[0], source.shape_yx[0])
        across = _count_decoded(columns, by_column, source.block[1], source.shape_yx[1])
        return down * across / region.pixels

    yield _Way(strip_rows=1, strips_first=False, kept_bytes=0, amplification=decoded(heights, alone))
    widest = max(source.blocks(rows[:1], [span])[1] for span in columns)
    pairs = [pair for pair in pairwise(columns) if kind_of(pair[0]) == kind_of(pair[1])]
    shared = max((2 * widest - source.blocks(rows[:1], pair)[1] for pair in pairs), default=0)
    everything = source.blocks(rows[:1], columns)[1]
    yield _Way(
        strip_rows=1,
        strips_first=False,
        kept_bytes=source.blocks(rows, columns)[0] * everything * source.block_bytes,
        amplification=decoded([0] * len(rows), [0] * len(columns)),
    )
    for strip_rows in _strip_heights(len(rows)):
        strips = [(kind, index // strip_rows) for kind, index in heights]
        together: dict[Hashable, list[Span]] = {}
        for span, strip in zip(rows, strips, strict=True):
            together.setdefault(strip, []).append(span)
        tallest = max(source.blocks(spans, columns[:1])[0] for spans in together.values())
        row_bytes = tallest * source.block_bytes
        yield _Way(
            strip_rows=strip_rows,
            strips_first=False,
            kept_bytes=row_bytes * min(widest + max(shared, 0), everything),
            amplification=decoded(strips, widths),
        )
        # The last rows of a strip are still there when the next begins, and go as those of the same columns come.
        for strips_first, by_column in ((False, widths), (True, [0] * len(columns))):
            yield _Way(
                strip_rows=strip_rows,
                strips_first=strips_first,
                kept_bytes=row_bytes * everything,
                amplification=decoded([kind for kind, _ in heights], by_column),
            )


def _strip_heights(rows: int) -> list[int]:
    """Rows of tiles that a strip may have."""
    return sorted({rows, *(1 << power for power in range(rows.bit_length()) if 1 << power < rows)})


def kind_of(span: Span) -> tuple[int, str]:
    """What spans have in common that one program or window shape serves; the longest first in order."""
    return (span.window[0] - span.window[1], span.kind)


def _count_decoded(spans: Sequence[Span], groups: Sequence[Hashable], size: int, extent: int) -> int:
    """Pixels of the blocks along one axis that are decoded, where neighbouring spans of one group decode what they
    share once."""
    pixels, before = 0, None
    for span, group in zip(spans, groups, strict=True):
        first, last = span.window[0] // size * size, min(-(-span.window[1] // size) * size, extent)
        if before is not None and before[0] == group:
            first = max(first, before[1])
        pixels += max(0, last - first)
        before = (group, last)
    return pixels


def _count_switches(rows: Sequence[Span], columns: Sequence[Span], source: Source, way: _Way) -> int:
    """Changes from one kind of tile to another."""
    heights, widths = len({kind_of(span) for span in rows}), len({kind_of(span) for span in columns})
    if not way.strips_first:
        return heights * widths - 1
    strips = len({(kind_of(span), index // way.strip_rows) for index, span in enumerate(rows)})
    if source.is_wide or widths == 1:  # a strip begins with the kind that the one before ended with
        return strips * (widths - 1) + heights - 1
    return strips * widths - 1


def _hold(source: Source, rows: Sequence[Span], columns: Sequence[Span], kept_bytes: int) -> int:
    """Blocks that are kept, those of one read on their way there, and one in the decoder."""
    beside = max(source.blocks([rows[0]], [span])[1] for span in columns) * source.block_bytes
    # Without a store the window itself is read; it is counted elsewhere.
    reading = kept_bytes and max(READ_BYTES, beside)
    gdal = GDAL_CACHE_BYTES if source.has_gdal else 0
    return gdal + kept_bytes + reading + max(source.decoder_bytes, source.block_bytes)
