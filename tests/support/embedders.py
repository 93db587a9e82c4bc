"""An embedder that nothing has trained, saved as `face train` saves one."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from outsize.models.faceid.embedder.file import BACKBONE, DESCRIPTION, EmbedderDescription
from outsize.models.faceid.embedder.network import SmallEmbedder
from outsize.models.faceid.layer.checkpoint import save_checkpoint
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.row_rules import SGD
from outsize.sample_data.identities import PIXEL_MEAN, PIXEL_SCALE, SIZE

DIM = 32
"""Numbers of its embeddings."""


def make_embedder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    described = EmbedderDescription(
        architecture="small", dim=DIM, height=SIZE, width=SIZE, mean=PIXEL_MEAN, scale=PIXEL_SCALE
    )
    weights = safetensors.torch.save(SmallEmbedder(DIM).state_dict())
    head = ShardedMarginHead(5, DIM, rule=SGD(lr=1), tablet_rows=8, block_rows=8)
    save_checkpoint(head, folder, 1, extra={DESCRIPTION: described.to_bytes(), BACKBONE: weights})
