"""Verification: every kind of damage is found, named and repaired, and nothing else is touched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import Client
from outsize.tests.support.kill_campaign import hash_chunks
from outsize.tiler.analysis.network import Network
from outsize.tiler.base.errors import OutputError
from outsize.tiler.output.records import RunFolder, read_records, run_folder
from outsize.tiler.output.small_parts import mend_parts
from outsize.tiler.output.store import open_array, read_header
from outsize.tiler.planning.plan import TilePlan
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.events import Event, TileFinished
from outsize.tiler.runs.reference import Reference
from outsize.tiler.runs.verify import recompute_samples, tile_states, verify_output

from ...support.runs import class_network, logit_network, run, run_again, scene, stored, whole

pytestmark = pytest.mark.system


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
    repaired = run_again(source, class_network(), out, client, found.damaged)
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
    assert [part.array for part in verify_output(out).parts] == ["status"]
    forget(out, "run")
    with pytest.raises(OutputError, match="its run never ended"):
        verify_output(out)


def forget(out: Path, key: str) -> None:
    """Take a part out of an output's header."""
    metadata = json.loads((out / "zarr.json").read_text())
    del metadata["attributes"]["outsize"][key]
    (out / "zarr.json").write_text(json.dumps(metadata))


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


def interrupt(source: Path, out: Path, client: Client, tiles: int = 5) -> None:
    """A run that is stopped after so many tiles."""

    def stop(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == tiles:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, class_network(), out, client, listener=stop)


def test_an_interrupted_output_is_unfinished_and_its_repair_does_damaged_tiles_alone(
    tmp_path: Path, client: Client
) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    interrupt(source, out, client)
    assert (verify_output(out).state, len(verify_output(out).unfinished)) == ("unfinished", 11)
    done = sorted(read_records(out))
    (out / f"class/c/{done[0][0]}/{done[0][1]}").unlink()
    found = verify_output(out)
    assert (found.state, found.damaged) == ("damaged", {done[0]})
    again = run_again(source, class_network(), out, client, found.damaged, rest=False)
    assert (again.tiles, again.resumed_tiles) == (1, 4)
    assert sorted(read_records(out)) == done
    assert (verify_output(out).state, verify_output(out).faults) == ("unfinished", ())
    assert "run" not in read_header(out)
    last = run(source, class_network(), out, client)
    assert (last.tiles, last.resumed_tiles) == (11, 5)
    assert verify_output(out).state == "sound"
    assert np.array_equal(stored(out), whole(class_network(), source))


PARTS = {
    "x gone": ("x/c/0", None),
    "y cut": ("y/c/0", -3),
    "x named no more": ("x/zarr.json", None),
    "class cut": ("class/zarr.json", -30),
    "class gone": ("class/zarr.json", None),
    "status gone": ("status/c/0/0", None),
    "status flipped": ("status/c/0/0", 0),
    "status forgotten": ("status/zarr.json", None),
    "reference gone": ("spatial_ref/zarr.json", None),
}


@pytest.mark.parametrize("zarr_format", [3, 2])
def test_damaged_metadata_and_coordinates_are_found_and_written_again(
    tmp_path: Path, client: Client, zarr_format: int
) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    run(source, class_network(), out, client, zarr_format=zarr_format)
    expected = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    header = read_header(out)
    for what, (name, cut) in PARTS.items():
        if zarr_format == 2:
            name = name.replace("/zarr.json", "/.zarray").replace("/c/", "/")
        file = out / name
        value = file.read_bytes()
        if cut is None:
            file.unlink()
        else:
            file.write_bytes(value[:cut] if cut else value[:-9] + bytes([value[-9] ^ 1]) + value[-8:])
        found = verify_output(out)
        assert (found.state, [part.array for part in found.parts]) == ("damaged", [name.split("/")[0]]), what
        assert found.faults == (), what
        mend_parts(out, found.parts, tile_states(out, header))
        assert verify_output(out).state == "sound", what
        assert open_raster(out).place.crs == open_raster(source).place.crs
        # The CRS comes back from another spelling of it.
        same = [path for path in expected if path.parent.name != "spatial_ref" and path.name != ".zmetadata"]
        assert all(path.read_bytes() == expected[path] for path in same), what
    if zarr_format == 2:
        (out / ".zmetadata").write_bytes(b'{"metadata"')
        found = verify_output(out)
        assert [part.array for part in found.parts] == [".zmetadata"]
        mend_parts(out, found.parts, tile_states(out, header))
        assert verify_output(out).state == "sound"


def test_an_array_that_cannot_be_opened_is_one_line_for_a_run(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    interrupt(source, out, client)
    (out / "class/zarr.json").write_text('{"zarr_format": 3, "node_')
    with pytest.raises(OutputError, match=r"no usable metadata of its array class: .*; outsize verify --repair writes"):
        run(source, class_network(), out, client)
    forget(out, "fingerprint")
    for call in (lambda: verify_output(out), lambda: run(source, class_network(), out, client)):
        with pytest.raises(OutputError, match=r"has damaged metadata \(KeyError: 'fingerprint'\); segment --overwrite"):
            call()
    (out / "zarr.json").write_text('{"zarr_format": 3, "node_')
    for call in (lambda: verify_output(out), lambda: run(source, class_network(), out, client)):
        with pytest.raises(OutputError, match=r"is not an output of outsize: .*; remove it, or choose another path"):
            call()


def test_an_output_whose_run_was_just_killed_is_verified_at_once(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    interrupt(source, out, client)
    path = run_folder(out) / "run-1.json"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        began = datetime.now().astimezone().isoformat(timespec="seconds")
        values = {**json.loads(path.read_text()), "pid": other.pid, "began": began, "ended": "", "how": ""}
        path.write_text(json.dumps(values))
        with pytest.raises(OutputError, match=f"is being written by process {other.pid}"):
            verify_output(out)
        other.kill()
        # Dead, though nobody has taken notice of it yet.
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert verify_output(out).state == "unfinished"


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
