"""A tile and the spans of its rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

from .geometry import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A row or column of tiles along one axis."""

    core: tuple[int, int]
    """[start, stop) in pixels of the whole result."""
    window: tuple[int, int]
    """[start, stop) in pixels of the (padded) raster."""
    kind: str = ""
    """Of a program: equal for spans that one program serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A core and the window that it is computed from."""

    row: int
    column: int
    core: Window
    """In pixels of the whole result; a run writes just these."""
    target: Window
    """The core in pixels of the output array, which begins where the plan's region does."""
    window: Window
    """In pixels of the (padded) raster."""
    crop: Window
    """The core in the pixels of the program's output on the window."""
