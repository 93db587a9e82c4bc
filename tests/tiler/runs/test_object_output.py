"""Outputs in an S3 bucket, by a real server on loopback: equal to local ones, through faults, and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from outsize.pipelines.commands.cli import cli
from outsize.tiler.base.errors import BudgetError, OutputError
from outsize.tiler.base.geometry import Window
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.output.records import RECORDS, RunFolder, find_runs, is_there, read_owner, read_records, run_folder
from outsize.tiler.output.store import open_array
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.events import Event, TileFinished
from outsize.tiler.runs.verify import verify_output
from outsize.tiler.system.files import find_matching, sizes_below
from outsize.tiler.system.journal import PART_BYTES, open_journal, read_journal
from outsize.tiler.system.places import STORE_OPTIONS, place_of
from rasterio.io import MemoryFile

from ...support.object_server import BUCKET, Faults, ObjectServer, upload
from ...support.rasters import unique_pixels, write_geotiff
from ...support.runs import class_network, run, scene, stored, whole

pytestmark = pytest.mark.system


def contents(out: Path) -> dict[str, bytes]:
    """Every chunk of an output, the tiles' states among them."""
    if isinstance(out, Path):
        names = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    else:
        sizes = sizes_below(out)
        names = list(sizes.__self__)  # pyright: ignore[reportFunctionMemberAccess] - the listing itself
    return {name: (out / name).read_bytes() for name in names if not name.endswith("zarr.json")}


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(), id="calm", marks=pytest.mark.long),
        pytest.param(Faults(errors=29, cuts=23, slow=19), id="faults", marks=pytest.mark.long),
    ],
)
def test_from_bucket_to_bucket_equals_the_local_run(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    source = scene(tmp_path, 150, 141, nodata=True)
    run(source, class_network(), tmp_path / "o.zarr", client)
    base = f"both/{faults.errors}"
    url = upload(server, source, f"{base}.tif")
    server.use(monkeypatch, faults)
    out = place_of(f"s3://{BUCKET}/{base}.zarr")
    summary = run(url, class_network(), out, client)  # pyright: ignore[reportArgumentType]
    assert not faults.errors or min(server.count_faults().values()) >= 3
    assert summary.failed_tiles == ()
    assert contents(out) == contents(tmp_path / "o.zarr")
    again = run(url, class_network(), out, client)  # pyright: ignore[reportArgumentType]
    assert (again.tiles, again.resumed_tiles) == (0, 9)
    found = verify_output(out)
    assert (found.faults, found.unfinished, found.has_records) == ((), (), True)
    assert [json.loads(path.read_text())["how"] for _, path in find_runs(run_folder(out))] == ["finished"] * 2


def test_an_interrupted_run_is_gone_on_with(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch)
    source, out = scene(tmp_path, 200, 200), place_of(f"s3://{BUCKET}/again/o.zarr")

    def stop(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, class_network(), out, client, listener=stop)
    assert len(read_records(out)) == 5
    # One chunk of what was done is lost, another changed on the way.
    first, second = list(read_records(out))[:2]
    (out / f"class/c/{first[0]}/{first[1]}").unlink()
    (out / f"class/c/{second[0]}/{second[1]}").write_bytes(b"")
    summary = run(source, class_network(), out, client)
    assert (summary.resumed_tiles, summary.failed_tiles) == (3, ())
    assert np.array_equal(stored(out), whole(class_network(), source))
    (out / "class/c/1/1").write_bytes((out / "class/c/1/1").read_bytes()[:-1] + b"?")
    assert [(fault.row, fault.column) for fault in verify_output(out).faults] == [(1, 1)]


def test_an_output_that_was_half_made_or_half_removed_is_begun_anew(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch)
    source, out = scene(tmp_path, 100, 100), place_of(f"s3://{BUCKET}/half/o.zarr")
    run(source, class_network(), out, client)
    (out / "zarr.json").unlink()
    with pytest.raises(OutputError, match="is not an output of outsize"):
        run(source, class_network(), out, client)  # without its mark it may be anybody's
    (run_folder(out) / "making").write_bytes(b"")
    assert not is_there(out)
    summary = run(source, class_network(), out, client)
    assert (summary.tiles, is_there(out)) == (4, True)
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_of_two_runs_one_gets_the_output(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch)
    source, out = scene(tmp_path, 100, 100), place_of(f"s3://{BUCKET}/two/o.zarr")
    with (
        RunFolder(out),
        pytest.raises(OutputError, match=r"is being written by another run: process \d+ .* generation 1"),
    ):
        run(source, class_network(), out, client)
    run(source, class_network(), out, client)
    path = run_folder(out) / "run-1.json"
    before = {**json.loads(path.read_text()), "ended": "", "how": ""}
    # Another process of this machine: its end can be seen.
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        time.sleep(1.1)
        before["began"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        path.write_text(json.dumps({**before, "pid": other.pid}))
        with pytest.raises(OutputError, match=rf"is being written by another run: process {other.pid}"):
            run(source, class_network(), out, client)
        other.kill()
    assert run(source, class_network(), out, client).resumed_tiles == 4
    # A process of another machine, which showed itself a moment ago.
    (run_folder(out) / "run-2.json").write_text(json.dumps({**before, "host": "elsewhere", "machine": "another"}))
    with pytest.raises(OutputError, match=r"was being written \d+ s ago by process .* on elsewhere.*; if that is dead"):
        run(source, class_network(), out, client)
    owner = read_owner(run_folder(out))
    assert owner is not None
    assert (owner.generation, owner.host) == (2, "elsewhere")


def test_refusals_keep_their_words(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch)
    source, out = scene(tmp_path, 100, 100), place_of(f"s3://{BUCKET}/words/o")
    run(source, class_network(), out, client)
    with pytest.raises(OutputError, match=rf"^{out} exists; choose another path, or --overwrite$"):
        run(source, class_network(), out, client, resume=False)
    with pytest.raises(OutputError, match=rf"^{out} was made by another run: .*; --overwrite replaces it$"):
        run(source, class_network(), out, client, fill=(1, 2, 3))
    with pytest.raises(BudgetError):
        run(source, class_network(), out, client, memory="1MB")


def test_a_run_that_lost_its_output_writes_no_more(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch)
    source, out = scene(tmp_path, 200, 200), place_of(f"s3://{BUCKET}/lost/o.zarr")

    def usurp(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 1:
            (run_folder(out) / "run-2.json").write_bytes(b"{}")

    with pytest.raises(OutputError, match="belongs to a later run by now, this is a tile of run 1"):
        run(source, class_network(), out, client, listener=usurp)


@pytest.mark.parametrize("place", ["no-such-bucket/o.zarr", "port"])
def test_a_bucket_that_cannot_be_written_is_said(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    server.use(monkeypatch)
    source = scene(tmp_path, 70, 70)
    if place == "port":
        nowhere = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        monkeypatch.setitem(STORE_OPTIONS, "s3", nowhere)
        place = f"{BUCKET}/o.zarr"
    with pytest.raises(OutputError, match=rf"s3://{place} cannot be written: .*; when it can, the same"):
        run(source, class_network(), place_of(f"s3://{place}"), client)


def test_a_copy_into_a_bucket_equals_the_local_one_and_is_gone_on_with(
    tmp_path: Path, client: Client, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch, Faults(errors=31))
    source, out = scene(tmp_path, 520, 600, nodata=True), place_of(f"s3://{BUCKET}/copy/s.zarr")
    copy_raster(open_raster(source), tmp_path / "s.zarr", client=client)

    def stop(progress: object) -> None:
        if progress.advanced:  # pyright: ignore[reportAttributeAccessIssue]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_raster(open_raster(source), out, client=client, listener=stop)
    assert not out.exists()
    summary = copy_raster(open_raster(source), out, client=client)
    assert summary.resumed_cells == 1
    assert contents(out) == contents(tmp_path / "s.zarr")
    assert not run_folder(out).exists()
    assert not out.with_name("s.zarr.creating").exists()
    with pytest.raises(OutputError, match="exists; choose another path, or --overwrite"):
        copy_raster(open_raster(source), out, client=client)
    copy_raster(open_raster(source), out, client=client, overwrite=True)
    assert contents(out) == contents(tmp_path / "s.zarr")


def test_a_journal_of_objects_comes_in_parts(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.use(monkeypatch)
    folder = place_of(f"s3://{BUCKET}/journal")
    lines = [f"{number:0>50000}" for number in range(12)]
    first, second = open_journal(folder, RECORDS, 2), open_journal(folder, RECORDS, 10)
    for number, line in enumerate(lines):
        (first if number < 10 else second).add(line)
        if number % 3 == 2:
            first.sync()
    assert list(read_journal(folder, RECORDS)) == lines[:10]
    first.close()
    second.close()
    assert list(read_journal(folder, RECORDS)) == lines
    assert max(path.stat().st_size for path in folder.iterdir()) < PART_BYTES + 2 * 50001


@pytest.mark.long
def test_the_commands_take_buckets(tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.use(monkeypatch)

    def outsize(*words: str) -> str:
        command = [sys.executable, "-W", "ignore", "-m", "outsize.pipelines.commands.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    outsize("sample", str(tmp_path / "demo"), "--size", "600")
    base = f"s3://{BUCKET}/all"
    upload(server, tmp_path / "demo" / "scene.zarr", "all/scene.zarr")
    upload(server, tmp_path / "demo" / "labels.zarr", "all/labels.zarr")
    options = ("--no-dashboard", "--core", "256", "--engine", "torch")
    outsize("segment", f"{base}/scene.zarr", f"{base}/map [1].zarr", *options)
    out = place_of(f"{base}/map [1].zarr")
    before = contents(out)
    assert len(before) == 12
    (out / "class/c/0/1").write_bytes(before["class/c/0/1"][:-1])
    assert "1 damaged tile computed again" in outsize("verify", str(out), "--repair", "--no-dashboard")
    assert contents(out) == before
    assert outsize("evaluate", str(out), f"{base}/labels.zarr").startswith("accuracy 0.9")
    outsize("export", str(out), f"{base}/map.tif")
    raster = open_raster(f"{base}/map.tif")
    assert np.array_equal(raster.open_reader().read(Window.whole(raster.shape_yx)), stored(out))
    upload(server, tmp_path / "demo" / "scene.zarr", "batch/a.zarr")
    outsize("segment", f"s3://{BUCKET}/batch/*.zarr", "--out-dir", f"{base}/maps", *options)
    assert contents(place_of(f"{base}/maps/a.zarr")) == before
    assert json.loads(place_of(f"{base}/maps/batch.jsonl").read_text())["state"] == "done"
    assert find_matching(f"{base}/maps/*.zarr") == [f"{base}/maps/a.zarr"]


@pytest.mark.long
def test_a_batch_its_verification_and_export_in_a_bucket(
    tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_geotiff(tmp_path / "small.tif", unique_pixels(4, 70, 90, np.uint8))
    url = upload(server, source, "commands/in/small.tif")
    server.use(monkeypatch)
    base = f"s3://{BUCKET}/commands"
    words = ["--out-dir", f"{base}/maps", "--no-dashboard", "--engine", "torch", "--workers", "1"]

    def call(*arguments: str) -> dict[str, Any]:
        cli.main(["--json", *arguments], prog_name="outsize", standalone_mode=False)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert url.startswith(base)
    done = call("segment", f"{base}/in/*.tif", *words)
    assert [entry["state"] for entry in done["results"]] == ["done"]
    out = place_of(f"{base}/maps/small.zarr")
    value = (out / "class/c/0/0").read_bytes()
    (out / "class/c/0/0").unlink()
    (out / "x/c/0").unlink()
    repaired = call("verify", str(out), "--repair", "--no-dashboard", "--samples", "1")
    assert (repaired["state"], repaired["repaired_tiles"], repaired["repaired_arrays"]) == ("sound", 1, 1)
    assert (out / "class/c/0/0").read_bytes() == value
    call("export", str(out), f"{base}/maps/small.tif")
    with MemoryFile(place_of(f"{base}/maps/small.tif").read_bytes()) as file, file.open() as cog:
        assert np.array_equal(cog.read(1), np.asarray(open_array(out, "class")[...]))
