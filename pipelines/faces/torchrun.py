"""Ranks that the user's torchrun started: what this process learns from its variables, and refuses as one of them."""

from __future__ import annotations

import os

from ...tiler.base.errors import UsageError


def is_started_by_torchrun() -> bool:
    """Whether this process is a rank of torchrun, or of anything that sets its variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def refuse_torchrun(command: str) -> None:
    """For commands that are called once: of several ranks the first says so, the others end without a word.

    Raises:
        UsageError: on the first rank.
        SystemExit: on the others.
    """
    if is_started_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        _refuse(
            f"face {command} must be called once, got {os.environ['WORLD_SIZE']} ranks of torchrun; call outsize face "
            f"{command} without torchrun"
        )


def require_torchrun_ranks(ranks: int) -> None:
    """For commands that could start ranks of their own: their number is torchrun's here.

    Raises:
        UsageError: on the first rank, if another number is asked for.
        SystemExit: on the others.
    """
    if ranks not in (1, int(os.environ["WORLD_SIZE"])):
        _refuse(f"torchrun started {os.environ['WORLD_SIZE']} ranks, --ranks asks for {ranks}; leave --ranks out")


def _refuse(reason: str) -> None:
    if int(os.environ["RANK"]) > 0:
        raise SystemExit(0)
    raise UsageError(reason)
