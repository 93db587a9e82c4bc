"""What is trained, on what, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...models.segmentation.networks.meaning import Task
from ...models.segmentation.networks.unet import Norm
from ...models.segmentation.training.recipe import Recipe
from ...tiler.labels.labels import LabelOptions
from ...tiler.rasters.raster import ReadOptions
from ..segment.model import SourceOptions
from .workers import WorkerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What is trained, on what, and how."""

    scenes: tuple[str, ...]
    labels: tuple[str, ...]
    """One for each scene, or one vector file for all."""
    out: Path
    recipe: Recipe
    reading: ReadOptions = field(default_factory=ReadOptions)
    label_options: LabelOptions = field(default_factory=LabelOptions)
    classes: tuple[str, ...] = ()
    """NAME or NAME=#RRGGBB; empty: those of the model, or of the labels."""
    task: Task | None = None
    """Of a new network; None: multiclass."""
    balanced: bool = False
    """Weights of classes follow from their number of pixels."""
    validation: float = 0.2
    validate_on: tuple[str, ...] = ()
    """Scenes, of `scenes`, that are held out."""
    block: int | None = None
    validate_every: int = 100
    """Steps."""
    core: int | None = None
    """Side of cores in pixels; None: chosen from the memory."""
    memory: str = "2GB"
    model: SourceOptions | None = None
    """Where the training starts; None: a new UNet."""
    widths: tuple[int, ...] = (16, 32, 64, 128)
    norm: Norm = "frozen"
    overwrite: bool = False
    workers: WorkerOptions = field(default_factory=WorkerOptions)
