"""Numbers as they were given: integers that no float holds exactly stay integers."""

from __future__ import annotations

from numbers import Integral, Real


def exact_number(value: Real | float) -> float:
    """A float; an integer that no float holds exactly stays one."""
    return int(value) if isinstance(value, Integral) and int(value) != float(value) else float(value)


def parse_number(text: str) -> float:
    """
    Raises:
        ValueError: no number.
    """
    try:
        return exact_number(int(text))
    except ValueError:
        return float(text)
