"""Ranks of torch.distributed on this machine: started, watched, ended together.

They find each other by a file and talk over the loopback interface. torchrun would do the same work, but its rendezvous
listens on every interface of the machine and unpickles what it is sent; a command that is started by torchrun is one of
its ranks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed as dist

from ...tiler.base.errors import TilerError
from ...tiler.base.registry import MODULES_VARIABLE, modules_with
from ...tiler.system.machine import die_with_parent

INTERRUPTED = 130
LOST = 75
"""A rank could not reach another one, which is the cause."""
_GOOD = (0, INTERRUPTED)
_STOPPED = (*_GOOD, LOST, -signal.SIGTERM, -signal.SIGHUP)
"""Of ranks that were asked to stop: those with nothing to save are ended by the signal, and the others lose them."""
_SETTLE_S = 1.0
"""For the others to fail, once one has: the first that is seen need not be the cause."""


_PATIENCE = timedelta(days=7)
"""That ranks wait for one that works alone; one that has died is noticed at once."""


class RankError(TilerError):
    """A rank ended early."""


class RankRefusedError(RankError):
    """What a rank refused, told as if this process did, with its exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def run_ranks(module: str, ranks: int, threads: int, folder: Path, *, places: Sequence[str] = ()) -> dict[str, Any]:
    """Run `python -m module RANK FOLDER PID`, with this process's number, for each rank; `run_as_rank` is their side.

    Returns what rank 0 wrote to FOLDER/result.json.

    Args:
        places: of registered things that the ranks need too.

    Interrupted, it asks the ranks to stop and waits for them; interrupted again, it ends them.

    Raises:
        RankError: a rank ended early; the others are ended too.
        RankRefusedError: it says why.
        KeyboardInterrupt: the ranks stopped when they were asked to.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    environment[MODULES_VARIABLE] = modules_with(*places)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        try:
            with _interrupts_held():
                for rank in range(ranks):
                    words = [sys.executable, "-P", "-m", module, str(rank), str(folder), str(os.getpid())]
                    processes.append(subprocess.Popen(words, env=environment))
            _watch(processes, folder, _GOOD)
        except KeyboardInterrupt:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            _watch(processes, folder, _STOPPED)
            raise
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return json.loads((folder / "result.json").read_text())


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back SIGINT. Processes started meanwhile inherit that, for ever: Ctrl-C in a terminal reaches them too, and
    the command alone should act, as soon as it has started all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(processes: list[subprocess.Popen[bytes]], folder: Path, good: tuple[int, ...]) -> None:
    """Wait until all have ended with good codes.

    Raises:
        RankError: one has not; the others may still run.
        KeyboardInterrupt: a rank was interrupted.
    """
    while any(process.poll() is None for process in processes):
        if any(process.returncode not in (None, *good) for process in processes):
            deadline = time.monotonic() + _SETTLE_S
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    if all(code in good for code in codes):
        if INTERRUPTED in codes:
            raise KeyboardInterrupt
        return
    # A rank that was killed is the cause of what others say of it.
    failed = [rank for rank, code in enumerate(codes) if code not in (None, *good)]
    rank = min(failed, key=lambda rank: (codes[rank] == LOST, codes[rank] or 0))
    code = codes[rank] or 0
    if code < 0:
        raise RankError(f"rank {rank} of {len(codes)} was ended by {signal.Signals(-code).name}")
    if code == LOST:
        raise RankError(f"the {len(codes)} ranks lost each other")
    if (refusal := _refusal(folder, rank)).exists():
        raise RankRefusedError(refusal.read_text(), code)
    raise RankError(f"rank {rank} of {len(codes)} ended with code {code}; what it said stands above")


def _refusal(folder: Path, rank: int) -> Path:
    return folder / f"refusal-{rank}.txt"


def run_as_rank(words: list[str], work: Callable[[dict[str, Any]], dict[str, Any] | None]) -> int:
    """Be a rank that `run_ranks` started, and leave it the result or what is refused.

    Args:
        words: RANK FOLDER PID; FOLDER/spec.json says with `ranks` how many there are.
        work: gets all that FOLDER/spec.json says, returns the result on rank 0; None: this rank has none.

    Returns:
        The exit code.
    """
    rank, folder = int(words[0]), Path(words[1])
    die_with_parent(int(words[2]))
    warnings.simplefilter("ignore")
    spec = json.loads((folder / "spec.json").read_text())
    try:
        _join_ranks(rank, spec["ranks"], folder)
        result = work(spec)
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result))
        leave_ranks()
    except KeyboardInterrupt:  # all ranks stop after the same step
        leave_ranks()
        return INTERRUPTED
    except TilerError as error:
        _refusal(folder, rank).write_text(str(error))
        return error.exit_code
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        return LOST  # another rank is gone; the command says which
    return 0


def _join_ranks(rank: int, ranks: int, folder: Path) -> None:
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=_PATIENCE
        )


def leave_ranks() -> None:
    """Wait for the others, and close what connects them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def joined_torchrun() -> Iterator[int]:
    """Be a rank of torchrun; how many of its ranks this machine has.

    Raises:
        RankError: another one has gone.
    """
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        leave_ranks()
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise RankError("the ranks lost each other; what the first that ended said is the cause") from error


def _is_loss(error: RuntimeError) -> bool:
    """Whether torch.distributed could not reach another rank."""
    return "gloo" in str(error)
