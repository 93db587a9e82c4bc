"""What workers log: not what their command says itself."""

from __future__ import annotations

import logging

import pytest
from outsize.tiler.cluster import _is_not_said_elsewhere


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
