"""Row rules and roundings compared: loss and rank-1 after training on synthetic identities.

python -m outsize.tests.benchmarks.row_rules [--identities 100000] [--steps 1000]

Features are noisy copies of fixed random directions, one for each identity, through a linear embedder that is trained
with the rows: small enough to compare many rules, large enough that most rows see no sample of their own for long.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.faceid.layer import margin_softmax
from ...models.faceid.layer.head import ShardedMarginHead
from ...models.faceid.layer.rounding import round_stochastic
from ...models.faceid.layer.row_rules import SGD, Momentum, RowRMS, RowRule
from ...tiler.system.machine import cpu_count

DIM, INPUTS, BATCH, PROBES = 64, 128, 512, 2000
NOISE = 0.8
RATES: dict[str, list[RowRule]] = {
    "SGD": [SGD(lr=lr) for lr in (100.0, 400.0)],
    "momentum": [Momentum(lr=lr) for lr in (10.0, 40.0)],
    "row RMS": [RowRMS(lr=lr) for lr in (0.3, 1.0)],
}
"""Highest learning rates, from a search with a tenth of the identities and as many looks at each."""


def round_nearest(values: Tensor, out: Tensor, *unused: object) -> None:
    """What the type's own conversion does."""
    del unused
    out.copy_(values.view_as(out))


def draw(identities: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """(n, INPUTS): noisy looks at identities, whose directions are a function of their number."""
    directions = torch.stack([torch.randn(INPUTS, generator=torch.Generator().manual_seed(int(i))) for i in identities])
    return directions + noise * torch.randn(directions.shape, generator=generator)


def train(rule: RowRule, storage: torch.dtype, identities: int, steps: int) -> tuple[float, float, float]:
    """(mean loss of the last tenth, rank-1 against the rows, seconds)."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    embedder = nn.Linear(INPUTS, DIM)
    head = ShardedMarginHead(identities, DIM, margin="cosface", scale=32.0, storage=storage, rule=rule)
    optimiser = torch.optim.SGD(embedder.parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []
    began, highest = time.perf_counter(), rule.lr
    for step in range(steps):
        rule.lr = highest * min(1.0, (step + 1) / 100) * (1 - step / steps)
        labels = torch.randint(0, identities, (BATCH,), generator=generator)
        loss = head(embedder(draw(labels, NOISE, generator)), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(embedder.parameters(), 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    probes = torch.randint(0, identities, (PROBES,), generator=generator)
    with torch.no_grad():
        found = F.normalize(embedder(draw(probes, NOISE, generator)))
        rows = F.normalize(head.dense_weight().float())
        hits = float(((found @ rows.T).argmax(dim=1) == probes).double().mean())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail), hits, time.perf_counter() - began


def main() -> None:
    """Print one row for each rule and rate with float32 rows, and at the rate of the lowest loss for float16 rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--identities", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(cpu_count())
    print("| rule | rows | rounding | loss | rank-1 | time |\n|---|---|---|---|---|---|")

    def run(name: str, rule: RowRule, storage: torch.dtype, rounding: str) -> float:
        margin_softmax.round_stochastic = round_nearest if rounding == "nearest" else round_stochastic
        lr = rule.lr
        loss, hits, seconds = train(rule, storage, options.identities, options.steps)
        rule.lr = lr
        kind = str(storage).removeprefix("torch.")
        print(
            f"| {name}, lr {lr:g} | {kind} | {rounding} | {loss:.3f} | {100 * hits:.1f} % | {seconds:.0f} s |",
            flush=True,
        )
        return loss

    for name, rules in RATES.items():
        best = min(rules, key=lambda rule: run(name, rule, torch.float32, "none"))
        for rounding in ("stochastic", "nearest"):
            run(name, best, torch.float16, rounding)


if __name__ == "__main__":
    main()
