"""What Dask logs and libraries warn of: not what a command says itself, and nothing that is not its user's."""

from __future__ import annotations

import logging
import subprocess
import sys
from itertools import permutations

import pytest
from outsize.tiler.cluster.client import _is_not_said_elsewhere
from outsize.tiler.cluster.dask_logs import errors_only


@pytest.mark.parametrize(
    ("said", "logged"),
    [
        ("Compute Failed\nKey: a\nException: \"NotFiniteError('row 3')\"\n", False),
        ("Compute Failed\nKey: a\nException: \"ZeroDivisionError('division by zero')\"\n", True),
        ("Failed to communicate with scheduler during heartbeat.", False),
        ("Connection to scheduler broken", True),
    ],
)
def test_a_refusal_is_said_once(said: str, logged: bool) -> None:
    record = logging.LogRecord("distributed.worker", logging.ERROR, __file__, 1, said, (), None)
    assert _is_not_said_elsewhere(record) is logged


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_clusters_that_overlap_are_quiet_until_the_last_has_gone(order: tuple[int, ...]) -> None:
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    logging.getLogger("distributed").addHandler(handler)
    try:
        opened = [errors_only() for _ in order]
        for each in opened:
            each.__enter__()
        for number in order:
            assert handler.level == logging.ERROR
            opened[number].__exit__(None, None, None)
        assert handler.level == logging.INFO
    finally:
        logging.getLogger("distributed").removeHandler(handler)


@pytest.mark.system
def test_warnings_of_libraries_to_their_authors_are_not_shown() -> None:
    """From wherever they come, and though Python were told to show all: -W of its command line goes first."""
    code = """
import warnings
from outsize.pipelines.commands import cli

def main():
    for category in (FutureWarning, DeprecationWarning):
        for module in ("torch", "torch.export.unflatten", "copyreg", "xarray.backends.api"):
            warnings.warn_explicit("theirs", category, "a.py", 1, module=module)
    warnings.warn_explicit("of torch itself", UserWarning, "a.py", 1, module="torch.nn")
    warnings.warn_explicit("a user's model", FutureWarning, "a.py", 1, module="torchlike.model")

cli.main = main
cli.run()
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "theirs" not in done.stderr
    assert "of torch itself" in done.stderr
    assert "a user's model" in done.stderr
