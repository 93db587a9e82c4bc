"""Differences of descriptions in words."""

from __future__ import annotations

from outsize.tiler.base.differences import say_differences, shorten


def test_what_differs_is_said_by_name_and_what_is_left_out_is_not() -> None:
    there, now = {"a_b": 1, "same": [1], "gone": "x", "no": 1}, {"a_b": 2, "same": [1], "new": True, "no": 2}
    assert say_differences(there, now, repr, left_out={"no"}) == [
        "a b 1 there, 2 now",
        "gone 'x' there, None now",
        "new None there, True now",
    ]
    assert say_differences(there, dict(there), repr) == []


def test_texts_are_cut_only_where_they_are_too_long() -> None:
    assert [shorten("abcdefgh", most) for most in (9, 8, 7)] == ["abcdefgh", "abcdefgh", "abcd..."]
