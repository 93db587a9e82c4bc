"""Rows from InsightFace's files and to safetensors shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from outsize.models.faceid.errors import HeadError
from outsize.models.faceid.head import ShardedMarginHead
from outsize.models.faceid.interchange import export_safetensors, import_insightface
from outsize.models.faceid.row_rules import SGD, Momentum
from safetensors import safe_open
from torch import Tensor

DIM = 12


def write_insightface(folder: Path, weight: Tensor, ranks: int, momentum: Tensor | None = None) -> None:
    """The layout of arcface_torch's train_v2.py and partial_fc_v2.py."""
    first = 0
    for rank in range(ranks):
        count = len(weight) // ranks + (rank < len(weight) % ranks)
        layer = {"weight": weight[first : first + count].clone()}
        if momentum is not None:
            layer["weight_mom"] = momentum[first : first + count].clone()
        torch.save(
            {
                "epoch": 3,
                "global_step": 700 + rank,
                "state_dict_backbone": {"conv1.weight": torch.zeros(3)},
                "state_dict_softmax_fc": layer,
                "state_optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            },
            folder / f"checkpoint_gpu_{rank}.pt",
        )
        first += count


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_insightfaces_rows_come_over_from_any_number_of_its_ranks(
    tmp_path: Path, ranks: int, storage: torch.dtype
) -> None:
    weight, momentum = torch.randn(61, DIM), torch.randn(61, DIM)
    write_insightface(tmp_path, weight, ranks, momentum)
    head = ShardedMarginHead(61, DIM, storage=storage, rule=Momentum(lr=0.1), tablet_rows=8, block_rows=4)
    assert import_insightface(head, tmp_path) == 700 + ranks - 1
    assert torch.equal(head.dense_weight(), weight.to(storage))
    state = torch.cat([state[: tablet.rows] for tablet, state in head.own_state()])
    assert torch.equal(state, momentum.to(storage))


def test_other_layers_and_broken_files_are_refused(tmp_path: Path) -> None:
    write_insightface(tmp_path, torch.randn(61, DIM), 3)

    def head(classes: int = 61, dim: int = DIM) -> ShardedMarginHead:
        return ShardedMarginHead(classes, dim, rule=SGD(lr=0.1), tablet_rows=8, block_rows=4)

    with pytest.raises(HeadError, match="must hold 60 rows of 12 numbers"):
        import_insightface(head(60), tmp_path)
    with pytest.raises(HeadError, match="must hold 61 rows of 11 numbers"):
        import_insightface(head(dim=11), tmp_path)
    (tmp_path / "checkpoint_gpu_1.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(HeadError, match=r"checkpoint_gpu_1\.pt must be a checkpoint"):
        import_insightface(head(), tmp_path)
    (tmp_path / "checkpoint_gpu_1.pt").unlink()
    with pytest.raises(HeadError, match=r"without a gap, \[1\] missing"):
        import_insightface(head(), tmp_path)


def test_shards_are_read_by_safetensors(tmp_path: Path) -> None:
    head = ShardedMarginHead(61, DIM, rule=SGD(lr=0.1), tablet_rows=8, block_rows=4)
    listed = export_safetensors(head, tmp_path / "out")
    index = json.loads(listed.read_text())
    parts: list[Tensor] = []
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            parts.append(file.get_tensor(name))
            assert (tmp_path / "out" / shard).stat().st_mode == listed.stat().st_mode
            assert int(file.metadata()["first_class"]) == sum(len(part) for part in parts[:-1])
    assert torch.equal(torch.cat(parts), head.dense_weight())
    assert index["metadata"]["total_size"] == 61 * DIM * 2
    assert not list((tmp_path / "out").glob(".*"))
