"""What a run does on many workers, by simulation from measured costs: tiles a second, and what is saturated first.

    python -m outsize.tests.benchmarks.scaling [--tile-s 1.6] [--store-gb-s 10]

Every tile goes through four queues: the client and the scheduler, one process each, which spend `client-ms` and
`scheduler-ms` of CPU on it; the store, of a bandwidth that all share; and its worker, which holds two tiles, so that it
reads or writes one while it computes the other. Costs vary from tile to tile by a quarter.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from dataclasses import dataclass

from ...pipelines.base.console import format_table

HELD = 2
"""Tiles that a worker reads, computes or writes at once."""
QUEUED = 4
"""Tiles that the scheduler knows of for each worker, as the client hands them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one tile, in seconds; measured by `scheduling` and `segment`."""

    client_s: float
    scheduler_s: float
    compute_s: float
    store_s: float
    """Its bytes, in and out, over the store's bandwidth."""


class Server:
    """One after the other: who comes waits until those before are done."""

    def __init__(self) -> None:
        self.free_at = self.busy_s = 0.0

    def serve(self, now: float, takes: float) -> float:
        """When it is done."""
        self.free_at = max(now, self.free_at) + takes
        self.busy_s += takes
        return self.free_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one simulated run."""

    tiles_per_s: float
    busy: dict[str, float]
    """Share of the time that each is busy; of workers, their compute."""


def simulate(workers: int, tiles: int, costs: Costs, seed: int = 0) -> Outcome:
    """Run `tiles` tiles on `workers` workers."""
    rng = random.Random(seed)
    client, scheduler, store = Server(), Server(), Server()
    computes = [Server() for _ in range(workers)]
    waiting = [0] * workers
    order = itertools.count()
    events: list[tuple[float, int, str, int]] = []

    def vary(seconds: float) -> float:
        return seconds * rng.uniform(0.75, 1.25)

    def push(at: float, what: str, worker: int) -> None:
        heapq.heappush(events, (at, next(order), what, worker))

    def hand_out(now: float, worker: int) -> None:
        """The client makes the task, the scheduler sends it to its worker."""
        push(client.serve(now, vary(costs.client_s / 2)), "made", worker)

    started = ended = 0
    held = [0] * workers
    for worker in itertools.chain.from_iterable([range(workers)] * QUEUED):
        if started < tiles:
            hand_out(0.0, worker)
            started += 1
    now = 0.0
    while events:
        now, _, what, worker = heapq.heappop(events)
        if what == "made":
            push(scheduler.serve(now, vary(costs.scheduler_s / 2)), "there", worker)
        elif what == "there":
            waiting[worker] += 1
        elif what == "read":
            push(computes[worker].serve(now, vary(costs.compute_s)), "computed", worker)
        elif what == "computed":
            push(store.serve(now, vary(costs.store_s / 4)), "written", worker)
        elif what == "written":
            held[worker] -= 1
            push(scheduler.serve(now, vary(costs.scheduler_s / 2)), "told", worker)
        elif what == "told":
            push(client.serve(now, vary(costs.client_s / 2)), "ended", worker)
        elif what == "ended":
            ended += 1
            if started < tiles:
                started += 1
                hand_out(now, worker)
        while waiting[worker] and held[worker] < HELD:
            waiting[worker] -= 1
            held[worker] += 1
            push(store.serve(now, vary(costs.store_s * 3 / 4)), "read", worker)
    assert ended == tiles
    compute = sum(server.busy_s for server in computes) / workers
    busy = {"client": client.busy_s, "scheduler": scheduler.busy_s, "store": store.busy_s, "workers": compute}
    return Outcome(tiles_per_s=tiles / now, busy={name: seconds / now for name, seconds in busy.items()})


def main() -> None:
    """Print a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile-s", type=float, default=1.6, help="a worker's seconds for one tile")
    parser.add_argument("--tile-mpx", type=float, default=4.19, help="pixels of a tile's core, in millions")
    parser.add_argument("--client-ms", type=float, default=1.5)
    parser.add_argument("--scheduler-ms", type=float, default=1.9)
    parser.add_argument("--bytes-per-pixel", type=float, default=4.7, help="read and written, compressed, with halos")
    parser.add_argument("--store-gb-s", type=float, default=10.0, help="bandwidth of the store for all")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 300, 1000, 3000])
    options = parser.parse_args()
    costs = Costs(
        client_s=options.client_ms / 1000,
        scheduler_s=options.scheduler_ms / 1000,
        compute_s=options.tile_s,
        store_s=options.tile_mpx * options.bytes_per_pixel / 1000 / options.store_gb_s,
    )
    rows: list[list[str]] = []
    for workers in options.workers:
        outcome = simulate(workers, max(2000, 60 * workers), costs)
        first = max(outcome.busy, key=lambda name: outcome.busy[name])
        mpx = outcome.tiles_per_s * options.tile_mpx
        rows.append(
            [
                f"{workers:,}",
                f"{outcome.tiles_per_s:.1f}",
                f"{mpx:,.0f}",
                f"{outcome.tiles_per_s * options.tile_s / workers:.2f}",
                *(f"{100 * outcome.busy[name]:.0f} %" for name in ("client", "scheduler", "store", "workers")),
                first,
                f"{1e9 / mpx / 86400:,.1f}",
            ]
        )
    header = ["workers", "tiles/s", "Mpx/s", "efficiency", "client", "scheduler", "store", "workers", "first"]
    print(format_table([*header, "days a petapixel"], rows))


if __name__ == "__main__":
    main()
