"""Verification: every kind of damage is found, named and repaired, and nothing else is touched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster
from outsize.tests.kill_campaign import hash_chunks
from outsize.tiler.errors import OutputError
from outsize.tiler.network import Network
from outsize.tiler.plan import TilePlan
from outsize.tiler.raster import open_raster
from outsize.tiler.records import RunFolder, run_folder
from outsize.tiler.reference import Reference
from outsize.tiler.store import open_array, read_header
from outsize.tiler.verify import recompute_samples, verify_output

from .test_run import class_network, logit_network, run, scene


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def damage_chunks(out: Path) -> dict[tuple[int, int], str]:
    """Three tiles damaged in three ways; what is said of each."""
    flipped, cut, gone = (out / f"class/c/{row}/{column}" for row, column in ((0, 0), (1, 2), (3, 1)))
    value = bytearray(flipped.read_bytes())
    value[len(value) // 2] ^= 16
    flipped.write_bytes(value)
    cut.write_bytes(cut.read_bytes()[:-3])
    gone.unlink()
    return {(0, 0): "another content than was written", (1, 2): "bytes, was written with", (3, 1): "is missing"}


def test_flipped_cut_and_deleted_chunks_are_found_and_just_these_repaired(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    expected = hash_chunks(out)
    sound = verify_output(out)
    assert (sound.tiles, sound.chunks, sound.faults, sound.has_records) == (16, 16, (), True)
    assert sound.stored_bytes == sum(path.stat().st_size for path in out.glob("class/c/*/*"))
    said = damage_chunks(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("class/c/*/*")}
    found = verify_output(out)
    assert found.damaged == set(said)
    assert all(said[fault.row, fault.column] in fault.reason for fault in found.faults)
    repaired = run(source, class_network(), out, client, redo=found.damaged)
    assert (repaired.tiles, repaired.resumed_tiles) == (3, 13)
    assert hash_chunks(out) == expected
    assert verify_output(out).faults == ()
    same = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
    assert len(same) == 13
    assert not any(tuple(map(int, path.parts[-2:])) in said for path in same)


def test_without_records_what_cannot_be_decoded_is_found(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    shutil.rmtree(run_folder(out))
    assert verify_output(out).faults == ()
    said = damage_chunks(out)
    found = verify_output(out)
    assert not found.has_records
    assert found.damaged == set(said)  # chunks carry a checksum
    shutil.rmtree(out / "status")
    with pytest.raises(OutputError, match="its run never ended"):
        verify_output(out)


@pytest.mark.parametrize("kind", ["class", "logits"])
def test_wrong_pixels_in_good_chunks_are_found_by_samples(tmp_path: Path, client: Client, kind: str) -> None:
    network = class_network() if kind == "class" else logit_network("unet depth 1")
    source, out = scene(tmp_path, 200, 200, nodata=True), tmp_path / "o.zarr"
    run(source, network, out, client, fill=(90, 100, 110))
    reference = reference_of(source, network, out)
    right = recompute_samples(out, reference, 16, frozenset(), kind)
    assert (right.tiles, right.wrong) == (16, ())
    assert right.pixels > 16 * 1000
    array = open_array(out, kind, "r+")
    if kind == "class":
        value = np.asarray(array[130, 130])
        array[130, 130] = (int(value) + 1) % 4
    else:
        array[1, 130, 130] = np.asarray(array[1, 130, 130]) * 1.01 + 0.01
    wrong = recompute_samples(out, reference, 16, frozenset(), kind)
    assert [(fault.row, fault.column) for fault in wrong.wrong] == [(2, 2)]
    assert "1 of" in wrong.wrong[0].reason
    assert recompute_samples(out, reference, 16, frozenset([(2, 2)]), kind).wrong == ()


def reference_of(source: Path, network: Network, out: Path) -> Reference:
    header = read_header(out)
    return Reference(
        raster=open_raster(source),
        plan=TilePlan.from_json(header["plan"]),
        network=network,
        fill=tuple(header["fingerprint"]["fill"]),
    )


def test_an_output_that_is_being_written_is_not_verified(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    with RunFolder(out), pytest.raises(OutputError, match="is being written by process"):
        verify_output(out)
    assert verify_output(out).faults == ()
    with pytest.raises(OutputError, match="not an output of outsize"):
        verify_output(tmp_path)
