"""Any number of ranks: gloo processes against the dense layer, and bitwise against each other."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.margins import Margin
from outsize.models.faceid.layer.reference import compute_dense_loss
from outsize.models.faceid.layer.row_rules import RULES, SGD
from torch import Tensor

from . import rank_job
from .rank_job import DIM, make_batches

pytestmark = pytest.mark.system

Results = dict[str, list[dict[str, Any]]]
"""By case, of each rank."""

EXACT = {"storage": "float64", "rule": "sgd", "lr": 0.5}
SPLITS = {1: [12], 2: [5, 7], 3: [12, 0, 0], 4: [3, 3, 3, 3]}
"""One batch of 12 samples, held by ranks in parts."""
HALF: dict[str, dict[str, Any]] = {
    rule: {"classes": 61, "storage": "float16", "rule": rule, "lr": 0.01 if rule == "rms" else 0.5} for rule in RULES
}
HALF |= {
    "sampled": {**HALF["rms"], "sample": 0.5},
    "sampled as Partial FC": {**HALF["momentum"], "sample": 0.25, "denominator": "pfc"},
}
DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "uneven": (2, {"classes": 37, "split": [4, 5], **EXACT}),
    "ranks without samples": (3, {"classes": 37, "split": [0, 9, 0], **EXACT}),
    "ranks without classes": (4, {"classes": 11, "split": [1, 2, 3, 3], **EXACT}),
    "fewer classes than a tablet": (2, {"classes": 5, "split": [9, 0], **EXACT}),
}
OTHERS = {
    "poisoned": {"classes": 37, "split": [4, 5], **EXACT, "poison": 7},
    "plain": {"classes": 37, "split": [4, 5], **EXACT, "lr": 0.0},
    "scaled": {"classes": 37, "split": [4, 5], **EXACT, "lr": 0.0, "ddp_scale": True},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    """Of 1, 2, 3 and 4 ranks, each with all cases that it has."""
    saved, folder = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("ranks")
    cases: dict[int, dict[str, Any]] = {}
    for ranks in (2, 1, 3, 4):  # what 2 save, the others load
        split = SPLITS[ranks]
        verb = "save" if ranks == 2 else "load"
        cases[ranks] = {
            **{name: {**case, "split": split} for name, case in HALF.items()},
            **{name: case for name, (count, case) in DENSE.items() if count == ranks},
            **(OTHERS if ranks == 2 else {}),
            **{f"{verb} {name}": {**case, "split": split, verb: str(saved / name)} for name, case in HALF.items()},
        }
        (folder / str(ranks)).mkdir()
        (folder / str(ranks) / "cases.json").write_text(json.dumps(cases[ranks]))
    jobs = [f"{ranks}:{folder / str(ranks)}" for ranks in cases]
    command = [sys.executable, "-W", "ignore", rank_job.__file__, *jobs]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[int, Results] = {}
    for ranks, names in cases.items():
        of_ranks = [torch.load(folder / str(ranks) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
        found[ranks] = {name: [of_rank[name] for of_rank in of_ranks] for name in names}
    return found


def run_dense(case: dict[str, Any]) -> tuple[list[float], list[Tensor], Tensor]:
    """Losses, feature gradients and the last rows of the dense layer with SGD."""
    head = ShardedMarginHead(case["classes"], DIM, storage=torch.float64, rule=SGD(lr=0.5), tablet_rows=8, block_rows=4)
    weight = head.dense_weight().clone()
    losses, gradients = [], []
    for features, labels in make_batches(case["classes"], sum(case["split"]), 3):
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = compute_dense_loss(x, labels, w, Margin(m2=0.5), 64.0)
        loss.backward()
        assert x.grad is not None
        assert w.grad is not None
        losses.append(float(loss.detach()))
        gradients.append(x.grad)
        weight = weight - 0.5 * w.grad
    return losses, gradients, weight


@pytest.mark.parametrize("name", DENSE)
def test_ranks_are_the_dense_layer(results: dict[int, Results], name: str) -> None:
    ranks, case = DENSE[name]
    losses, gradients, weight = run_dense(case)
    for step, loss in enumerate(losses):
        for result in results[ranks][name]:
            assert abs(result["losses"][step] - loss) < 1e-10
        joined = torch.cat([result["gradients"][step] for result in results[ranks][name]])
        assert (joined - gradients[step]).abs().max() < 1e-10
    for result in results[ranks][name]:
        assert (result["weight"] - weight).abs().max() < 1e-10


@pytest.mark.parametrize("name", HALF)
def test_loss_rows_and_gradients_are_bitwise_equal_for_any_number_of_ranks(
    results: dict[int, Results], name: str
) -> None:
    """Half precision, stochastic rounding, sums over tablets and all."""
    alone = results[1][name][0]
    assert len(set(alone["losses"])) == 3
    assert not torch.equal(alone["weight"], alone["first"])
    for ranks in (2, 3, 4):
        for result in results[ranks][name]:
            assert result["losses"] == alone["losses"]
            assert torch.equal(result["weight"], alone["weight"])
        for step, expected in enumerate(alone["gradients"]):
            joined = torch.cat([result["gradients"][step] for result in results[ranks][name]])
            assert torch.equal(joined, expected)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_what_two_ranks_saved_goes_on_with_the_same_bits_on_others(
    results: dict[int, Results], name: str, ranks: int
) -> None:
    saver = results[2][f"save {name}"][0]
    for result in results[ranks][f"load {name}"]:
        assert result["losses"] == saver["losses"][1:]
        assert torch.equal(result["weight"], saver["weight"])
        assert not torch.equal(result["first"], saver["first"])


def test_all_ranks_skip_what_is_not_finite_on_one(results: dict[int, Results]) -> None:
    for result in results[2]["poisoned"]:
        assert result["skipped"] == [True] * 3
        assert not any(gradient.any() for gradient in result["gradients"])
        assert torch.equal(result["weight"], result["first"])


def test_ddp_scale_undoes_averaging(results: dict[int, Results]) -> None:
    for plain, scaled in zip(results[2]["plain"], results[2]["scaled"], strict=True):
        assert torch.equal(2 * plain["gradients"][0], scaled["gradients"][0])
