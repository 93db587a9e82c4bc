"""Threads of one rank: each works on whole tablets, with torch's own operations on one thread.

Elementwise work of one tablet then runs beside another's products, and no result depends on the number of threads, as
it would if one product were cut among them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ...tiler.machine import one_thread

Workspace = TypeVar("Workspace")
Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tablets(
    work: Callable[[Workspace, Item], Result], items: list[Item], workspaces: list[Workspace]
) -> list[Result]:
    """work(workspace, item) for each item, in a thread for each workspace; the results in the order of items.

    Raises:
        whatever `work` raised first, when all threads have stopped.
    """
    results: dict[int, Result] = {}
    left = deque(enumerate(items))

    def run(workspace: Workspace) -> None:
        torch.set_num_threads(1)  # of products, each calling thread has a number of its own
        with torch.no_grad():  # of which each thread has a switch of its own
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
    with one_thread():
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
