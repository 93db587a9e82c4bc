"""`outsize verify` as it is called: states, exit codes, and what its sentences claim."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from outsize.pipelines.segment import run as segment
from outsize.tests.support.commands import outsize, outsize_here, result_of
from outsize.tiler.output.records import read_records, run_folder
from outsize.tiler.output.store import open_array
from outsize.tiler.runs.events import Event, TileFinished

from ...support.small_model import save_small_model

pytestmark = pytest.mark.system

SIZE, CORE = 320, 64
HOW = ("--model", "small.json", "--core", str(CORE), "--no-dashboard")
SEGMENT = ("segment", "m.tif", "map.zarr", *HOW)


def write_tiled(path: Path) -> Path:
    """Blocks that can be broken one by one."""
    image = np.random.default_rng(0).integers(1, 255, (4, SIZE, SIZE), np.uint8)
    with rasterio.open(
        path, "w", driver="GTiff", width=SIZE, height=SIZE, count=4, dtype="uint8", crs="EPSG:32618", tiled=True,
        blockxsize=32, blockysize=32, compress="deflate", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 4e6),
    ) as file:  # fmt: skip
        file.write(image)
    return path


def break_block(path: Path, row: int, column: int) -> None:
    """Make one block unreadable; size and time of the file stay."""
    with rasterio.open(path) as file:
        offset = int(file.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=1))
    status, value = path.stat(), bytearray(path.read_bytes())
    value[offset : offset + 200] = bytes(200)
    path.write_bytes(value)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a raster and its map, named as people do."""
    folder = tmp_path_factory.mktemp("made")
    write_tiled(folder / "m.tif")
    save_small_model(folder / "small.json")
    done = outsize(*SEGMENT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def verify(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # The fixture puts copies back; disks that decay change no times either.
    return outsize("verify", folder / "map.zarr", "--model", folder / "small.json", "--source-unchanged", *words)


@pytest.fixture
def folder(made: Path) -> Path:
    """The same at the same place, untouched by other tests."""
    safe = made.with_name("safe")
    if not safe.exists():
        shutil.copytree(made, safe)
    shutil.rmtree(made)
    shutil.copytree(safe, made)
    return made


@pytest.mark.long
def test_what_was_segmented_by_a_relative_path_is_repaired_from_anywhere(folder: Path) -> None:
    chunk = folder / "map.zarr/class/c/1/1"
    value = chunk.read_bytes()
    chunk.unlink()
    done = verify(folder, "--json", "--repair", "--no-dashboard", "--samples", "1")
    repaired = result_of(done)
    assert (repaired["state"], repaired["sound"], repaired["repaired_tiles"]) == ("sound", True, 1)
    assert chunk.read_bytes() == value
    (folder / "map.zarr/x/c/0").unlink()
    found = verify(folder, "--samples", "0")
    assert (found.returncode, found.stdout.split(": ", 1)[1]) == (
        1,
        "1 array beside the pixels DAMAGED (--repair writes them again)\n",
    )
    assert "damaged   x/c/0 is missing" in found.stderr
    mended = result_of(verify(folder, "--json", "--repair", "--samples", "0"))
    assert (mended["state"], mended["repaired_arrays"], mended["repaired_tiles"]) == ("sound", 1, 0)


def test_a_repair_that_cannot_compute_a_tile_ends_with_3_and_names_it(folder: Path) -> None:
    break_block(folder / "m.tif", 9, 9)
    (folder / "map.zarr/class/c/0/0").unlink()
    (folder / "map.zarr/class/c/4/4").unlink()
    done = verify(folder, "--json", "--repair", "--no-dashboard", "--samples", "0")
    assert done.returncode == 3, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert (values["state"], values["sound"], values["repaired_tiles"]) == ("partial", False, 1)
    assert [(entry["row"], entry["column"]) for entry in values["repair_failures"]] == [(4, 4)]
    assert "failed    tile 4,4: RasterError" in done.stderr
    assert (np.asarray(open_array(folder / "map.zarr", "class")[256:, 256:]) == 255).all()
    again = verify(folder, "--samples", "0")
    assert again.returncode == 3
    assert "failed    1 tile holds nodata; segment --retry-failed tries again" in again.stderr
    assert again.stdout.endswith("sound, 25 chunks as written, 1 tile FAILED\n")


def test_an_interrupted_output_is_told_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "map.zarr")
    shutil.rmtree(folder / "map.zarr.run")

    class Stop(segment.RunListener):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, TileFinished) and event.finished == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(segment, "RunListener", Stop)
    monkeypatch.chdir(folder)
    assert outsize_here(*SEGMENT).returncode == 130
    done = sorted(read_records(folder / "map.zarr"))
    found = verify(folder, "--samples", "0")
    assert found.returncode == 1
    left = 25 - len(done)
    assert f"UNFINISHED, {left} tiles not done; the same segment goes on; {len(done)} chunks as written" in found.stdout
    (folder / "map.zarr/class/c" / "/".join(map(str, done[0]))).unlink()
    done_again = verify(folder, "--json", "--repair", "--no-dashboard", "--samples", "0")
    values = json.loads(done_again.stdout.splitlines()[-1])
    assert done_again.returncode == 1
    assert (values["state"], values["sound"], values["repaired_tiles"]) == ("unfinished", False, 1)
    assert sorted(read_records(folder / "map.zarr")) == done


def test_what_was_not_compared_is_not_claimed(folder: Path) -> None:
    shutil.rmtree(run_folder(folder / "map.zarr"))
    done = verify(folder, "--samples", "0")
    assert done.returncode == 0
    assert done.stdout.endswith("sound, 25 chunks decodable\n")


def test_another_source_is_said_and_not_taken_for_wrong_pixels(folder: Path) -> None:
    os.utime(folder / "m.tif", (time.time(), 1))
    done = verify(folder)
    assert done.returncode == 0
    why = "the input's size or time of change is another; segment --overwrite makes "
    assert f"samples   not recomputed: {why}" in done.stderr
    (folder / "map.zarr/class/c/0/0").unlink()
    refused = verify(folder, "--repair", "--samples", "0")
    assert refused.returncode == 1
    assert f"a repair runs the network again: {why}" in refused.stderr
    copied = folder / "copied.tif"
    shutil.copy(folder / "m.tif", copied)
    other = outsize("segment", copied, "map.zarr", *HOW, cwd=folder)
    assert other.returncode == 1
    assert f"the input is another file: {folder / 'm.tif'} there, {copied} now; --overwrite replaces it" in other.stderr
