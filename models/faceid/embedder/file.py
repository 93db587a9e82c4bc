"""What an embedder is: architecture, size and scaling of its images, weights; and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ....tiler.base.text import first_line
from ..base.errors import GalleryError, HeadError
from ..layer.checkpoint import Generation, list_generations
from .iresnet import DEPTHS, REDUCTION, WIDTHS, IResNet
from .network import SmallEmbedder

BACKBONE, DESCRIPTION = "backbone.safetensors", "embedder.json"
FORMAT = 1
ARCHITECTURES = ("small", *DEPTHS)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderDescription:
    """What is needed beside the weights to make the embeddings that were trained."""

    architecture: str
    dim: int
    height: int
    """Of its images, in pixels."""
    width: int
    mean: float
    """A pixel p of 0 ... 255 becomes (p - mean) / scale; channels are red, green, blue."""
    scale: float

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise HeadError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        if min(self.dim, self.height, self.width) < 1 or not self.scale > 0:
            raise HeadError(f"dim, height, width and scale must be above 0, got {self}")
        if self.architecture == "small" and min(self.height, self.width) < REDUCTION:
            raise HeadError(f"pictures must be {REDUCTION} x {REDUCTION} or larger, got {self.height} x {self.width}")

    def to_bytes(self) -> bytes:
        """As it is saved with a checkpoint."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True).encode()

    def build(self, *, recompute: bool = False) -> nn.Module:
        """The network, with first weights of torch's generator.

        Args:
            recompute: of an iResNet, for its training: memory of one block's activations, a third more work.

        Raises:
            HeadError: pictures of a size that it does not take.
        """
        if self.architecture == "small":
            return SmallEmbedder(self.dim)
        return IResNet(self.architecture, self.dim, self.height, self.width, recompute=recompute)

    @property
    def activation_bytes(self) -> int:
        """Of the first stage for one picture, which is the largest: at most what a forward pass holds at once."""
        channels = 24 if self.architecture == "small" else WIDTHS[0]
        return 8 * channels * self.height * self.width * 4

    @classmethod
    def from_bytes(cls, value: bytes) -> EmbedderDescription:
        """Raises:
        HeadError: it is no description, or another version's.
        """
        try:
            fields = json.loads(value)
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HeadError(f"{DESCRIPTION} must describe an embedder in format {FORMAT}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """A trained embedder."""

    model: nn.Module
    description: EmbedderDescription
    sha256: str
    """Of description and weights: two embedders of one hash make the same embeddings."""
    source: str
    """Where it was found."""

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(n, height, width, 3) of 0 ... 255 -> (n, dim), not of length 1.

        Raises:
            HeadError: pictures of another size, or in another order of axes.
        """
        wanted = (self.description.height, self.description.width, 3)
        if tuple(images.shape[1:]) != wanted:
            raise HeadError(f"images must be (n, {', '.join(map(str, wanted))}), got {tuple(images.shape)}")
        scaled = (images.permute(0, 3, 1, 2).float() - self.description.mean) / self.description.scale
        return self.model(scaled)

    def plan_bytes(self, batch: int) -> int:
        """Of embedding so many images: weights, and tensors of the first stage, which are the largest."""
        weights = sum(p.numel() for p in self.model.parameters()) * 4
        return 2 * weights + batch * self.description.activation_bytes


def load_embedder(run: str | Path) -> Embedder:
    """The embedder of a training's folder (the newest generation), or of one of its generations.

    Raises:
        GalleryError: no training, a damaged one, or one from before descriptions were saved.
    """
    root = Path(run)
    generations = [g for g in list_generations(root.parent) if g.folder.name == root.name and root.is_dir()]
    generations = list_generations(root) or generations
    if not generations:
        raise GalleryError(
            f"{root} must be a folder that outsize face train made, or one of its generations, got no whole generation"
        )
    newest = generations[0]
    if DESCRIPTION not in newest.manifest["extra"]:
        raise GalleryError(
            f"{newest.folder} does not say how its embedder is built ({DESCRIPTION} came later); train it again"
        )
    return _load(newest)


def _load(generation: Generation) -> Embedder:
    described, weights = generation.read_extra(DESCRIPTION), generation.read_extra(BACKBONE)
    description = EmbedderDescription.from_bytes(described)
    try:
        model = description.build()
        model.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, safetensors.SafetensorError) as error:
        first = first_line(error)
        raise GalleryError(
            f"{generation.folder / BACKBONE} are not the weights of its {DESCRIPTION}: {first}"
        ) from error
    return Embedder(
        model=model.eval(),
        description=description,
        sha256=hashlib.sha256(description.to_bytes() + b"\0" + weights).hexdigest(),
        source=str(generation.folder),
    )
