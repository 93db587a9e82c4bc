"""Training an embedder through the sharded head on synthetic identities: the loop of one rank."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..models.faceid.checkpoint import list_generations, load_checkpoint, save_checkpoint
from ..models.faceid.embedder import SmallEmbedder
from ..models.faceid.embedder_file import BACKBONE, DESCRIPTION, EmbedderDescription
from ..models.faceid.head import ShardedMarginHead
from ..models.faceid.row_rules import RULES
from ..sample_data.identities import PIXEL_MEAN, PIXEL_SCALE, SIZE, make_batch

OPTIMISER = "optimiser.safetensors"
HELD_OUT = 500
"""Identities that are never trained on, for rank-1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """What every rank of a training does."""

    out: str
    identities: int
    dim: int
    batch: int
    """Of all ranks."""
    ranks: int
    threads: int
    steps: int
    lr: float
    """Of the embedder, at its highest; warmed up over a twentieth of the steps, then a cosine down to zero."""
    head_lr: float
    rule: str
    margin: str
    scale: float
    storage: str
    save_every: int
    seed: int


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Share of the highest rate at a step, counted from 0."""
    warm = max(1, spec.steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, spec.steps - warm)))


def draw_batch(spec: TrainSpec, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's share of a step's images and labels: a function of seed and step, whatever the ranks."""
    random = np.random.Generator(np.random.Philox(key=[spec.seed, 7], counter=[step, 0, 0, 0]))
    labels = random.integers(0, spec.identities, spec.batch)
    samples = random.integers(0, 1 << 40, spec.batch)
    share = slice(rank * spec.batch // spec.ranks, (rank + 1) * spec.batch // spec.ranks)
    images = make_batch(spec.seed, labels[share], samples[share])
    return torch.from_numpy(images), torch.from_numpy(labels[share])


@torch.no_grad()
def measure_rank_1(model: nn.Module, spec: TrainSpec) -> float:
    """Share of identities never trained on whose second picture is nearest to their first."""
    identities = np.arange(spec.identities, spec.identities + HELD_OUT)
    views = [
        F.normalize(model(torch.from_numpy(make_batch(spec.seed, identities, np.full(HELD_OUT, sample)))))
        for sample in (0, 1)
    ]
    nearest = (views[1] @ views[0].T).argmax(dim=1)
    return float((nearest == torch.arange(HELD_OUT)).double().mean())


def run_rank(rank: int, spec: TrainSpec, folder: Path) -> None:
    """One rank: resume from the newest whole generation, train, save, measure."""
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    if spec.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=spec.ranks)
    embedder = SmallEmbedder(spec.dim)
    model = DistributedDataParallel(embedder) if spec.ranks > 1 else embedder
    head = ShardedMarginHead(
        spec.identities,
        spec.dim,
        margin=spec.margin,
        scale=spec.scale,
        storage=getattr(torch, spec.storage),
        rule=RULES[spec.rule](lr=spec.head_lr),
        seed=spec.seed,
        ddp_scale=spec.ranks > 1,
    )
    assert head.rule is not None
    optimiser = torch.optim.AdamW(embedder.parameters(), lr=spec.lr, weight_decay=0.05)
    first = _resume(spec, embedder, head, optimiser)
    began, losses = time.perf_counter(), list[float]()
    for step in range(first, spec.steps):
        share = learning_rate(spec, step)
        optimiser.param_groups[0]["lr"], head.rule.lr = spec.lr * share, spec.head_lr * share
        images, labels = draw_batch(spec, step, rank)
        loss = head(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        if not head.skipped:
            nn.utils.clip_grad_norm_(embedder.parameters(), 5.0)
            optimiser.step()
        losses = [*losses[-49:], float(loss.detach())]
        done = step + 1
        if rank == 0:
            entry = {"step": done, "loss": losses[-1], "lr": spec.lr * share, "skipped": head.skipped}
            with Path(spec.out, "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
        if rank == 0 and (done % max(1, spec.steps // 20) == 0 or done == spec.steps):
            speed = (done - first) * spec.batch / (time.perf_counter() - began)
            mean, left = sum(losses) / len(losses), (spec.steps - done) * spec.batch / speed
            line = f"step {done} of {spec.steps}: loss {mean:.3f}, {speed:.0f} images/s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
        if done % spec.save_every == 0 or done == spec.steps:
            save_checkpoint(head, spec.out, done, extra=_pack(spec, embedder, optimiser) if rank == 0 else None)
    if rank == 0:
        result = {
            "loss": sum(losses) / max(1, len(losses)),
            "rank_1": measure_rank_1(embedder, spec),
            "first_step": first,
        }
        (folder / "result.json").write_text(json.dumps(result))
    if spec.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _pack(spec: TrainSpec, embedder: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, bytes]:
    moments = {
        f"{index}.{name}": cast("Tensor", value)
        for index, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
    }
    description = EmbedderDescription(
        architecture="small", dim=spec.dim, height=SIZE, width=SIZE, mean=PIXEL_MEAN, scale=PIXEL_SCALE
    )
    return {
        DESCRIPTION: description.to_bytes(),
        BACKBONE: safetensors.torch.save(embedder.state_dict()),
        OPTIMISER: safetensors.torch.save(moments),
    }


def _resume(spec: TrainSpec, embedder: nn.Module, head: ShardedMarginHead, optimiser: torch.optim.Optimizer) -> int:
    """Load the newest whole generation of this training; the step to go on with."""
    if not list_generations(spec.out):
        return 0
    generation = load_checkpoint(head, spec.out)
    embedder.load_state_dict(safetensors.torch.load(generation.read_extra(BACKBONE)))
    values: dict[str, Any] = optimiser.state_dict()
    for key, value in safetensors.torch.load(generation.read_extra(OPTIMISER)).items():
        index, _, name = key.partition(".")
        values["state"].setdefault(int(index), {})[name] = value
    optimiser.load_state_dict(values)
    return generation.step


def write_spec(spec: TrainSpec, folder: Path) -> None:
    (folder / "spec.json").write_text(json.dumps(asdict(spec)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = Path(sys.argv[2])
    run_rank(int(sys.argv[1]), TrainSpec(**json.loads((place / "spec.json").read_text())), place)
