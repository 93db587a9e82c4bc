"""What a training of faces is told: source, embedder, layer and schedule, as plain values that all ranks share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...models.faceid.embedder.file import EmbedderDescription
from ...models.training.learning_rate import StepRate
from ...models.training.optimiser import OptimiserName
from ...sample_data.identities import PIXEL_MEAN, PIXEL_SCALE
from .roll import read_roll
from .sources import OpenedFaces, SyntheticOptions, open_faces


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceTraining:
    """What is trained, on what, and how: plain values, the same on every rank."""

    out: str
    source: str
    """synthetic:N, or the path of a folder, a .csv or .parquet list or a .rec file."""
    size: tuple[int, int] | None
    """(height, width) of the pictures; None: as the source has them."""
    resize: bool
    """Pictures of other sizes, of the same shape, are scaled."""
    held_out: int | None
    synthetic: dict[str, Any]
    """`SyntheticOptions`."""
    network: str
    dim: int
    recompute: bool
    precision: str
    augment: str
    batch: int
    """Samples of a step, of all ranks."""
    micro_batch: int
    """Samples that go through the network together; other sizes give other last bits."""
    steps: int
    optimiser: OptimiserName
    lr: float
    """Of the embedder, at its highest."""
    head_lr: float
    weight_decay: float
    clip: float
    """Largest norm of the embedder's gradient; 0: any."""
    schedule: str
    warm_up: int
    falls: tuple[float, ...]
    margin: str | tuple[float, float, float]
    margin_value: float | None
    scale: float
    sample: float
    """Share of the classes that a step sees, besides the batch's own."""
    denominator: str
    rule: str
    storage: str
    seed: int
    threads: int
    """Of each rank."""
    save_every: int
    evaluate_every: int
    """Steps; 0: at the end alone."""
    init: str | None = None
    """Weights to start from: a training's folder or a file; None: random ones."""
    grow: bool = False
    """The training that is there gets the identities and pictures that the source has by now."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FaceTraining:
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})

    @property
    def rates(self) -> StepRate:
        return StepRate(kind=self.schedule, steps=self.steps, warm_up=self.warm_up, falls=self.falls)

    def open(self) -> OpenedFaces:
        synthetic = SyntheticOptions(**self.synthetic)
        return open_faces(
            self.source,
            size=self.size,
            resize=self.resize,
            held_out=self.held_out,
            seed=self.seed,
            synthetic=synthetic,
            roll=read_roll(Path(self.out)),
        )

    def describe_embedder(self, size: tuple[int, int]) -> EmbedderDescription:
        return EmbedderDescription(
            architecture=self.network,
            dim=self.dim,
            height=size[0],
            width=size[1],
            mean=PIXEL_MEAN,
            scale=PIXEL_SCALE,
        )


def write_spec(training: FaceTraining, ranks: int, folder: Path) -> None:
    (folder / "spec.json").write_text(json.dumps({"training": asdict(training), "ranks": ranks}))
