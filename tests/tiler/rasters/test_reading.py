"""How much is decoded: what the plan says against what readers ask of GDAL and of Zarr's stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from affine import Affine
from distributed import Client
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.geometry import Window
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.output.store import open_array
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters import block_cache, reading
from outsize.tiler.rasters.block_cache import BlockCache, BlockStore
from outsize.tiler.rasters.gdal_files import GdalReader
from outsize.tiler.rasters.georeference import Georeference
from outsize.tiler.rasters.nodata import NodataRule
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import count_pixel_bytes, open_mosaic, open_stack
from outsize.tiler.rasters.raster import Raster, ReadOptions, read_filled
from outsize.tiler.rasters.zarr_arrays import ZarrReader
from outsize.tiler.runs.run import predict
from torch import Tensor, nn

from ...support.rasters import TRANSFORM, write_geotiff

pytestmark = pytest.mark.system

SHAPE = (1201, 1103)
PIXELS = SHAPE[0] * SHAPE[1]
IMAGE = np.random.default_rng(0).integers(1, 255, (2, *SHAPE), dtype=np.uint8)


class Blurred(nn.Module):
    """Looks ten pixels far."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.blur = nn.Conv2d(bands, 1, 21, padding=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.blur(x.float())


@cache
def blurred(bands: int = 2) -> Network:
    return analyze_network(Blurred(bands).eval(), bands=bands, dtype="uint8")


def planned(raster: Raster | tuple[int, int, int], **options: Any) -> TilePlan:
    settings: dict[str, Any] = {"memory": "2GB", "engine": "openvino", "workers": 1, "threads": 1, **options}
    bands = raster.bands if isinstance(raster, Raster) else raster[0]
    return plan_tiles(raster, blurred(bands), **settings)


def write_zarr(path: Path, image: np.ndarray, chunks: tuple[int, ...], y: int = 0, x: int = 0) -> Path:
    a, b, c, d, e, f, *_ = TRANSFORM * Affine.translation(x, y)
    group = zarr.create_group(path)
    array = group.create_array(
        "image", shape=image.shape, chunks=chunks, dtype=image.dtype, dimension_names=["band", "y", "x"]
    )
    array[:] = image
    array.attrs["grid_mapping"] = "spatial_ref"
    group.create_array("spatial_ref", shape=(), dtype="i4").attrs["GeoTransform"] = f"{c} {a} {b} {f} {d} {e}"
    return path


def striped(folder: Path) -> Raster:
    """As GDAL writes a GeoTIFF if it is not told otherwise: strips of 8 kB, of seven rows here."""
    raster = open_raster(write_geotiff(folder / "striped.tif", IMAGE, interleave="pixel", blockysize=1))
    assert raster.block == (1, SHAPE[1])
    return raster


def tiled(folder: Path) -> Raster:
    return open_raster(write_geotiff(folder / "t.tif", IMAGE, tiled=True, blockxsize=128, blockysize=128))


def chunked(folder: Path) -> Raster:
    return open_raster(write_zarr(folder / "c.zarr", IMAGE, (2, 128, 128)))


def chunked_strips(folder: Path) -> Raster:
    return open_raster(write_zarr(folder / "s.zarr", IMAGE, (2, 16, SHAPE[1])))


def large_chunks(folder: Path) -> Raster:
    return open_raster(write_zarr(folder / "l.zarr", IMAGE, (2, 400, 368)))


def stack_of_strips(folder: Path) -> Raster:
    """Two files of two bands each, of which three are wanted."""
    files = [write_geotiff(folder / f"{i}.tif", IMAGE, interleave="pixel", blockysize=1) for i in range(2)]
    return open_stack(files, ReadOptions(bands=(3, 1, 2)))


def stack_of_chunks(folder: Path) -> Raster:
    return open_stack([write_zarr(folder / f"{i}.zarr", IMAGE, (2, 128, 128)) for i in range(2)])


def mosaic_of(write: Callable[[Path, np.ndarray, int, int], Path], folder: Path) -> Raster:
    cut_y, cut_x = 640, 512
    return open_mosaic(
        [
            write(folder / f"{y}-{x}", IMAGE[:, y : y + height, x : x + width], y, x)
            for y, height in ((0, cut_y), (cut_y, SHAPE[0] - cut_y))
            for x, width in ((0, cut_x), (cut_x, SHAPE[1] - cut_x))
        ]
    )


def mosaic_of_chunks(folder: Path) -> Raster:
    return mosaic_of(lambda path, image, y, x: write_zarr(path, image, (2, 128, 128), y, x), folder)


def mosaic_of_tiles(folder: Path) -> Raster:
    def write(path: Path, image: np.ndarray, y: int, x: int) -> Path:
        transform = TRANSFORM * Affine.translation(x, y)
        return write_geotiff(
            path.with_suffix(".tif"), image, transform=transform, tiled=True, blockxsize=128, blockysize=128
        )

    return mosaic_of(write, folder)


def masked_chunks(folder: Path) -> Raster:
    """A store of ours with a mask array beside the pixels."""
    source = write_geotiff(folder / "m.tif", IMAGE, tiled=True, blockxsize=128, blockysize=128, nodata=7)
    copy_raster(open_raster(source, any_band=True), folder / "m.zarr")
    raster = open_raster(folder / "m.zarr")
    assert raster.nodata_rule.mask == "array"
    return raster


def mask_band(folder: Path) -> Raster:
    image = np.concatenate([IMAGE, IMAGE[:1]])
    source = write_geotiff(folder / "b.tif", image, interleave="pixel", tiled=True, blockxsize=128, blockysize=128)
    return open_raster(source, mask_band=3, mask_values=[9])


SOURCES = (
    striped,
    tiled,
    chunked,
    chunked_strips,
    large_chunks,
    stack_of_strips,
    stack_of_chunks,
    mosaic_of_chunks,
    mosaic_of_tiles,
    masked_chunks,
    mask_band,
)


class Asked:
    """Pixels of whole blocks that readers ask of GDAL and of Zarr, each band counted, past the caches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values = 0
        self.only_kept = False
        """Leave out readers that keep nothing: the start check's, in the planning process."""
        for reader, name in ((GdalReader, "_read_bands"), (ZarrReader, "_read_bands"), (ZarrReader, "_read_valid")):
            monkeypatch.setattr(reader, name, self._counting(getattr(reader, name)))

    def _counting(self, ask: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def counted(reader: Any, window: Window, *rest: Any, **named: Any) -> np.ndarray:
            raster: Raster = reader._raster
            if self.only_kept and not reader._bands.keeps_blocks:
                return ask(reader, window, *rest, **named)
            for extent, size, start, stop in zip(
                raster.shape_yx,
                raster.block,
                (window.y, window.x),
                (window.rows.stop, window.columns.stop),
                strict=True,
            ):
                assert start % size == 0, "a block is decoded whole, and should be asked for whole"
                assert stop % size == 0 or stop == extent
            found = ask(reader, window, *rest, **named)
            self.values += found.size
            return found

        return counted


def read_in_order(raster: Raster, plan: TilePlan) -> BlockStore:
    """All tiles as a worker reads them, compared with reading without a cache."""
    blocks = BlockStore(plan.cache_bytes)
    reader = raster.open_reader(blocks)
    for at in plan.order():
        window = plan.tile(*at).window
        filled = read_filled(reader, raster, window)
        inside = window.clamp(raster.shape_yx)
        if not raster.parts and raster.nodata_rule.mask is None and not raster.nodata_rule.mask_band:
            assert np.array_equal(
                filled.image[:, : inside.height, : inside.width], IMAGE[(slice(None), *inside.slices())]
            )
        assert blocks.held_bytes <= plan.cache_bytes
    reader.close()
    return blocks


@pytest.mark.parametrize(("core", "method"), [(128, "window"), (128, "program")])
@pytest.mark.parametrize("make", SOURCES)
def test_no_more_is_decoded_than_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Raster], core: int, method: str
) -> None:
    """With as little room as strips of tiles need."""
    monkeypatch.setattr(reading, "READ_BYTES", 64_000)
    monkeypatch.setattr(block_cache, "READ_BYTES", 64_000)
    raster = make(tmp_path)
    plan = planned(raster, core=core, method=method, memory="8GB")
    assert plan.read_amplification == 1  # all is kept
    row = plan.cache_bytes // (-(-SHAPE[0] // raster.block[0]))
    spare = max(4 * row, plan.cache_bytes // 2)
    plan = planned(raster, core=core, method=method, memory=plan.memory.total_bytes - plan.cache_bytes + spare)
    assert 0 < plan.cache_bytes <= spare
    asked = Asked(monkeypatch)
    blocks = read_in_order(raster, plan)
    measured = asked.values * raster.dtype.itemsize / PIXELS / count_pixel_bytes(raster)
    assert blocks.decoded_bytes == asked.values * raster.dtype.itemsize
    assert 0.7 * plan.read_amplification <= measured <= plan.read_amplification * 1.001
    assert measured < 2


@pytest.mark.parametrize("method", ["window", "program"])
@pytest.mark.parametrize("block", [(1, 3001), (16, 3001), (128, 128), (50, 70), (3203, 16), (400, 368)])
def test_every_way_decodes_as_much_as_it_says(block: tuple[int, int], method: str) -> None:
    """Not only the one that is chosen: each with as many kept bytes as it asks for."""
    shape = (3203, 3001)
    plan = planned((1, *shape), core=200, method=method)
    source = reading.Source(shape_yx=shape, block=block, pixel_bytes=1, decoder_bytes=0, has_gdal=False)
    zeros = np.zeros((1, *shape), np.uint8)
    nothing, everything, *ways = reading._find_ways(plan.rows, plan.columns, source, Window.whole(shape))
    assert nothing.kept_bytes == 0
    assert everything.amplification == 1
    for way in ways:
        if way.kept_bytes > everything.kept_bytes / 3:
            continue  # so much is left of what other kinds of tiles have read, that little is decoded again
        tried = replace(
            plan, strip_rows=way.strip_rows, strips_first=way.strips_first, cache_bytes=way.kept_bytes, block=block
        )
        blocks = BlockStore(way.kept_bytes)
        cache = BlockCache(
            blocks,
            "image",
            shape_yx=shape,
            block=block,
            pixel_bytes=1,
            read=lambda window: zeros[(slice(None), *window.slices())],
        )
        for at in tried.order():
            cache.read(tried.tile(*at).window.clamp(shape))
        measured = blocks.decoded_bytes / zeros.nbytes
        # What is left of another kind's blocks is not planned with: more of it where blocks are large.
        assert 0.75 * way.amplification <= measured <= way.amplification * 1.001


@pytest.mark.parametrize("block", [(1, 1103), (128, 128)])
def test_changes_of_program_are_as_many_as_were_weighed(block: tuple[int, int]) -> None:
    plan = planned((1, *SHAPE), core=128, method="program")
    source = reading.Source(shape_yx=SHAPE, block=block, pixel_bytes=1, decoder_bytes=0, has_gdal=False)
    for way in reading._find_ways(plan.rows, plan.columns, source, Window.whole(SHAPE)):
        tried = replace(plan, strip_rows=way.strip_rows, strips_first=way.strips_first, block=block)
        kinds = [(plan.rows[row].kind, plan.columns[column].kind) for row, column in tried.order()]
        assert len(set(tried.order())) == len(plan.grid)
        changes = sum(one != other for one, other in pairwise(kinds))
        assert changes == reading._count_switches(plan.rows, plan.columns, source, way)


def described(kind: Any, block: tuple[int, int], shape: tuple[int, int] = (30_000, 30_000)) -> Raster:
    """A raster of four bands that nobody has."""
    return Raster(
        path="giant",
        kind=kind,
        shape=(4, *shape),
        dtype=np.dtype(np.uint8),
        place=Georeference(),
        nodata_rule=NodataRule(),
        band_names=("a", "b", "c", "d"),
        block=block,
        block_bytes=4 * block[0] * block[1],
        identity="",
    )


@pytest.mark.parametrize("memory", ["1.5GB", "2GB", "8GB"])
@pytest.mark.parametrize("method", ["window", "program"])
@pytest.mark.parametrize(("kind", "block"), [("gdal", (1, 30_000)), ("zarr", (64, 30_000)), ("zarr", (512, 512))])
def test_a_giant_raster_is_decoded_about_once(kind: str, block: tuple[int, int], method: str, memory: str) -> None:
    plan = planned(described(kind, block), core=1024, method=method, memory=memory)
    assert plan.read_amplification < 1.4
    assert plan.memory.total_bytes <= plan.memory_budget_bytes
    # Of wide blocks a strip of tiles must be kept; what is kept is in the prediction.
    assert block == (512, 512) or plan.cache_bytes >= 4 * 1024 * 30_000
    assert plan.memory.buffer_bytes > plan.cache_bytes
    assert "reading" not in plan.explain()


def test_smaller_cores_are_taken_where_the_largest_leave_no_room_for_strips() -> None:
    striped, squares = (described("gdal", block) for block in ((1, 30_000), (512, 512)))
    for memory in range(1_000_000_000, 2_400_000_000, 20_000_000):
        largest, smaller = planned(squares, memory=memory), planned(striped, memory=memory)
        if largest.core > smaller.core:
            break
    else:
        pytest.fail("strips should take smaller cores at some budget")
    assert planned(striped, memory=memory, core=largest.core[0]).read_amplification > 4
    assert smaller.read_amplification < 1.1
    assert smaller.flops < 1.15 * largest.flops


def test_the_plan_says_what_helps_where_much_is_decoded_often() -> None:
    plan = planned(described("gdal", (1, 30_000)), core=1024, memory="850MB")
    assert plan.read_amplification > 20
    line = next(line for line in plan.explain().splitlines() if line.startswith("reading"))
    assert "1 x 30000 px are decoded up to" in line
    assert "`outsize ingest` first" in line
    assert "--workers" not in line
    shared = planned(described("zarr", (64, 30_000)), core=1024, workers=4, memory="8GB")
    assert 4 <= shared.read_amplification < 4.2
    assert "fewer --workers" in shared.explain()


@pytest.mark.parametrize("block", [(1, 2001), (128, 128)])
def test_workers_that_share_nothing_decode_no_more_than_the_plan_says(block: tuple[int, int]) -> None:
    shape = (1203, 2001)
    raster = described("zarr", block, shape)
    plan = planned(raster, core=128, workers=3)
    zeros = np.zeros((4, *shape), np.uint8)
    stores = [BlockStore(plan.cache_bytes) for _ in range(3)]
    caches = [
        BlockCache(
            store,
            "image",
            shape_yx=shape,
            block=block,
            pixel_bytes=4,
            read=lambda window: zeros[(slice(None), *window.slices())],
        )
        for store in stores
    ]
    for index, at in enumerate(plan.order()):
        caches[index % 3].read(plan.tile(*at).window.clamp(shape))
    measured = sum(store.decoded_bytes for store in stores) / zeros.nbytes
    alone = planned(raster, core=128, workers=1).read_amplification
    assert 1.1 * alone < measured <= plan.read_amplification


@pytest.mark.parametrize(("make", "keeps"), [(striped, 0.4), (tiled, 0.4), (masked_chunks, 1)])
def test_a_run_tells_what_was_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client, make: Callable[[Path], Raster], keeps: float
) -> None:
    for module in (reading, block_cache):
        monkeypatch.setattr(module, "READ_BYTES", 64_000)
    raster = make(tmp_path)
    settings: dict[str, Any] = {"engine": "torch", "core": 128, "workers": 1, "threads": 1}
    roomy = planned(raster, memory="4GB", **settings)
    memory = roomy.memory.total_bytes - int((1 - keeps) * roomy.cache_bytes)
    plan = planned(raster, memory=memory, **settings)
    asked = Asked(monkeypatch)
    asked.only_kept = True
    summary = predict(
        raster, blurred(), tmp_path / "out.zarr", client=client, memory=memory, tile_map=False, **settings
    )
    asked.only_kept = False
    assert summary.read_amplification is not None
    assert summary.read_amplification * PIXELS * count_pixel_bytes(raster) == pytest.approx(asked.values, rel=1e-6)
    assert summary.predicted_read_amplification == plan.read_amplification
    for_tiles = summary.read_amplification - summary.check_read_amplification
    assert 0 < summary.check_read_amplification < 1
    assert for_tiles <= plan.read_amplification
    if keeps == 1:
        assert summary.read_amplification == plan.read_amplification == 1
    else:
        assert for_tiles > 0.7 * plan.read_amplification
    values = summary.to_json()
    assert values["read_amplification"] == round(summary.read_amplification, 3)
    assert values["predicted_read_amplification"] == round(summary.predicted_read_amplification, 3)
    with torch.no_grad():
        image = read_filled(raster.open_reader(), raster, Window.whole(SHAPE))
        whole = blurred().module(torch.from_numpy(image.image)[None])[0, 0].numpy()
    found = np.asarray(open_array(tmp_path / "out.zarr", "logits")[0])
    valid = ~image.missing if image.missing is not None else np.ones(SHAPE, bool)
    assert np.allclose(found[valid], whole[valid], atol=1e-3)
    assert np.isnan(found[~valid]).all()
