"""Classes of a training: names, colours and label values, from what the user, the model or the labels say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ....tiler.base.errors import UsageError
from ....tiler.base.geometry import Grid
from ....tiler.labels.labels import LabelOptions, find_ignored, flag_meanings, unsaid_values
from ....tiler.labels.vectors import is_vector_file, read_features
from ....tiler.rasters.opening import open_raster
from ..networks.model import SegmentationClass
from ..networks.palette import default_colour
from .mlm import parse_colour

_BLOCK = 2048
_MOST = 4096
"""Classes, of which tables have the square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelClasses:
    """Classes, and the values that stand for them in the labels."""

    classes: tuple[SegmentationClass, ...]
    values: tuple[str, ...]
    """Empty: as `LabelOptions.values` says."""


def parse_classes(texts: Sequence[str]) -> tuple[SegmentationClass, ...]:
    """NAME or NAME=#RRGGBB each.

    Raises:
        UsageError: a name that is missing or stands twice, or another colour.
    """
    found: list[SegmentationClass] = []
    for index, text in enumerate(texts):
        name, sign, colour = text.rpartition("=") if "=#" in text else (text, "", "")
        name = name.strip()
        if not name or name in (entry.name for entry in found):
            raise UsageError(f"classes must be names that differ from each other, got {', '.join(texts)}")
        try:
            found.append(SegmentationClass(name=name, colour=parse_colour(colour) if sign else default_colour(index)))
        except ValueError:
            raise UsageError(f"a class's colour must be six hexadecimal digits, #RRGGBB, got {colour!r}") from None
    return tuple(found)


def find_classes(
    paths: Sequence[str], options: LabelOptions, advance: Callable[[int], None] | None = None
) -> LabelClasses:
    """What the labels themselves say: the values of polygons; of rasters the names they carry, else the values in them.

    Raises:
        UsageError: fewer than two classes, or more than 4096.
    """
    names: dict[str, None] = {}
    numbers: set[int] = set()
    meanings: dict[int, str] = {}
    for path in paths:
        if is_vector_file(path):
            values = read_features(path, options.field, encoding=options.encoding, trust=options.trust).values
            none = find_ignored(values)
            names |= dict.fromkeys(value for value in values if value not in none)
            continue
        raster = open_raster(path, nodata=options.nodata, trust=options.trust)
        meanings |= flag_meanings(raster)
        if not meanings:
            numbers |= _find_values(path, options, advance)
    if names and (numbers or meanings):
        raise UsageError(
            "labels as polygons and as rasters have no names in common by themselves; name them with --classes"
        )
    if meanings:
        numbers = set(meanings)
    found = sorted(names) if names else sorted(numbers)
    if names and all(name.lstrip("-").isdigit() for name in names):
        found = sorted(names, key=int)
    if not 2 <= len(found) <= _MOST:
        raise UsageError(
            f"a training needs 2 to {_MOST} classes, the labels have {len(found)}; name them with --classes, or what "
            "is no class with --label-nodata"
        )
    texts = [meanings.get(value, f"class {value}") if isinstance(value, int) else value for value in found]
    classes = (SegmentationClass(name=name, colour=default_colour(index)) for index, name in enumerate(texts))
    return LabelClasses(classes=tuple(classes), values=tuple(map(str, found)))


def _find_values(path: str, options: LabelOptions, advance: Callable[[int], None] | None) -> set[int]:
    """Values of a raster of labels, from one pass over it; those below 0 mean that there is no class."""
    raster = open_raster(path, nodata=options.nodata, trust=options.trust)
    if raster.dtype.kind not in "ui" or raster.bands != 1:
        raise UsageError(f"labels must be one band of whole numbers, {path} has {raster.bands} of {raster.dtype}")
    reader = raster.open_reader()
    grid = Grid(shape=raster.shape_yx, cell=(_BLOCK, _BLOCK))
    found: set[int] = set()
    for at in grid:
        window = grid.window(*at)
        image = reader.read(window)
        missing = reader.read_missing(window, image)
        found |= set(np.unique(image[0] if missing is None else image[0][~missing]).tolist())
        if len(found) > _MOST + 1:
            raise UsageError(f"{path} holds more than {_MOST} values; labels are class numbers")
        if advance is not None:
            advance(window.pixels)
    reader.close()
    found = {value for value in found if value >= 0}
    # Among more classes than bytes can tell, 255 is one of them.
    return found - {value for value in unsaid_values(raster) if len(found) <= value}
