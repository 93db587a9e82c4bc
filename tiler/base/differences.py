"""Differences between two descriptions, in words: of what lies there, and of what is wanted now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any


def say_differences(
    there: Mapping[str, Any], now: Mapping[str, Any], say: Callable[[Any], str], *, left_out: Collection[str] = ()
) -> list[str]:
    """One phrase for each entry that differs, by name: "norm batch there, frozen now".

    An entry that one side lacks is None there.

    Args:
        say: a value in words.
        left_out: names that are not compared.
    """
    return [
        f"{name.replace('_', ' ')} {say(there.get(name))} there, {say(now.get(name))} now"
        for name in sorted({*there, *now})
        if name not in left_out and there.get(name) != now.get(name)
    ]


def shorten(text: str, most: int) -> str:
    """A text of at most `most` characters, the end of a longer one replaced by dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
