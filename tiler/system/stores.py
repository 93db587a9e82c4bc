"""What zarr opens: a folder of this machine, or a store of objects."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from pathlib import Path

import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore

from .files import MOST_TEXT
from .places import STORE_OPTIONS, is_remote, scheme_of
from .plain_file import NO_FILE, require_at_most

STORE_TIMEOUT_S = 600
"""For one call of Zarr's on an object store, with all its requests and retries."""


def store_at(place: Path, *, read_only: bool = False) -> str | Store:
    """What zarr opens: a folder, or a store of objects."""
    if not is_remote(place):
        if not read_only:
            return str(place)
        return PlainFiles(place, read_only=True)

    # Some waits of the libraries below have no limit of their own.
    zarr.config.set({"async.timeout": STORE_TIMEOUT_S})
    options = STORE_OPTIONS.get(scheme_of(str(place)), {})
    return FsspecStore.from_url(str(place), storage_options=options, read_only=read_only)


class PlainFiles(LocalStore):
    """A store of files of this machine; what is no file but a pipe or a device is not waited for.

    Args:
        most: bytes that a chunk's file may have; None: any.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False, most: int | None = None) -> None:
        super().__init__(root, read_only=read_only)
        self.most = most

    def with_read_only(self, read_only: bool = False) -> PlainFiles:
        return type(self)(self.root, read_only=read_only, most=self.most)

    def _require(self, key: str, byte_range: ByteRequest | None) -> None:
        path = self.root / key
        try:
            status = path.stat()
        except OSError:
            return  # zarr says what that means
        if stat.S_ISDIR(status.st_mode):
            return
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, NO_FILE, str(path))
        most = MOST_TEXT if path.name.startswith(".z") or path.name == "zarr.json" else self.most
        size = status.st_size
        if isinstance(byte_range, RangeByteRequest):
            size = min(size, byte_range.end) - byte_range.start
        elif isinstance(byte_range, SuffixByteRequest):
            size = min(size, byte_range.suffix)
        require_at_most(path, size, most)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self._require(key, byte_range)
        return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        asked = list(key_ranges)
        for key, byte_range in asked:
            self._require(key, byte_range)
        return await super().get_partial_values(prototype, asked)
