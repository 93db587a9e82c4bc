"""Rows from InsightFace's files and to safetensors shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.interchange import export_safetensors, import_insightface
from outsize.models.faceid.layer.reference import compute_dense_loss
from outsize.models.faceid.layer.row_rules import SGD, Momentum, RowRMS, RowRule
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
                "global_step": 700,
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
    assert import_insightface(head, tmp_path) == 700
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


class Layer(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())


def train_as_arcface_torch(folder: Path, weight: Tensor, ranks: int, optimiser: str = "sgd") -> tuple[Tensor, Tensor]:
    """Some steps by torch's own optimiser, saved as train_v2.py does; (rows, their momentum)."""
    rows: list[Tensor] = []
    momentum: list[Tensor] = []
    for rank, part in enumerate(weight.tensor_split(ranks)):
        backbone, layer = torch.nn.Linear(DIM, DIM), Layer(part)
        groups = [{"params": backbone.parameters()}, {"params": layer.parameters()}]
        if optimiser == "sgd":
            opt: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)
        else:
            opt = torch.optim.AdamW(groups, lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            (backbone(torch.randn(2, DIM)).sum() + (layer.weight * torch.randn_like(layer.weight)).sum()).backward()
            opt.step()
        saved = {"epoch": 1, "global_step": 3, "state_dict_softmax_fc": layer.state_dict()}
        torch.save({**saved, "state_optimizer": opt.state_dict()}, folder / f"checkpoint_gpu_{rank}.pt")
        rows.append(layer.weight.detach())
        momentum.append(opt.state[layer.weight].get("momentum_buffer", torch.zeros(())))
    return torch.cat(rows), torch.cat(momentum) if optimiser == "sgd" else torch.zeros(())


def make_head(rule: RowRule | None = None, storage: torch.dtype = torch.float32) -> ShardedMarginHead:
    return ShardedMarginHead(61, DIM, rule=rule or Momentum(lr=0.1), storage=storage, tablet_rows=8, block_rows=4)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_momentum_comes_from_the_optimiser_s_state_and_goes_on_as_torch_s(tmp_path: Path, ranks: int) -> None:
    weight, momentum = train_as_arcface_torch(tmp_path, torch.randn(61, DIM), ranks)
    head = make_head(Momentum(lr=0.1, weight_decay=5e-4))
    assert import_insightface(head, tmp_path) == 3
    assert torch.equal(head.dense_weight(), weight)
    state = torch.cat([state[: tablet.rows] for tablet, state in head.own_state()])
    assert torch.equal(state, momentum)
    # One more step, ours and torch's.
    features, labels = torch.randn(4, DIM), torch.tensor([0, 7, 30, 60])
    theirs = torch.nn.Parameter(weight.clone())
    optimiser = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimiser.state[theirs]["momentum_buffer"] = momentum.clone()
    compute_dense_loss(features, labels, theirs, head.margin, head.scale).backward()
    optimiser.step()
    head(features.requires_grad_(), labels).backward()
    assert (head.dense_weight() - theirs.detach()).abs().max() < 1e-4


def test_what_a_rule_does_not_take_is_named(tmp_path: Path) -> None:
    train_as_arcface_torch(tmp_path, torch.randn(61, DIM), 2)
    with pytest.warns(UserWarning, match="has momentum of the rows, which SGD does not take: rows go on without"):
        import_insightface(make_head(SGD(lr=0.1)), tmp_path)
    with pytest.warns(UserWarning, match="has momentum of the rows, which RowRMS"):
        import_insightface(make_head(RowRMS(lr=0.1)), tmp_path)
    train_as_arcface_torch(tmp_path, torch.randn(61, DIM), 2, "adamw")
    head = make_head()
    for _, state in head.own_state():
        state.fill_(7)  # of what the layer was before
    with pytest.warns(UserWarning, match="has exp_avg, exp_avg_sq of the rows, which Momentum does not take"):
        import_insightface(head, tmp_path)
    assert not head.state.any()


@pytest.mark.parametrize("mark", ["_", ":"])
@pytest.mark.parametrize("with_momentum", [True, False])
def test_files_of_2021_are_taken(tmp_path: Path, mark: str, with_momentum: bool) -> None:
    weight, momentum = torch.randn(61, DIM), torch.randn(61, DIM)
    for rank, (part, speed) in enumerate(zip(weight.tensor_split(4), momentum.tensor_split(4), strict=True)):
        torch.save(part.clone(), tmp_path / f"rank{mark}{rank}_softmax_weight.pt")
        if with_momentum:
            torch.save(speed.clone(), tmp_path / f"rank{mark}{rank}_softmax_weight_mom.pt")
    head = make_head()
    assert import_insightface(head, tmp_path) == 0
    assert torch.equal(head.dense_weight(), weight)
    state = torch.cat([state[: tablet.rows] for tablet, state in head.own_state()])
    assert torch.equal(state, momentum if with_momentum else torch.zeros(61, DIM))
    if with_momentum:
        (tmp_path / f"rank{mark}2_softmax_weight_mom.pt").unlink()
        with pytest.raises(HeadError, match="must all have momentum or none"):
            import_insightface(head, tmp_path)
    torch.save({"state_dict_softmax_fc": {"weight": weight}}, tmp_path / "checkpoint_gpu_0.pt")
    with pytest.raises(HeadError, match=r"one kind of files, got both checkpoint_gpu_0\.pt and rank_0_softmax"):
        import_insightface(head, tmp_path)


def test_a_layer_that_saw_all_rows_is_taken_by_its_other_name(tmp_path: Path) -> None:
    weight = torch.randn(61, DIM)
    torch.save(
        {"global_step": 3, "state_dict_softmax_fc": {"weight_activated": weight}}, tmp_path / "checkpoint_gpu_0.pt"
    )
    head = make_head()
    import_insightface(head, tmp_path)
    assert torch.equal(head.dense_weight(), weight)


@pytest.mark.parametrize("other", [{"global_step": 600}, {"epoch": 2}, {"global_step": None}])
def test_files_of_several_moments_are_refused(tmp_path: Path, other: dict[str, int | None]) -> None:
    write_insightface(tmp_path, torch.randn(61, DIM), 3)
    values = torch.load(tmp_path / "checkpoint_gpu_1.pt", weights_only=True)
    torch.save({**values, **other}, tmp_path / "checkpoint_gpu_1.pt")
    head = make_head()
    before = head.rows.clone()
    with pytest.raises(
        HeadError, match=r"one moment of one training, got checkpoint_gpu_0.pt of epoch 3 and step 700, "
    ):
        import_insightface(head, tmp_path)
    assert torch.equal(head.rows, before)


@pytest.mark.parametrize(
    ("row", "storage", "words"),
    [
        (torch.nan, torch.float32, "row 5 of .*checkpoint_gpu_1.pt, of class 36, is not finite"),
        (-torch.inf, torch.float16, "row 5 of .*checkpoint_gpu_1.pt, of class 36, is not finite"),
        (0.0, torch.float32, "row 5 of .*class 36, is zeros, which have no direction"),
        (1e7, torch.float16, "row 5 of .*class 36, goes beyond 6.55e\\+04, the largest float16; .*float32"),
        (1e-7, torch.float16, "row 5 of .*class 36, is so short that float16 loses its digits"),
    ],
)
def test_rows_that_the_layer_cannot_hold_are_named(
    tmp_path: Path, row: float, storage: torch.dtype, words: str
) -> None:
    weight = torch.randn(61, DIM)
    weight[36] *= row
    write_insightface(tmp_path, weight, 2)
    head = make_head(storage=storage)
    before = head.rows.clone()
    with pytest.raises(HeadError, match=words):
        import_insightface(head, tmp_path)
    assert torch.equal(head.rows, before)
    momentum = torch.randn(61, DIM)
    momentum[60, 3] = torch.nan
    write_insightface(tmp_path, torch.randn(61, DIM), 2, momentum)
    with pytest.raises(HeadError, match=r"momentum of row 29 of .*, of class 60, is not finite"):
        import_insightface(head, tmp_path)


def test_files_that_hold_something_else_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_gpu_0.pt"
    contents: list[Any] = [
        {"state_dict_softmax_fc": {"weight": torch.randn(61)}},
        {"state_dict_softmax_fc": {"weight": torch.ones(61, DIM, dtype=torch.int64)}},
        {"state_dict_softmax_fc": {"weight": [1.0]}},
        {"state_dict_softmax_fc": {"bias": torch.randn(61)}},
        {"state_dict_softmax_fc": Path("x")},
        {"state_dict_backbone": {}},
        [1],
        torch.randn(61),
    ]
    for content in contents:
        torch.save(content, path)
        with pytest.raises(HeadError) as refusal:
            import_insightface(make_head(), tmp_path)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(HeadError, match="it is a pipe, not a file"):
        import_insightface(make_head(), tmp_path)


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
