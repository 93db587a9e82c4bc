"""What is to be said of a raster before it is read: what its file says beside pixels, and what becomes of that."""

from __future__ import annotations

from .raster import Raster
from .scale import describe_tags


def list_notes(raster: Raster) -> list[tuple[str, str]]:
    """(a word, one line) each."""
    notes: list[tuple[str, str]] = []
    # Pieces of a mosaic are scaled one by one.
    scaled = raster.parts[0].raster if raster.kind == "mosaic" else raster
    if raster.scale_tags:
        said = describe_tags(raster.scale_tags)
        notes.append(("tags", f"{said}: not applied, pixels are the stored numbers (--apply-scale)"))
    elif scaled.kind == "scaled":
        said = describe_tags(scaled.parts[0].raster.scale_tags)
        notes.append(("tags", f"{said}: applied to the stored numbers, which gives {raster.dtype}"))
    elif raster.options.apply_scale:
        notes.append(("tags", "no scale or offset: --apply-scale changes nothing"))
    if raster.place.points:
        notes.append(
            ("place", f"{len(raster.place.points)} ground control points and no transform; outputs keep the points")
        )
    notes += [("file", remark) for remark in raster.remarks]
    return notes
