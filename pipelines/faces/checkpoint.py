"""A training of faces on disk: embedder, optimiser and layer together, generation by generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ...models.faceid.base.errors import HeadError
from ...models.faceid.embedder.file import BACKBONE, DESCRIPTION, EmbedderDescription
from ...models.faceid.layer.checkpoint import MANIFEST, list_generations, load_checkpoint, save_checkpoint
from ...models.faceid.layer.head import ShardedMarginHead
from ...models.training.optimiser import load_optimiser, optimiser_tensors
from ..base.console import Console

OPTIMISER, CURSOR = "optimiser.safetensors", "cursor.json"


def save_face_training(
    head: ShardedMarginHead,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    description: EmbedderDescription,
    out: Path,
    cursor: dict[str, int],
) -> None:
    """Save what the training has come to as a new generation; called by all ranks.

    Args:
        cursor: `step`, the whole state of the order of samples, and what else is to be known of it.
    """
    extra = None
    if head.ranks.rank == 0:
        extra = {
            DESCRIPTION: description.to_bytes(),
            BACKBONE: safetensors.torch.save(model.state_dict()),
            OPTIMISER: safetensors.torch.save(optimiser_tensors(optimiser)),
            CURSOR: json.dumps(cursor).encode(),
        }
    save_checkpoint(head, out, cursor["step"], extra=extra)


def load_face_training(
    head: ShardedMarginHead, model: nn.Module, optimiser: torch.optim.Optimizer, out: Path, console: Console
) -> int:
    """Load the newest whole generation; the step to go on with, 0 where there is none. Called by all ranks. Newer ones
    that are damaged are deleted, since the training will make them again.

    Raises:
        HeadError: there are generations, and none is whole.
    """
    found = list_generations(out)
    for place, generation in enumerate(found):
        try:
            # Classes that came since are behind those that were saved.
            load_checkpoint(head, out, step=generation.step, grow=True)
            backbone, moments = generation.read_extra(BACKBONE), generation.read_extra(OPTIMISER)
            cursor = json.loads(generation.read_extra(CURSOR))
        except (HeadError, OSError) as error:
            if place + 1 == len(found):
                raise
            head.ranks.add(torch.zeros(1))  # nobody reads it any more
            if head.ranks.rank == 0:
                console.remark(f"{generation.folder} is damaged, and made again: {error}")
                # The manifest first: what is half deleted must not look complete.
                (generation.folder / MANIFEST).unlink()
                shutil.rmtree(generation.folder, ignore_errors=True)
            continue
        model.load_state_dict(safetensors.torch.load(backbone))
        load_optimiser(optimiser, safetensors.torch.load(moments))
        return int(cursor["step"])
    return 0
