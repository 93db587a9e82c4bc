"""Zarr arrays that claim one thing and hold another take no more memory than they claim, whatever compresses them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
import zarr.codecs.numcodecs as zn
from outsize.tiler.base.errors import OutputError, RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.output.store import open_array
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.zarr_bounds import MOST_BESIDE, ZarrBoundError, bound_array
from zarr import codecs

from ...support.rasters import unique_pixels

IMAGE = unique_pixels(2, 40, 50, np.int16)
BOMB = 1 << 29
"""Bytes that a chunk decodes to which declares 8 kB."""
PART = bytes(BOMB // 64)


def rle_frame(blocks: int) -> bytes:
    """zstd that does not say how much it holds: blocks of one byte, repeated."""
    size = 128 * 1024
    body = b"".join(struct.pack("<I", size << 3 | 1 << 1 | (i == blocks - 1))[:3] + b"\0" for i in range(blocks))
    return b"\x28\xb5\x2f\xfd\x00\x38" + body


def lie(value: bytes, at: int) -> bytes:
    """The same with another size in its header."""
    return value[:at] + struct.pack("<I", 2**31 - 1) + value[at + 4 :]


BOMBS: dict[str, tuple[Any, Any, Callable[[], bytes]]] = {
    # what, (v3 codec, v2 codec, chunk)
    "zstd": (codecs.ZstdCodec(), numcodecs.Zstd(), lambda: numcodecs.Zstd().encode(PART) * 64),
    "zstd of unknown size": (codecs.ZstdCodec(), numcodecs.Zstd(), lambda: rle_frame(BOMB >> 17)),
    "blosc": (codecs.BloscCodec(), numcodecs.Blosc(), lambda: numcodecs.Blosc().encode(np.zeros(BOMB, np.uint8))),
    "blosc that lies": (
        codecs.BloscCodec(),
        numcodecs.Blosc(),
        lambda: lie(numcodecs.Blosc().encode(np.zeros(8000, np.uint8)), 4),
    ),
    "gzip": (codecs.GzipCodec(), numcodecs.GZip(), lambda: gzip.compress(PART, 1) * 64),
    "zlib": (zn.Zlib, numcodecs.Zlib(), lambda: zlib.compress(bytes(BOMB // 2), 1)),
    "lz4": (zn.LZ4, numcodecs.LZ4(), lambda: numcodecs.LZ4().encode(np.zeros(BOMB, np.uint8))),
    "lz4 that lies": (zn.LZ4, numcodecs.LZ4(), lambda: lie(numcodecs.LZ4().encode(np.zeros(8000, np.uint8)), 0)),
    "bz2": (zn.BZ2, numcodecs.BZ2(), lambda: bz2.compress(PART, 1) * 64),
    "lzma": (zn.LZMA, numcodecs.LZMA(), lambda: lzma.compress(PART, preset=0) * 64),
}


@pytest.mark.system
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_chunk_that_decodes_to_more_than_it_declares_takes_no_memory(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"shape": (1, 100, 80), "chunks": (1, 100, 80), "dtype": "u1"}
    names = {"dimension_names": ("band", "y", "x")}
    stores: list[str] = []
    for what, (new, old, make) in BOMBS.items():
        value = make()
        codec = new() if isinstance(new, type) else new
        for kind in ("v3", "v2", "twice", "filtered", "shard"):
            path = tmp_path / f"{what} {kind}.zarr"
            stores.append(str(path))
            if kind == "v2" or kind == "filtered":
                filters = [numcodecs.Delta("u1")] if kind == "filtered" else None
                array = zarr.create_array(path, **shape, compressors=old, filters=filters, zarr_format=2)
                array.attrs["_ARRAY_DIMENSIONS"] = ["band", "y", "x"]
                (path / "0.0.0").write_bytes(value)
            elif kind == "shard":
                zarr.create_array(path, **shape, compressors=[codec], shards=(1, 100, 80), **names)
                (path / "c/0/0").mkdir(parents=True)
                index = struct.pack("<QQ", 0, len(value))
                checked = numcodecs.get_codec({"id": "crc32c", "location": "end"}).encode(np.frombuffer(index, "u1"))
                (path / "c/0/0/0").write_bytes(value + bytes(checked))
            else:
                chain = [codec] if kind == "v3" else [codec, codecs.GzipCodec(level=1)]
                zarr.create_array(path, **shape, compressors=chain, **names)
                (path / "c/0/0").mkdir(parents=True)
                (path / "c/0/0/0").write_bytes(value if kind == "v3" else gzip.compress(value, 1))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "outsize.tests.support.bomb_reader", *stores],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    read = {name: text for name, text in said["found"].items() if "cannot be read" not in text}
    assert not read
    assert said["grown"] < 64 << 20


def created(path: Path, **settings: Any) -> zarr.Array[Any]:
    array = zarr.create_array(path, shape=IMAGE.shape, chunks=(2, 20, 25), dtype="i2", **settings)
    array[:] = IMAGE
    return zarr.open_array(path, mode="r")


def require_equal(array: zarr.Array[Any]) -> None:
    bounded = bound_array(array)
    assert np.array_equal(np.asarray(bounded[:]), IMAGE)
    assert np.array_equal(np.asarray(bounded[:, 3:29, 4:30]), IMAGE[:, 3:29, 4:30])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_honest_chunks_of_every_known_codec_are_read(tmp_path: Path) -> None:
    filters = {"delta": zn.Delta(dtype="<i2"), "turned": codecs.TransposeCodec(order=(2, 0, 1)), "none": None}
    filters["offset"] = zn.FixedScaleOffset(offset=0, scale=1, dtype="<i2", astype="<i4")
    plain = [codecs.ZstdCodec(checksum=True), codecs.GzipCodec(), codecs.BloscCodec(), zn.LZ4(), zn.Zlib(), zn.BZ2()]
    chains = [[codec] for codec in (*plain, zn.LZMA(), codecs.Crc32cCodec(), zn.Fletcher32(), zn.Adler32())]
    chains += [[zn.Shuffle(), codec, codecs.Crc32cCodec()] for codec in plain]
    chains += [[codecs.ZstdCodec(), codecs.BloscCodec(), zn.LZ4()], [codecs.GzipCodec(), codecs.ZstdCodec()], []]
    for number, chain in enumerate(chains):
        name, own = list(filters.items())[number % len(filters)]
        for shards in (None, (2, 40, 50)):
            path = tmp_path / f"{number} {name} {bool(shards)}.zarr"
            require_equal(created(path, compressors=chain or None, filters=own and [own], shards=shards))


def test_honest_chunks_of_every_known_codec_of_v2_are_read(tmp_path: Path) -> None:
    compressors = [None, numcodecs.Zstd(), numcodecs.Blosc(), numcodecs.LZ4(), numcodecs.GZip(), numcodecs.Zlib()]
    compressors += [numcodecs.BZ2(), numcodecs.LZMA()]
    filters = [None, numcodecs.Delta("<i2"), numcodecs.Shuffle(2), numcodecs.CRC32(), numcodecs.Fletcher32()]
    filters += [numcodecs.FixedScaleOffset(0, 1, "<i2", "<i4"), numcodecs.AsType("<i4", "<i2"), numcodecs.Zstd()]
    for number, own in enumerate(filters):
        for compressor in compressors[number % 2 :: 2]:
            path = tmp_path / f"{number} {compressor}.zarr"
            settings: dict[str, Any] = {"order": "F", "zarr_format": 2, "compressors": compressor}
            require_equal(created(path, filters=own and [own], **settings))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_writers_that_put_several_streams_into_a_chunk_are_read(tmp_path: Path) -> None:
    value = np.ascontiguousarray(IMAGE[:, :20, :25]).tobytes()
    half = len(value) // 2
    parts = value[:half], value[half:]
    for name, codec, pack in (
        ("gzip", codecs.GzipCodec(), lambda part: gzip.compress(part) + bytes(7)),
        ("bz2", zn.BZ2, bz2.compress),
        ("lzma", zn.LZMA, lzma.compress),
        ("zstd", codecs.ZstdCodec(), numcodecs.Zstd().encode),
    ):
        array = created(tmp_path / f"{name}.zarr", compressors=[codec() if isinstance(codec, type) else codec])
        (tmp_path / f"{name}.zarr/c/0/0/0").write_bytes(b"".join(map(pack, parts)))
        require_equal(array)


def test_band_names_of_any_length_are_read(tmp_path: Path) -> None:
    for zarr_format in (2, 3):
        path = tmp_path / f"{zarr_format}.zarr"
        group = zarr.create_group(path, zarr_format=zarr_format)
        names = {"attributes": {"_ARRAY_DIMENSIONS": ["band", "y", "x"]}}
        if zarr_format == 3:
            names = {"dimension_names": ("band", "y", "x")}
        group.create_array("image", data=IMAGE, **names)
        group.create_array("band", shape=(2,), dtype=str, compressors=None)[:] = np.array(["grün", "B08"], object)
        assert open_raster(path).band_names == ("grün", "B08")
        chunk = path / ("band/0" if zarr_format == 2 else "band/c/0")
        texts = numcodecs.VLenUTF8().encode(np.array(["a", "b"], object))
        chunk.write_bytes(struct.pack("<I", 2**29) + texts[4:])
        with pytest.raises(RasterError, match="a chunk of 2 texts says that it holds 536870912; the store is damaged"):
            open_raster(path)


UNKNOWN: dict[str, dict[str, Any]] = {
    "pickle": {"filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "dtype": "|O", "fill_value": None},
    "json2": {"filters": [{"id": "vlen-utf8"}, {"id": "json2"}], "dtype": "|O", "fill_value": None},
    "base64": {"compressor": {"id": "base64"}},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_codecs_that_could_run_code_or_take_what_they_like_are_refused(tmp_path: Path, what: str) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4, 5), chunks=(4, 5), dtype="u1", zarr_format=2)
    array[:] = 1
    metadata = json.loads((tmp_path / "a.zarr/.zarray").read_text())
    (tmp_path / "a.zarr/.zarray").write_text(json.dumps({**metadata, **UNKNOWN[what]}))
    with pytest.raises(ZarrBoundError, match=f"its codec {what} is not known .* or --trust-sources"):
        bound_array(zarr.open_array(tmp_path / "a.zarr", mode="r"))
    if what == "base64":
        with pytest.raises(RasterError, match="its codec base64 is not known"):
            open_raster(tmp_path / "a.zarr")
        assert open_raster(tmp_path / "a.zarr", trust=True).shape == (1, 4, 5)
        with pytest.raises(OutputError, match="its codec base64 is not known"):
            open_array(tmp_path, "a.zarr")


def test_a_filter_that_gives_other_numbers_than_the_array_has_is_refused(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4, 5), chunks=(4, 5), dtype="u1", zarr_format=2)
    array[:] = 1
    kept = json.loads((tmp_path / "a.zarr/.zarray").read_text())
    for kind in ("f8", "V100000000", "U1000000"):
        changed = {**kept, "filters": [{"id": "delta", "dtype": kind, "astype": "u1"}]}
        (tmp_path / "a.zarr/.zarray").write_text(json.dumps(changed))
        with pytest.raises(RasterError, match=r"its filter delta gives .* not uint8; the store is damaged"):
            open_raster(tmp_path / "a.zarr")


def group_of(path: Path, **beside: dict[str, Any]) -> Path:
    """An image, and arrays beside it of declared shape and chunks that nobody wrote."""
    group = zarr.create_group(path)
    attributes = {"ancillary_variables": "mask"}
    group.create_array("image", data=IMAGE, dimension_names=("band", "y", "x"), attributes=attributes)
    ours = {"flag_values": [0, 255], "flag_meanings": "nodata valid"}
    for name, settings in beside.items():
        known = {"attributes": ours} if name == "mask" else {"dimension_names": (name,)}
        group.create_array(name, **known, **settings)
    return path


GIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "x": {"x": {"shape": (50,), "chunks": (10**10,), "dtype": "f8"}, "y": {"shape": (40,), "dtype": "f8"}},
    "y": {"y": {"shape": (40,), "chunks": (10**10,), "dtype": "f8"}, "x": {"shape": (50,), "dtype": "f8"}},
    "band": {"band": {"shape": (2,), "chunks": (10**10,), "dtype": "i8"}},
    "mask": {"mask": {"shape": (40, 50), "chunks": (10**6, 10**6), "dtype": "u1"}},
}


@pytest.mark.parametrize("what", GIANTS)
def test_giant_chunks_beside_the_pixels_are_refused(tmp_path: Path, what: str) -> None:
    path = group_of(tmp_path / "g.zarr", **GIANTS[what])
    with pytest.raises(RasterError, match=rf"chunks of \(10+,( 10+)?\) \w+ take [\d,]+ bytes, at most {MOST_BESIDE:,}"):
        open_raster(path)


def test_giant_chunks_of_pixels_are_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(4, 5), chunks=(10**5, 10**5), dtype="u1")
    with pytest.raises(RasterError, match="take 10,000,000,000 bytes, at most 4,294,967,296 are read"):
        open_raster(tmp_path / "a.zarr")


def test_pipes_in_a_store_are_not_waited_for(tmp_path: Path) -> None:
    path = group_of(tmp_path / "g.zarr")
    raster = open_raster(path)
    chunk = path / "image/c/0/0/0"
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(RasterError, match=r"cannot be read: .*it is no file, but a pipe"):
        raster.open_reader().read(Window(y=0, x=0, height=2, width=2))
    (path / "image/zarr.json").unlink()
    os.mkfifo(path / "image/zarr.json")
    for source in (path, path / "image"):
        with pytest.raises(RasterError, match=r"it is no file, but a pipe|has none"):
            open_raster(source)


def test_files_with_holes_in_place_of_chunks_and_metadata_take_no_memory(tmp_path: Path) -> None:
    path = group_of(tmp_path / "g.zarr")
    raster = open_raster(path)
    os.truncate(path / "image/c/0/0/0", 1 << 40)
    with pytest.raises(RasterError, match=r"it has 1,099,511,627,776 bytes, at most [\d,]+ are read"):
        raster.open_reader().read(Window(y=0, x=0, height=2, width=2))
    os.truncate(path / "image/zarr.json", 1 << 40)
    with pytest.raises(RasterError, match=r"it has 1,099,511,627,776 bytes, at most 64,000,000 are read"):
        open_raster(path / "image")
