"""Sizes as people write them, and what errors say in one line."""

from __future__ import annotations

import errno

import pytest
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.text import first_line, format_bytes, last_line, parse_bytes, reason_of


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("300mb", 3 * 10**8), ("12", 12), (77, 77), ("1TiB", 2**40)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "two GB", "1.2.3GB", "-1GB", "5 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must look like 2GB"):
        parse_bytes(text)


def test_sizes_are_written_for_people() -> None:
    assert [format_bytes(v) for v in (1_340_000_000, 98_400_000, 2_000)] == ["1.34 GB", "98 MB", "2 kB"]


def test_errors_are_told_by_their_first_line_or_by_their_type() -> None:
    assert first_line(ValueError("\n  a fault \nwith details")) == "a fault "
    assert first_line(KeyError("name\nmore")) == r"'name\nmore'"
    assert [first_line(ValueError(said)) for said in ("", " \n")] == ["ValueError"] * 2
    assert first_line(ValueError(), "") == ""


def test_errors_of_the_system_are_told_without_number_and_path() -> None:
    assert reason_of(FileNotFoundError(errno.ENOENT, "No such file", "/a/b")) == "No such file"
    assert reason_of(OSError("it ended\nearly")) == "it ended"
    assert reason_of(OSError()) == "OSError"


def test_a_process_is_told_by_its_last_line() -> None:
    traceback = "Traceback (most recent call last):\n  File ...\nValueError: no\n\n"
    assert last_line(traceback, "killed") == last_line(traceback.encode(), "killed") == "ValueError: no"
    assert last_line(b"\xff\n", "killed") == "\N{REPLACEMENT CHARACTER}"
    assert last_line("", "killed") == last_line(b" \n", "killed") == "killed"
