"""Sizes as people write them."""

from __future__ import annotations

import pytest
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.text import format_bytes, parse_bytes


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
