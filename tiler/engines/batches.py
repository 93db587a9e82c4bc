"""Batches: what waits to be computed, gathered by kind, so that a device works on several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

LANES = 2
"""Batches under way at once: one is computed while the next one's pixels and the last one's result are copied."""

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Gatherer(Generic[Key, Item, Result]):
    """Many threads call it with an item each; they are served together.

    Guarantee: `run` gets 1 to `size` items of one key, each item once, and is called by at most `LANES` threads at
    once. What has waited longest says which key is next, so that nothing waits for ever. A batch that is not full costs
    a device as much as a full one, so it goes only where nothing else is under way.
    """

    def __init__(self, run: Callable[[Key, Sequence[Item]], Sequence[Result]], size: int) -> None:
        self._run, self._size = run, size
        self._lock = threading.Lock()
        self._waiting: list[tuple[Key, Item, Future[Result]]] = []
        self._running = 0
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="batch")

    def __call__(self, key: Key, item: Item) -> Result:
        """The item's result; blocks until it is there.

        Raises:
            whatever `run` raised for the batch that the item was in.
        """
        ticket: Future[Result] = Future()
        with self._lock:
            self._waiting.append((key, item, ticket))
        self._pool.submit(self._serve)
        return ticket.result()

    def _take(self) -> list[tuple[Key, Item, Future[Result]]]:
        with self._lock:
            key = self._waiting[0][0] if self._waiting else None
            taken = [entry for entry in self._waiting if entry[0] == key][: self._size]
            if len(taken) < self._size and self._running:
                return []
            self._running += bool(taken)
            tickets = {id(ticket) for _, _, ticket in taken}
            self._waiting = [entry for entry in self._waiting if id(entry[2]) not in tickets]
        return taken

    def _serve(self) -> None:
        taken = self._take()
        if not taken:
            return  # others were served together with this one, or it is served when what is under way has ended
        tickets = [ticket for _, _, ticket in taken]
        try:
            served = list(zip(tickets, self._run(taken[0][0], [item for _, item, _ in taken]), strict=True))
        except BaseException as error:  # noqa: BLE001 - each caller is told
            self._end()
            for ticket in tickets:
                ticket.set_exception(error)
            return
        self._end()
        for ticket, result in served:
            ticket.set_result(result)

    def _end(self) -> None:
        with self._lock:
            self._running -= 1
            waits = bool(self._waiting)
        if waits:
            self._pool.submit(self._serve)

    def close(self) -> None:
        """Let go of the threads; what waits is served first."""
        self._pool.shutdown()
