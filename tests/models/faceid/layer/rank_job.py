"""What the ranks of a test run: python rank_job.py RANKS:FOLDER..., with the cases in FOLDER/cases.json.

Each rank is a process of its own, forked when torch is imported.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from outsize.models.faceid.layer.checkpoint import load_checkpoint, save_checkpoint
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.row_rules import RULES
from outsize.tiler.system.process_end import end_with
from torch import Tensor
from torch import distributed as dist

DIM = 12


def make_batches(classes: int, samples: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The same global batches whoever asks."""
    generator = torch.Generator().manual_seed(5)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        features = torch.randn((samples, DIM), generator=generator, dtype=torch.float64)
        labels = torch.randint(-1, classes, (samples,), generator=generator)
        labels[0] = labels[-1] = classes - 1  # one class twice, at both ends of the batch
        found.append((features, labels))
    return found


def run_case(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """A few steps on this rank's part of the batches."""
    head = ShardedMarginHead(
        case["classes"],
        DIM,
        storage=getattr(torch, case["storage"]),
        rule=RULES[case["rule"]](lr=case["lr"]),
        tablet_rows=8,
        block_rows=4,
        strip_rows=2,
        sample=case.get("sample", 1.0),
        denominator=case.get("denominator", "corrected"),
        ddp_scale=case.get("ddp_scale", False),
        seed=99 if "load" in case else 0,
    )
    done = load_checkpoint(head, case["load"]).step if "load" in case else 0
    result: dict[str, Any] = {"losses": [], "gradients": [], "skipped": [], "first": head.dense_weight().clone()}
    first = sum(case["split"][:rank])
    mine = slice(first, first + case["split"][rank])
    for number, (features, labels) in enumerate(make_batches(case["classes"], sum(case["split"]), 3)[done:], done + 1):
        if "poison" in case:
            features[case["poison"], 0] = torch.nan
        x = features[mine].clone().requires_grad_()
        loss = head(x, labels[mine])
        loss.backward()
        assert x.grad is not None
        result["losses"].append(float(loss.detach()))
        result["gradients"].append(x.grad)
        result["skipped"].append(head.skipped)
        if "save" in case and number == 1:
            save_checkpoint(head, case["save"], number)
    result["weight"] = head.dense_weight().clone()
    return result


def main(rank: int, ranks: int, folder: Path) -> None:
    """All cases, one after the other; results into a file."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    cases = json.loads((folder / "cases.json").read_text())
    torch.save({name: run_case(rank, case) for name, case in cases.items()}, folder / f"{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def run_ranks(ranks: int, folder: Path) -> None:
    """All ranks, until they have ended."""
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            end_with(partial(main, rank, ranks, folder))
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(statuses):
        sys.exit(f"a rank of {ranks} ended badly")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for job in sys.argv[1:]:
        count, _, place = job.partition(":")
        run_ranks(int(count), Path(place))
