"""Zarr arrays of others, held to what they declare: codecs that are known, chunks that decode to their own size and no
more, plain files."""

from __future__ import annotations

import asyncio
import bz2
import lzma
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, cast

import numcodecs
import numpy as np
import zarr
from numcodecs.abc import Codec as Numcodec
from zarr import codecs
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec, BytesBytesCodec, Codec
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.storage import LocalStore, StorePath

from ..system.stores import PlainFiles

MOST_CHUNK = 1 << 32
"""Bytes of one decoded chunk of pixels; what the memory budget allows is less."""
MOST_BESIDE = 1 << 26
"""Bytes of one decoded chunk of coordinates, band names or a mask, if that is more than one of the pixels'."""
_TEXT_BYTES = 1024
"""That a text in an array may take, on the mean."""
_CHECKSUMS = ("crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3")
_COMPRESSORS = ("zstd", "blosc", "lz4", "gzip", "zlib", "bz2", "lzma")
_FILTERS = ("delta", "fixedscaleoffset", "quantize", "bitround", "astype")
"""Of arrays: they change numbers, and the kind of them, as their `dtype` and `astype` say."""


class ZarrBoundError(ValueError):
    """An array that cannot be held to what it declares."""


def bound_array(array: zarr.Array[Any], *, most: int = MOST_CHUNK, trust: bool = False) -> zarr.Array[Any]:
    """The same array for reading: a chunk that decodes to more than it declares cannot be read, and takes no memory.

    Args:
        most: bytes that a decoded chunk may declare.
        trust: codecs that are not known may decode to what they like.

    Raises:
        ZarrBoundError: a codec that is not known, or a larger chunk.
    """
    metadata: Any = array.metadata
    size = _bytes_of(array.chunks, np.dtype(array.dtype))
    if size > most:
        raise ZarrBoundError(f"chunks of {array.chunks} {array.dtype} take {size:,} bytes, at most {most:,} are read")
    shape = array.shards or array.chunks
    if metadata.zarr_format == 2:
        metadata = _bound_v2(metadata, shape, np.dtype(array.dtype), trust=trust)
    else:
        metadata = replace(metadata, codecs=_bound_codecs(metadata.codecs, np.dtype(array.dtype), trust=trust))
    place = array.async_array.store_path
    if isinstance(place.store, LocalStore):
        whole = _bytes_of(shape, np.dtype(array.dtype))
        store = PlainFiles(place.store.root, read_only=True, most=2 * whole + MOST_BESIDE)
        place = StorePath(store, place.path)
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=place, config=array.async_array.config))


def _bytes_of(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    return prod(int(extent) for extent in shape) * max(1, dtype.itemsize)


# Sizes, from the array's pixels to what is stored


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """Bytes that a codec's result may have."""

    most: int
    exact: bool
    """It has just as many."""

    def after(self, name: str) -> _Size:
        """Of what the codec makes of them."""
        if name == "shuffle":
            return self
        if name in _CHECKSUMS:
            return _Size(most=self.most + 4, exact=self.exact)
        # What cannot be compressed grows a little.
        return _Size(most=self.most + self.most // 8 + 65_536, exact=False)


def _size_of_array(codec: ArrayBytesCodec, spec: ArraySpec) -> _Size:
    """Of an array's chunk as bytes."""
    items = prod(spec.shape)
    if isinstance(codec, codecs.VLenUTF8Codec):
        return _Size(most=items * _TEXT_BYTES + 65_536, exact=False)
    size = items * spec.dtype.to_native_dtype().itemsize
    # An index and a little for each chunk of a shard.
    return (
        _Size(most=size, exact=True)
        if isinstance(codec, BytesCodec)
        else _Size(most=2 * size + MOST_BESIDE, exact=False)
    )


# Decoders


class _Decompressor(Protocol):
    """Of the standard library: zlib's, bz2's, lzma's."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _decode(codec: Numcodec, data: Any, size: _Size) -> Any:
    """What a compressor's result was made of, if it is no larger than that.

    Raises:
        ZarrBoundError: it is larger.
    """
    name = codec.codec_id
    value = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
    match name:
        case "zstd" if size.exact:
            return codec.decode(value, np.empty(size.most, np.uint8))
        case "zstd":
            _require(_zstd_bound(value.tobytes()), size)
        case "blosc" | "lz4":
            start = 4 if name == "blosc" else 0
            _require(int.from_bytes(value[start : start + 4].tobytes(), "little"), size)
        case "gzip" | "zlib" | "bz2" | "lzma":
            return _inflate(codec, value.tobytes(), size)
        case _:
            pass  # checksums and shuffles, which give no more than they get
    return codec.decode(value)


def _require(found: int, size: _Size) -> None:
    if found > size.most:
        raise ZarrBoundError(f"a chunk of at most {size.most:,} bytes decodes to {found:,}; the store is damaged")


def _inflate(codec: Any, data: bytes, size: _Size) -> bytes:
    found = b""
    while data:
        stream = _open_stream(codec, size)
        found += stream.decompress(data, size.most + 1 - len(found))
        _require(len(found), size)
        if not stream.eof:
            raise ZarrBoundError("a chunk is cut short; the store is damaged")
        # Writers may put several streams after each other; gzip fills up with zeros.
        data = stream.unused_data.lstrip(b"\0") if codec.codec_id in ("gzip", "lzma") else b""
        if codec.codec_id == "bz2":
            data = stream.unused_data
    return found


def _open_stream(codec: Any, size: _Size) -> _Decompressor:
    match codec.codec_id:
        case "gzip":
            return cast("_Decompressor", zlib.decompressobj(zlib.MAX_WBITS | 16))
        case "zlib":
            return cast("_Decompressor", zlib.decompressobj())
        case "bz2":
            return bz2.BZ2Decompressor()
        case _:
            limit = None if codec.format == lzma.FORMAT_RAW else 2 * size.most + MOST_BESIDE
            return lzma.LZMADecompressor(format=codec.format, memlimit=limit, filters=codec.filters)


_ZSTD_BLOCK = 131_072
"""Bytes that a block of zstd holds at most."""


def _zstd_bound(data: bytes) -> int:
    """Bytes that frames of zstd decode to at most (RFC 8878), by what stands in them."""
    total, at = 0, 0
    while at < len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a frame that is skipped
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528 or at + 5 > len(data):
            raise ZarrBoundError("a chunk is no zstd; the store is damaged")
        said = data[at + 4]
        single, checked = bool(said & 0x20), bool(said & 0x04)
        at += 5 + (0 if single else 1) + (0, 1, 2, 4)[said & 3]
        width = (1 if single else 0, 2, 4, 8)[said >> 6]
        declared = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
        at += width
        held, last = 0, False
        while not last and at < len(data):
            header = int.from_bytes(data[at : at + 3], "little")
            last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
            held += _ZSTD_BLOCK if kind == 2 else length
            at += 3 + (1 if kind == 1 else length)
        at += 4 if checked else 0
        total += declared if width else held
    return total


# Zarr v3


@dataclass(frozen=True)
class _BoundedBytes(BytesBytesCodec):
    """A compressor or checksum of known kind, whose result is measured before it is taken."""

    inner: BytesBytesCodec
    array: ArrayBytesCodec
    before: tuple[str, ...]
    """Names of the codecs between the array's bytes and this one."""
    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.inner.to_dict())

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> _BoundedBytes:
        return replace(self, inner=self.inner.evolve_from_array_spec(array_spec))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        return self.inner.compute_encoded_size(input_byte_length, chunk_spec)

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        size = _size_of_array(self.array, chunk_spec)
        for name in self.before:
            size = size.after(name)
        found = _decode(_numcodec_of(self.inner), chunk_bytes.as_numpy_array(), size)
        return chunk_spec.prototype.buffer.from_bytes(found)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)


@dataclass(frozen=True)
class VLenUTF8Codec(codecs.VLenUTF8Codec):
    """Texts of any length, as many as the chunk declares; zarr asks for a codec of this name."""

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        _require_texts(chunk_bytes.to_bytes(), prod(chunk_spec.shape))
        return await super()._decode_single(chunk_bytes, chunk_spec)


def _require_texts(data: bytes, items: int) -> None:
    found = int.from_bytes(data[:4], "little")
    if found > items:
        raise ZarrBoundError(f"a chunk of {items} texts says that it holds {found}; the store is damaged")


def _bound_codecs(chain: Iterable[Codec], dtype: np.dtype[Any], *, trust: bool) -> tuple[Codec, ...]:
    """The codecs of an array of v3 or of a shard's chunks, each bounded."""
    found: list[Codec] = []
    array: ArrayBytesCodec | None = None
    before: list[str] = []
    for codec in chain:
        if isinstance(codec, ArrayArrayCodec):
            if _name_of(codec) in _FILTERS:
                dtype = _filtered(_name_of(codec), getattr(codec, "codec_config", {}), dtype)
            elif not isinstance(codec, TransposeCodec) and _name_of(codec) != "packbits" and not trust:
                raise _unknown(codec)
            found.append(codec)
        elif isinstance(codec, ArrayBytesCodec):
            array = _bound_array_bytes(codec, dtype, trust=trust)
            found.append(array)
        elif isinstance(codec, BytesBytesCodec) and array is not None:
            name = _name_of(codec)
            known = name in (*_COMPRESSORS, *_CHECKSUMS, "shuffle")
            if not known and not trust:
                raise _unknown(codec)
            # Checksums of fixed size stay as they are: the index of a shard is found by them.
            plain = isinstance(codec, Crc32cCodec) or not known
            found.append(codec if plain else _BoundedBytes(codec, array, tuple(before)))
            before.append(name)
    return tuple(found)


def _bound_array_bytes(codec: ArrayBytesCodec, dtype: np.dtype[Any], *, trust: bool) -> ArrayBytesCodec:
    if isinstance(codec, BytesCodec):
        return codec
    if isinstance(codec, codecs.VLenUTF8Codec):
        return VLenUTF8Codec()
    if isinstance(codec, ShardingCodec):
        for index in codec.index_codecs:
            if not isinstance(index, (BytesCodec, Crc32cCodec)):
                raise _unknown(index)
        return replace(codec, codecs=_bound_codecs(codec.codecs, dtype, trust=trust))
    if trust:
        return codec
    raise _unknown(codec)


def _name_of(codec: Codec) -> str:
    """Of the codec in numcodecs that does the same; empty: none does."""
    own = {ZstdCodec: "zstd", BloscCodec: "blosc", GzipCodec: "gzip", Crc32cCodec: "crc32c"}
    return own.get(type(codec)) or str(getattr(codec, "codec_config", {}).get("id", ""))


def _numcodec_of(codec: Codec) -> Numcodec:
    """To decode with; how hard a compressor tried is no matter then."""
    config = getattr(codec, "codec_config", None)
    return numcodecs.get_codec(dict(config) if config is not None else {"id": _name_of(codec)})


def _unknown(codec: Any) -> ZarrBoundError:
    name = getattr(codec, "codec_id", "") or getattr(codec, "codec_name", "") or type(codec).__name__
    return ZarrBoundError(
        f"its codec {name} is not known to keep within memory; rewrite it with zstd, or --trust-sources"
    )


# Zarr v2


class _BoundedNumcodec(Numcodec):
    """A compressor of v2, or a filter that gives bytes, whose result is measured before it is taken."""

    codec_id = "bounded"

    def __init__(self, inner: Any, size: _Size, items: int) -> None:
        self._inner, self._size, self._items = inner, size, items

    def encode(self, buf: Any) -> Any:
        return self._inner.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        del out  # zarr gives none
        if self._inner.codec_id == "vlen-utf8":
            data = bytes(buf)
            _require_texts(data, self._items)
            return self._inner.decode(data)
        return _decode(self._inner, buf, self._size)

    def get_config(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._inner.get_config())


def _bound_v2(metadata: Any, shape: Sequence[int], dtype: np.dtype[Any], *, trust: bool) -> Any:
    """The metadata of a v2 array whose filters and compressor are bounded."""
    items, kind = prod(shape), dtype
    size = _Size(most=_bytes_of(shape, dtype), exact=True)
    bounded: list[Any] = []
    chain = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor is not None else [])]
    for codec in chain:
        name = codec.codec_id
        if name in _FILTERS:
            kind = _filtered(name, codec.get_config(), kind)
            size = _Size(most=items * kind.itemsize, exact=True)
            bounded.append(codec)
        elif name == "packbits":
            size = _Size(most=1 + -(-items // 8), exact=True)
            bounded.append(codec)
        elif name == "vlen-utf8":
            bounded.append(_BoundedNumcodec(codec, size, items))
            size = _Size(most=items * _TEXT_BYTES + 65_536, exact=False)
        elif name in (*_COMPRESSORS, *_CHECKSUMS, "shuffle"):
            bounded.append(_BoundedNumcodec(codec, size, items))
            size = size.after(name)
        elif trust:
            bounded.append(codec)
            size = _Size(most=MOST_CHUNK, exact=False)
        else:
            raise _unknown(codec)
    compressor = bounded.pop() if metadata.compressor is not None else None
    return replace(metadata, filters=tuple(bounded) or None, compressor=compressor)


def _filtered(name: str, config: Mapping[str, Any], kind: np.dtype[Any]) -> np.dtype[Any]:
    """What a filter makes of numbers of one kind.

    Raises:
        ZarrBoundError: it would give others back.
    """
    back = np.dtype(config.get("decode_dtype") or config.get("dtype") or kind)
    stored = np.dtype(config.get("encode_dtype") or config.get("astype") or back)
    if back.itemsize != kind.itemsize or stored.kind not in "biuf":
        raise ZarrBoundError(f"its filter {name} gives {back} from {stored}, not {kind}; the store is damaged")
    return stored
