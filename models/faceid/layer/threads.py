"""Threads of one rank: each works on whole tablets, with torch's own operations on one thread.

Elementwise work of one tablet then runs beside another's products, and no result depends on the number of threads, as
it would if one product were cut among them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from ....tiler.system.machine import one_thread
from ....tiler.system.process_locks import ProcessLock

_ALONE = ProcessLock()
"""Held while tablets are worked on: torch's number of threads and its precision belong to the whole process."""

Workspace = TypeVar("Workspace")
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever autocast, torch.set_float32_matmul_precision or torch.backends
    say; one caller of a process at a time."""
    # On the CPU "medium" means bfloat16 where there are instructions for it.
    kinds = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # pyright: ignore[reportAttributeAccessIssue] - set when it is imported
    with _ALONE:
        before = [kind.fp32_precision for kind in kinds]
        for kind in kinds:
            kind.fp32_precision = "ieee"
        try:
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                yield
        finally:
            for kind, value in zip(kinds, before, strict=True):
                kind.fp32_precision = value


def run_tablets(
    work: Callable[[Workspace, Item], Result], items: list[Item], workspaces: list[Workspace]
) -> list[Result]:
    """work(workspace, item) for each item, in a thread for each workspace; the results in the order of items. Callers
    from several threads take turns.

    Raises:
        whatever `work` raised first, when all threads have stopped.
    """
    results: dict[int, Result] = {}
    left, infers = deque(enumerate(items)), torch.is_inference_mode_enabled()

    def run(workspace: Workspace) -> None:
        torch.set_num_threads(1)  # of products, each calling thread has a number of its own
        with torch.inference_mode() if infers else torch.no_grad():  # of which each thread has a switch of its own
            while True:
                try:
                    place, item = left.popleft()
                except IndexError:
                    return
                try:
                    results[place] = work(workspace, item)
                except BaseException:
                    left.clear()
                    raise

    crew = workspaces[: len(items)]
    with exact_products(), one_thread():
        if len(crew) == 1:
            run(crew[0])
        elif crew:
            with ThreadPoolExecutor(len(crew), thread_name_prefix="tablets") as pool:
                futures = [pool.submit(run, workspace) for workspace in crew]
                try:
                    for future in futures:
                        future.result()
                except BaseException:  # Ctrl-C comes here, and in none of the threads
                    left.clear()
                    raise
    return [results[place] for place in range(len(items))]
