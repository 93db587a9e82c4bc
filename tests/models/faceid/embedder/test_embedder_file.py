"""Embedders from checkpoints: the same embeddings, one hash for each, refusals in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from outsize.models.faceid.base.errors import GalleryError, HeadError
from outsize.models.faceid.embedder.file import BACKBONE, DESCRIPTION, EmbedderDescription, load_embedder
from outsize.models.faceid.embedder.network import SmallEmbedder
from outsize.models.faceid.layer.checkpoint import save_checkpoint
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.row_rules import SGD

DESCRIBED = EmbedderDescription(architecture="small", dim=8, height=20, width=16, mean=100.0, scale=50.0)


def save(folder: Path, step: int, model: SmallEmbedder, described: bytes | None = None) -> None:
    head = ShardedMarginHead(5, 8, rule=SGD(lr=1), tablet_rows=8, block_rows=8)
    extra = {DESCRIPTION: described or DESCRIBED.to_bytes(), BACKBONE: safetensors.torch.save(model.state_dict())}
    save_checkpoint(head, folder, step, extra=extra)


def test_the_newest_or_a_named_generation_embeds_as_it_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, second = SmallEmbedder(8), SmallEmbedder(8)
    save(tmp_path / "run", 1, first)
    save(tmp_path / "run", 2, second)
    images = torch.randint(0, 256, (3, 20, 16, 3), dtype=torch.uint8)
    expected = [model.eval()((images.permute(0, 3, 1, 2).float() - 100) / 50).detach() for model in (first, second)]
    newest, older = load_embedder(tmp_path / "run"), load_embedder(tmp_path / "run" / "step-000000001")
    assert torch.equal(newest.embed(images), expected[1])
    assert torch.equal(older.embed(images), expected[0])
    assert newest.description == DESCRIBED
    assert newest.sha256 != older.sha256
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    assert load_embedder(tmp_path / "elsewhere").sha256 == newest.sha256
    scaled = EmbedderDescription(architecture="small", dim=8, height=20, width=16, mean=99.0, scale=50.0)
    save(tmp_path / "scaled", 2, second, scaled.to_bytes())
    assert load_embedder(tmp_path / "scaled").sha256 != newest.sha256


def test_what_is_no_embedder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="must be a folder that outsize face train made"):
        load_embedder(tmp_path)
    head = ShardedMarginHead(5, 8, rule=SGD(lr=1), tablet_rows=8, block_rows=8)
    save_checkpoint(head, tmp_path / "old", 1, extra={BACKBONE: b"x"})
    with pytest.raises(GalleryError, match=r"does not say how its embedder is built \(embedder\.json came later\)"):
        load_embedder(tmp_path / "old")
    save(tmp_path / "other", 1, SmallEmbedder(9))
    with pytest.raises(GalleryError, match=r"are not the weights of its embedder\.json"):
        load_embedder(tmp_path / "other")
    save(tmp_path / "damaged", 1, SmallEmbedder(8))
    weights = tmp_path / "damaged" / "step-000000001" / BACKBONE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(HeadError, match="is damaged"):
        load_embedder(tmp_path / "damaged")
    for wrong in ({"format": 2}, {"format": 1, "architecture": "x"}, [], {"format": 1}):
        with pytest.raises(HeadError):
            EmbedderDescription.from_bytes(json.dumps(wrong).encode())
    with pytest.raises(HeadError, match="above 0"):
        EmbedderDescription(architecture="small", dim=0, height=20, width=16, mean=0, scale=1)


def test_pictures_of_another_size_than_it_was_trained_with_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, SmallEmbedder(8))
    embedder = load_embedder(tmp_path / "run")
    for shape in ((2, 16, 20, 3), (2, 40, 32, 3), (2, 3, 20, 16), (20, 16, 3)):
        with pytest.raises(HeadError, match=r"images must be \(n, 20, 16, 3\), got"):
            embedder.embed(torch.zeros(shape, dtype=torch.uint8))
