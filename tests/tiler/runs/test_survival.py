"""What happens to processes, disks and sources must not happen to results. Workers are processes here."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster
from filelock import FileLock
from outsize import __version__
from outsize.tests.support.commands import Command, outsize
from outsize.tests.support.deadly import make_deadly
from outsize.tests.support.kill_campaign import VICTIMS, Campaign, hash_chunks
from outsize.tiler.base.errors import OutputError, RasterError
from outsize.tiler.cluster.client import ClusterError, ClusterOptions, open_client
from outsize.tiler.output.records import RECORDS, RunFolder, find_runs, read_owner, run_folder
from outsize.tiler.output.store import read_header, update_header, write_core
from outsize.tiler.rasters.raster import Raster
from outsize.tiler.runs.events import Event, RunPlanned, TileFinished
from outsize.tiler.runs.run import predict
from outsize.tiler.runs.summary import RunSummary
from outsize.tiler.runs.verify import verify_output
from outsize.tiler.system.files import create_new, write_whole
from outsize.tiler.system.journal import read_journal

from ...support.rasters import write_geotiff
from ...support.runs import class_network, logit_network, passed_check, random_image, run, scene, stored, whole
from ...support.small_model import save_small_model

pytestmark = pytest.mark.system

HERE = ClusterOptions(dashboard_address=None)


def run_here(raster: Path | Raster, out: Path, **options: Any) -> RunSummary:
    """With two worker processes of its own."""
    settings: dict[str, Any] = {
        "engine": "openvino",
        "core": 64,
        "memory": "4GB",
        "workers": 2,
        "threads": 1,
        **options,
    }
    return predict(raster, class_network(), out, cluster=HERE, **settings)


@pytest.fixture
def _no_start_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reference would read the deadly pixel in this process."""
    monkeypatch.setattr("outsize.tiler.runs.execution.run_start_check", lambda *_: passed_check())


LAST = (319, 319)
"""Of a raster of 320 x 320, a pixel that only the last of 25 tiles reads."""


@pytest.mark.usefixtures("_no_start_check")
def test_a_tile_that_kills_its_worker_is_set_aside_and_no_other_is_lost(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 320, 320), tmp_path / "o.zarr"
    summary = run_here(make_deadly(source, LAST, "kill"), out)
    assert summary.failed_tiles == ((4, 4, "its worker process died"),)
    result, expected = stored(out), whole(class_network(), source)
    assert (result[:, 256:, 256:] == 255).all()
    result[:, 256:, 256:] = expected[:, 256:, 256:]
    assert np.array_equal(result, expected)
    # The raster heals: only that tile is done again, and only when asked for.
    how: dict[str, Any] = {"engine": "openvino"}
    assert run(source, class_network(), out, client, **how).failed_tiles == summary.failed_tiles
    again = run(source, class_network(), out, client, **how, retry_failed=True)
    assert (again.tiles, again.resumed_tiles, again.failed_tiles) == (1, 24, ())
    assert np.array_equal(stored(out), expected)


@pytest.mark.usefixtures("_no_start_check", "_warm_workers")
def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    assert run_here(make_deadly(source, (100, 100), "once"), out).failed_tiles == ()
    assert (tmp_path / "killed-once").exists()
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_workers_end_without_a_scheduler_in_time() -> None:
    with open_client(HERE, workers=1, threads=1, gdal_cache_bytes=1 << 20) as client:
        timeouts: Any = client.run(lambda dask_worker: dask_worker.death_timeout)
        assert list(timeouts.values()) == [60]


def test_another_version_of_the_engine_is_refused(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scene(tmp_path, 100, 100), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    monkeypatch.setattr("outsize.tiler.engines.own.version", lambda _: "0.1.2")
    with pytest.raises(OutputError, match=r"engine version \S+ there, 0\.1\.2 now; --overwrite replaces it"):
        run(source, class_network(), out, client)


@pytest.mark.long
@pytest.mark.usefixtures("_no_start_check", "_warm_workers")
def test_a_hanging_worker_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outsize.tiler.cluster.schedule.LOOK_EVERY_S", 0.5)
    monkeypatch.setattr("outsize.tiler.cluster.schedule.HANGS_FACTOR", 1)
    monkeypatch.setattr("outsize.tiler.cluster.schedule.RESTART_S", 3)
    source, out = scene(tmp_path, 320, 320), tmp_path / "o.zarr"
    summary = run_here(make_deadly(source, LAST, "stop"), out, patience=4.0)
    ((row, column, reason),) = summary.failed_tiles
    assert (row, column) == (4, 4)
    assert "no answer from its worker within" in reason
    result, expected = stored(out), whole(class_network(), source)
    result[:, 256:, 256:] = expected[:, 256:, 256:]
    assert np.array_equal(result, expected)


def test_chunks_are_flushed_before_their_record_is_made(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()
    truth = os.fsync

    def fsync(handle: int) -> None:
        flushed.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
        truth(handle)

    missing: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, TileFinished):
            names = [out / name for name in event.record.chunks]
            folders = {folder for name in names for folder in name.parents if out in folder.parents}
            missing.extend(str(path) for path in (*names, *folders) if str(path) not in flushed)

    out = tmp_path / "o.zarr"
    monkeypatch.setattr(os, "fsync", fsync)
    run(scene(tmp_path, 150, 150), class_network(), out, client, listener=listen)
    assert not missing
    lines = [json.loads(line) for line in read_journal(run_folder(out), RECORDS)]
    assert all(sum(size for size, _ in line["chunks"].values()) > 0 for line in lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, client: Client) -> tuple[Path, Path]:
    """A raster, and the finished output of 16 tiles."""
    folder = tmp_path_factory.mktemp("finished")
    source = scene(folder, 200, 200)
    run(source, class_network(), folder / "o.zarr", client)
    return source, folder / "o.zarr"


@pytest.fixture
def source_and_out(tmp_path: Path, finished: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same; the output is a copy with its run's folder, to be damaged."""
    source, out = finished
    for folder in (out, Path(run_folder(out))):
        shutil.copytree(folder, tmp_path / folder.name)
    return source, tmp_path / out.name


@pytest.mark.parametrize("damage", ["cut", "emptied", "zeros", "flipped", "gone", "record"])
def test_torn_files_of_a_run_that_died_are_done_again(
    source_and_out: tuple[Path, Path], client: Client, damage: str
) -> None:
    source, out = source_and_out
    expected = hash_chunks(out)
    path = run_folder(out) / "run-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ended": "", "how": ""}))  # as a power cut leaves it
    chunk, records_file = out / "class/c/2/1", run_folder(out) / "records-1.jsonl"
    value = chunk.read_bytes()
    match damage:
        case "cut":
            chunk.write_bytes(value[:-1])
        case "emptied":
            chunk.write_bytes(b"")
        case "zeros":
            chunk.write_bytes(bytes(len(value)))
        case "flipped":
            chunk.write_bytes(value[:-20] + bytes([value[-20] ^ 1]) + value[-19:])
        case "gone":
            chunk.unlink()
        case _:
            kept = [line for line in records_file.read_text().splitlines() if '"row": 2, "column": 1,' not in line]
            records_file.write_text("\n".join(kept) + '\n{"row": 2, "column": 1, "st')
    again = run(source, class_network(), out, client)
    assert (again.tiles, again.resumed_tiles) == (1, 15)
    assert hash_chunks(out) == expected


def test_a_call_in_between_does_not_make_torn_files_believed(source_and_out: tuple[Path, Path], client: Client) -> None:
    source, out = source_and_out
    expected = hash_chunks(out)
    path = run_folder(out) / "run-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ended": "", "how": ""}))
    chunk = out / "class/c/2/1"
    value = chunk.read_bytes()
    chunk.write_bytes(value[:-20] + bytes([value[-20] ^ 1]) + value[-19:])
    with pytest.raises(OutputError, match="cores of 64, got 128"):
        run(source, class_network(), out, client, core=128)

    def stop(event: Event) -> None:
        if isinstance(event, RunPlanned):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # it has seen the fault, and mends nothing
        run(source, class_network(), out, client, listener=stop)
    again = run(source, class_network(), out, client)
    assert (again.tiles, again.resumed_tiles) == (1, 15)
    assert hash_chunks(out) == expected


@pytest.mark.parametrize(
    "line",
    [
        '"state": "done", "chunks": null',
        '"state": "done", "chunks": {"class/c/2/1": 5}',
        '"state": "done", "chunks": {"class/c/2/1": ["5", 7]}',
        '"state": ["done"], "chunks": {}',
        '"chunks": {}',
    ],
)
def test_a_damaged_record_is_disbelieved_and_its_tile_done_again(
    source_and_out: tuple[Path, Path], client: Client, line: str
) -> None:
    source, out = source_and_out
    with (run_folder(out) / "records-1.jsonl").open("a") as file:
        file.write(f'{{"row": 2, "column": 1, {line}}}\n')
        file.write("[1]\n" + "[" * 100_000 + "\n" + '{"row": "2", "column": 1}\n')
        file.write(
            '{"row": 99, "column": 0, "state": "done", "chunks": {}}\n{"row": -1, "column": 0, "state": "failed"}\n'
        )
    assert verify_output(out).unfinished == ((2, 1),)
    again = run(source, class_network(), out, client)
    assert (again.tiles, again.resumed_tiles, again.failed_tiles) == (1, 15, ())
    assert verify_output(out).unfinished == ()


def test_the_owner_of_a_lock_is_named_and_a_dead_one_told(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    with (
        RunFolder(out),
        pytest.raises(
            OutputError, match=rf"another run: process {os.getpid()} of .* on .*, begun 20.*, generation 1, last"
        ),
    ):
        run(source, class_network(), out, client)
    run(source, class_network(), out, client)
    assert [json.loads(path.read_text())["how"] for _, path in find_runs(run_folder(out))] == ["finished"]
    # On another machine, whose lock this one may not see, and which showed itself a moment ago.
    path = run_folder(out) / "run-1.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "host": "elsewhere", "machine": "another", "ended": ""}))
    with pytest.raises(OutputError, match=r"was being written \d+ s ago by process .* on elsewhere.*; if that is dead"):
        run(source, class_network(), out, client)
    os.utime(path, (time.time() - 100, time.time() - 100))
    died: list[str | None] = []
    run(source, class_network(), out, client, listener=lambda event: died.append(getattr(event, "died", None)))
    assert died[0] is not None
    assert "on elsewhere" in died[0]
    owner = read_owner(run_folder(out))
    assert owner is not None
    assert (owner.generation, owner.host) == (2, socket.gethostname())


def test_without_locks_the_last_call_is_respected_while_its_process_lives(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", refuse)
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    path = run_folder(out) / "run-1.json"
    before = {**json.loads(path.read_text()), "ended": "", "how": ""}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        time.sleep(1.1)
        began = datetime.now().astimezone().isoformat(timespec="seconds")
        path.write_text(json.dumps({**before, "pid": other.pid, "began": began}))
        with pytest.raises(OutputError, match=rf"is being written by another run: process {other.pid} "):
            run(source, class_network(), out, client)
        # That number was another process's once.
        path.write_text(json.dumps({**before, "pid": other.pid, "began": "2020-01-01T00:00:00+00:00"}))
        assert run(source, class_network(), out, client).resumed_tiles == 4
        other.kill()
    assert find_runs(run_folder(out))[-1][0] == 2
    # Of two calls at one moment one makes the file of the next generation.
    assert create_new(run_folder(out) / "run-3.json", b"one")
    assert not create_new(run_folder(out) / "run-3.json", b"two")


def test_tiles_of_a_run_that_was_replaced_write_nothing(tmp_path: Path, client: Client) -> None:
    """A zombie worker of an external cluster, after its output was taken over."""
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"

    def usurp(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 1:
            (run_folder(out) / "run-2.json").write_text("{}")

    with pytest.raises(OutputError, match="belongs to a later run by now, this is a tile of run 1"):
        run(source, class_network(), out, client, listener=usurp)


def test_a_source_that_is_gone_stops_the_run_and_fails_no_tile(tmp_path: Path, client: Client) -> None:
    disk, out, hidden = tmp_path / "disk", tmp_path / "o.zarr", tmp_path / "hidden"
    disk.mkdir()
    source = scene(disk, 300, 300)

    def vanish(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 2:
            client.run(_close_readers)
            disk.rename(hidden)  # as a disk that is unmounted: nothing of the file changes

    with pytest.raises(RasterError, match="is gone; when it is back, the same command goes on"):
        run(source, class_network(), out, client, listener=vanish)
    hidden.rename(disk)
    summary = run(source, class_network(), out, client)
    assert summary.resumed_tiles >= 2
    assert summary.failed_tiles == ()
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_a_worker_that_does_not_see_the_source_stops_the_run_and_fails_no_tile(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does on which a share is not mounted, though the command sees it."""
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"

    def unmounted(*_: object) -> None:
        raise RasterError(f"{source} is gone; when it is back, the same command goes on")

    def unmount(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 2:
            monkeypatch.setattr("outsize.tiler.rasters.gdal_files.GdalReader.read", unmounted)
            monkeypatch.setattr("outsize.tiler.runs.worker.require_source", unmounted)

    with pytest.raises(RasterError, match=r"worker inproc://\S+ .* cannot do this run: .* is gone; when it is back"):
        run(source, class_network(), out, client, listener=unmount)
    monkeypatch.undo()
    summary = run(source, class_network(), out, client)
    assert summary.failed_tiles == ()
    assert summary.resumed_tiles >= 2


@pytest.mark.parametrize("put_back", [False, True])
def test_a_source_that_is_changed_makes_no_mixed_map(tmp_path: Path, client: Client, put_back: bool) -> None:
    source, out, kept = scene(tmp_path, 300, 300), tmp_path / "o.zarr", tmp_path / "kept.tif"
    other = write_geotiff(tmp_path / "other.tif", random_image(300, 300, seed=1))
    shutil.copy2(source, kept)

    def change(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 3:
            source.write_bytes(other.read_bytes())  # as `cat other.tif > scene.tif`

    with pytest.raises(RasterError, match=r"was changed while it was read; segment --overwrite begins anew"):
        run(source, class_network(), out, client, listener=change)
    assert "run" not in read_header(out)
    if put_back:
        shutil.copy2(kept, source)
    with pytest.raises(OutputError, match="the input was changed while that run read it; --overwrite replaces it"):
        run(source, class_network(), out, client)
    assert run(source, class_network(), out, client, overwrite=True).resumed_tiles == 0
    assert np.array_equal(stored(out), whole(class_network(), source))


@pytest.fixture
def _looking_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is described again after every tile."""
    monkeypatch.setattr("outsize.tiler.output.resume.GUARD_EVERY_S", 0.0)
    monkeypatch.setattr("outsize.tiler.output.resume.GUARD_SHARE", 0)


def put_other_pixels(source: Path, how: str) -> None:
    """Other pixels under the same name, of the same size and time of change."""
    before, other = source.stat(), source.with_name("other.tif")
    write_geotiff(other, random_image(300, 300, seed=1))
    assert other.stat().st_size == before.st_size
    if how == "written over":
        source.write_bytes(other.read_bytes())
    else:
        other.replace(source)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.usefixtures("_looking_always")
@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_other_pixels_of_the_same_size_and_time_make_no_mixed_map(tmp_path: Path, client: Client, how: str) -> None:
    source, out = scene(tmp_path, 300, 300), tmp_path / "o.zarr"

    def change(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 3:
            put_other_pixels(source, how)

    with pytest.raises(RasterError, match=r"was changed while it was read; segment --overwrite begins anew"):
        run(source, class_network(), out, client, listener=change)
    assert "run" not in read_header(out)
    # Not continued on anybody's word either: some tiles are of the one content, some of the other.
    for vouched in (False, True):
        with pytest.raises(OutputError, match="the input was changed while that run read it; --overwrite replaces it"):
            run(source, class_network(), out, client, source_unchanged=vouched)


class _StopError(Exception):
    """Of a listener, in the middle of a run."""


def test_a_run_does_not_go_on_with_other_pixels_of_the_same_size_and_time(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 300, 300), tmp_path / "o.zarr"
    kept, before = source.read_bytes(), source.stat()

    def stop(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 3:
            raise _StopError

    with pytest.raises(_StopError):
        run(source, class_network(), out, client, listener=stop)
    put_other_pixels(source, "written over")
    with pytest.raises(OutputError, match=r"its size and time of change put back .* --source-unchanged goes on"):
        run(source, class_network(), out, client)
    # A copy that is put back looks the same; whoever knows may say so.
    source.write_bytes(kept)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(source, class_network(), out, client, source_unchanged=True).resumed_tiles >= 3
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_what_was_begun_before_states_were_kept_goes_on(source_and_out: tuple[Path, Path], client: Client) -> None:
    source, out = source_and_out
    fingerprint = {name: value for name, value in read_header(out)["fingerprint"].items() if name != "input_state"}
    update_header(out, {"fingerprint": fingerprint})
    assert run(source, class_network(), out, client).tiles == 0


@pytest.mark.usefixtures("_looking_always")
def test_a_changed_source_is_found_before_the_end(tmp_path: Path, client: Client) -> None:
    source, out, seen = scene(tmp_path, 300, 300), tmp_path / "o.zarr", list[int]()

    def change(event: Event) -> None:
        if isinstance(event, TileFinished):
            seen.append(event.finished)
            os.utime(source)

    with pytest.raises(RasterError, match="was changed while it was read"):
        run(source, class_network(), out, client, listener=change)
    assert seen == [1]


def test_what_viewers_leave_beside_a_source_is_no_change(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 150, 150), tmp_path / "o.zarr"

    def look(event: Event) -> None:
        if isinstance(event, TileFinished):
            source.with_name(f"{source.name}.aux.xml").write_text("<PAMDataset></PAMDataset>")

    assert run(source, class_network(), out, client, listener=look).failed_tiles == ()


def _close_readers() -> None:
    from outsize.tiler.cluster.jobs import _RUNNERS

    for runner in _RUNNERS.values():
        runner.close()


@pytest.mark.parametrize("what", ["output", "run folder"])
def test_an_output_that_is_gone_stops_the_run(tmp_path: Path, client: Client, what: str) -> None:
    source, out = scene(tmp_path, 300, 300), tmp_path / "o.zarr"
    place = out if what == "output" else run_folder(out)

    def vanish(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 2:
            place.rename(tmp_path / "hidden")

    with pytest.raises(OutputError) as refusal:
        run(source, class_network(), out, client, listener=vanish)
    assert "the same command goes on" in str(refusal.value)
    # The lock's folder may have come back, or one with the chunk that was just being written.
    shutil.rmtree(place, ignore_errors=True)
    (tmp_path / "hidden").rename(place)
    assert run(source, class_network(), out, client).failed_tiles == ()
    assert np.array_equal(stored(out), whole(class_network(), source))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_stops_the_run_which_goes_on_with_room(tmp_path: Path, client: Client, small_disk: Path) -> None:
    source, network, out = scene(tmp_path, 400, 400), logit_network("unet depth 1"), small_disk / "o.zarr"
    run(source, network, tmp_path / "calm.zarr", client)
    with pytest.raises(OutputError, match="the output may need"):
        run(source, network, out, client)
    with pytest.raises(OutputError, match=r"no space left for .*; free some and run the same command again"):
        run(source, network, out, client, space_check=False)
    with pytest.raises(OutputError, match="no space left"):  # nor is there now
        run(source, network, out, client, space_check=False)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    summary = run(source, network, out, client, space_check=False)
    assert summary.failed_tiles == ()
    assert summary.resumed_tiles > 5
    assert hash_chunks(out) == hash_chunks(tmp_path / "calm.zarr")


def test_a_quota_stops_the_run_as_a_full_disk_does(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, writes = scene(tmp_path, 300, 300), tmp_path / "o.zarr", count()

    def write(*arguments: Any) -> None:
        if next(writes) == 3:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(out / "class"))
        write_core(*arguments)

    monkeypatch.setattr("outsize.tiler.runs.worker.write_core", write)
    with pytest.raises(OutputError, match=r"no space left for .*; free some and run the same command again"):
        run(source, class_network(), out, client)
    summary = run(source, class_network(), out, client)
    assert summary.failed_tiles == ()
    assert summary.resumed_tiles >= 1
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_a_file_that_a_full_disk_cut_short_is_not_left(small_disk: Path) -> None:
    (small_disk / "run-1.json").write_bytes(b"{}")
    with pytest.raises(OSError, match="No space left"):
        write_whole(small_disk / "run-1.json", bytes(1_000_000))
    assert [path.name for path in small_disk.iterdir()] == ["run-1.json"]


def test_a_disk_that_turns_read_only_can_be_gone_on_with(tmp_path: Path, client: Client, small_disk: Path) -> None:
    source, out = scene(tmp_path, 300, 300), small_disk / "o.zarr"

    def interrupt(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, class_network(), out, client, listener=interrupt)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match=r"no permission to write .*run the same command again"):
        run(source, class_network(), out, client)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    summary = run(source, class_network(), out, client)
    assert summary.failed_tiles == ()
    assert summary.resumed_tiles >= 3
    assert np.array_equal(stored(out), whole(class_network(), source))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of 64 tiles."""
    folder = tmp_path_factory.mktemp("demo")
    assert outsize("sample", folder, "--size", "1024").returncode == 0
    return folder / "scene.zarr"


class Segmenting:
    """`outsize segment` in a process of its own, from its first tile on."""

    def __init__(self, demo: Path, folder: Path, **how: Any) -> None:
        out = folder / "o.zarr"
        self.words = ["segment", str(demo), str(out), "--core", "128", "--no-dashboard"]
        self.folder, self._errors = run_folder(out), folder / "errors"
        with self._errors.open("wb") as errors:
            self.process = Command(*self.words, **{"stderr": errors, **how})
        while self.process.poll() is None and not (self.folder / "records-1.jsonl").exists():
            time.sleep(0.02)
        self.workers = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> str:
        """What it said on stderr, after it has ended, its workers with it."""
        self.process.wait(timeout=60)
        # Among them Python's tracker of semaphores, whose last word would be the command's too.
        assert not psutil.wait_procs(self.workers, timeout=10)[1]
        return self._errors.read_text()


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_sigterm_and_sighup_are_interruptions(tmp_path: Path, demo: Path, sign: signal.Signals) -> None:
    segmenting = Segmenting(demo, tmp_path)
    segmenting.process.send_signal(sign)
    segmenting.process.send_signal(sign)  # as batch systems and shells do
    errors = segmenting.end()
    assert segmenting.process.returncode == 130, errors
    assert "interrupted; the same command goes on where it stopped" in errors
    assert "Traceback" not in errors
    runs = [json.loads(path.read_text()) for _, path in find_runs(segmenting.folder)]
    assert [entry["how"] for entry in runs] == ["KeyboardInterrupt"]
    assert (runs[0]["plan"]["tiles"], runs[0]["versions"]["outsize"]) == (64, __version__)
    assert runs[0]["command"][1:] == segmenting.words


def test_a_second_ctrl_c_ends_at_once_with_one_line(tmp_path: Path, demo: Path) -> None:
    segmenting = Segmenting(demo, tmp_path)
    segmenting.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    segmenting.process.send_signal(signal.SIGINT)
    errors = segmenting.end()
    assert segmenting.process.returncode == 130, errors
    assert errors.splitlines()[-1] == "outsize: interrupted; the same command goes on where it stopped"
    assert "Traceback" not in errors


def test_a_lost_terminal_is_an_interruption_too(tmp_path: Path, demo: Path) -> None:
    ours, theirs = os.openpty()
    segmenting = Segmenting(demo, tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.close(ours)  # as the end of an ssh connection does
    segmenting.process.send_signal(signal.SIGHUP)
    segmenting.end()
    assert segmenting.process.returncode == 130
    assert json.loads((segmenting.folder / "run-1.json").read_text())["how"] == "KeyboardInterrupt"


def test_a_scheduler_that_is_gone_is_said(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 300, 300), tmp_path / "o.zarr"
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:

        def lose(event: Event) -> None:
            if isinstance(event, TileFinished) and event.finished == 2:
                cluster.close()

        with Client(cluster) as doomed, pytest.raises(ClusterError, match="the same command goes on"):
            run(source, class_network(), out, doomed, listener=lose)
    assert run(source, class_network(), out, client).failed_tiles == ()
    assert np.array_equal(stored(out), whole(class_network(), source))


@pytest.mark.parametrize(
    "victims",
    [
        # Other tests kill workers; here those of a killed client must not outlive it.
        pytest.param(("client", "scheduler"), id="short"),
        pytest.param(VICTIMS, id="all", marks=pytest.mark.long),
    ],
)
def test_kills_at_random_moments_lose_nothing(tmp_path: Path, victims: tuple[str, ...]) -> None:
    """Short campaigns; tests/support/kill_campaign.py has the long one."""
    campaign = Campaign(
        tmp_path,
        seed=5,
        size=384,
        core=64,
        victims=victims,
        latest=0.6,
        calm_share=0.0,
        more=("--model", save_small_model(tmp_path / "small.json")),
        start=lambda words, log: Command(*words, stderr=log),
    )
    campaign.run(len(victims))
    assert campaign.finished >= 1
    assert {victim for victim, count in campaign.kills.items() if count} == set(victims)
