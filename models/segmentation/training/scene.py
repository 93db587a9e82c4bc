"""A scene to train on: a raster with labels, and either of them turned, adjusted and split as a step wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ....tiler.base.geometry import Window
from ....tiler.labels.labels import UNLABELLED, Classes, LabelReader, Labels, RasterLabels
from ....tiler.rasters.block_cache import BlockStore
from ....tiler.rasters.raster import Raster, RasterReader
from .augmentation import Turn, Variant
from .split import BlockSplit

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
LabelPart: TypeAlias = Literal["training", "validation", "all"]
UNTURNED = Variant(turn=Turn())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingScene:
    """One raster, its labels, and what of it is trained on."""

    raster: Raster
    labels: Labels
    split: BlockSplit | None
    """None: all of it trains, or with `is_held_out` validates."""
    is_held_out: bool = False

    @property
    def trains(self) -> bool:
        return not self.is_held_out

    @property
    def validates(self) -> bool:
        return self.is_held_out or (self.split is not None and self.split.share > 0)

    def made_absolute(self) -> TrainingScene:
        """The same scene, for processes in other folders."""
        labels = self.labels
        if isinstance(labels, RasterLabels):
            labels = replace(labels, raster=labels.raster.made_absolute())
        return replace(self, raster=self.raster.made_absolute(), labels=labels)

    def find_training(self, window: Window) -> Mask | None:
        """(height, width): True where a pixel may be trained on; None: everywhere."""
        return self.split.find_training(window) if self.split is not None else None

    def find_validation(self, window: Window) -> Mask | None:
        """(height, width): True where a pixel validates; None: everywhere."""
        return self.split.find_validation(window) if self.split is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRaster(Raster):
    """A raster turned, with other gain and offset, as float pixels: a window of it is the variant of a window.

    `read` gives what turning and adjusting the whole raster, and then cutting, would give.
    """

    source: Raster
    variant: Variant
    """Its dtype is the float type that pixels are given in."""

    @classmethod
    def of(cls, raster: Raster, variant: Variant, dtype: np.dtype[Any]) -> VariantRaster:
        values: dict[str, Any] = {entry.name: getattr(raster, entry.name) for entry in fields(Raster)}
        values["shape"] = (raster.bands, *variant.turn.shape(raster.shape_yx))
        values["dtype"] = dtype
        return cls(source=raster, variant=variant, **values)

    def open_reader(self, blocks: BlockStore | None = None) -> RasterReader:
        return VariantReader(self.source.open_reader(blocks), self.source, self.variant, self.dtype)


class VariantReader:
    """Reads windows of a turned raster by a reader of the raster."""

    def __init__(self, reader: RasterReader, raster: Raster, variant: Variant, dtype: np.dtype[Any]) -> None:
        self._reader, self._raster, self._variant, self._dtype = reader, raster, variant, dtype
        self._missing: tuple[Window, Mask | None] | None = None

    def read(self, window: Window) -> Array:
        turn = self._variant.turn
        place = turn.source_window(window, self._raster.shape_yx)
        image = self._reader.read(place)
        # Nodata is told from the pixels as they are stored.
        missing = self._reader.read_missing(place, image)
        self._missing = (window, None if missing is None else turn.apply(missing))
        return self._variant.adjust(turn.apply(image).astype(self._dtype))

    def read_missing(self, window: Window, image: Array) -> Mask | None:  # noqa: ARG002 - the protocol's
        if self._missing is None or self._missing[0] != window:
            self.read(window)
        assert self._missing is not None
        return self._missing[1]

    def close(self) -> None:
        self._reader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneLabels:
    """The classes that count, of one scene in one variant: those of training pixels, of validation pixels, or all.

    UNLABELLED where the class is not known, where the raster holds nodata, and where the split says so.
    """

    scene: TrainingScene
    part: LabelPart
    turn: Turn = field(default_factory=Turn)

    @property
    def shape_yx(self) -> tuple[int, int]:
        return self.turn.shape(self.scene.raster.shape_yx)

    def open_reader(self) -> SceneLabelReader:
        return SceneLabelReader(self, self.scene.labels.open_reader(), self.scene.raster.open_reader())


class SceneLabelReader:
    """Reads windows of the classes that count.

    Args:
        labels: reader of the labels as they are.
        pixels: reader of the raster; None: its nodata pixels keep their class.
    """

    def __init__(self, view: SceneLabels, labels: LabelReader, pixels: RasterReader | None) -> None:
        self._view, self._reader = view, labels
        raster = view.scene.raster
        self._pixels = pixels if raster.nodata_rule.may_miss(raster.dtype) else None

    @property
    def ignored(self) -> Mapping[int, int]:
        return self._reader.ignored

    def read(self, window: Window) -> Classes:
        turn, scene = self._view.turn, self._view.scene
        place = turn.source_window(window, scene.raster.shape_yx)
        found = self._reader.read(place)
        keep: Mask | None = None
        if self._view.part == "training":
            keep = scene.find_training(place)
        elif self._view.part == "validation":
            keep = scene.find_validation(place)
        if keep is not None:
            found = np.where(keep, found, np.uint16(UNLABELLED))
        if self._pixels is not None and (found != UNLABELLED).any():
            missing = self._pixels.read_missing(place, self._pixels.read(place))
            if missing is not None:
                found = np.where(missing, np.uint16(UNLABELLED), found)
        return np.ascontiguousarray(turn.apply(found))

    def close(self) -> None:
        self._reader.close()
        if self._pixels is not None:
            self._pixels.close()
