"""Files that hold anything but what they should, and places that take no files: one line each, the right exit code, and
nothing left behind."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from distributed import Client
from outsize.pipelines.base.console import Console, format_table
from outsize.tests.support.commands import outsize_here
from outsize.tiler.base.errors import OutputError, UsageError
from outsize.tiler.base.text import one_line
from outsize.tiler.base.typed import fits
from outsize.tiler.copying.transfer import copy_raster
from outsize.tiler.output.records import read_owner, read_runs
from outsize.tiler.output.store import OutputDescription, plan_of, read_header
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.run import predict
from outsize.tiler.system.files import read_regular
from outsize.tiler.system.places import place_of, require_lasting

from ...support.rasters import unique_pixels, write_geotiff
from ...support.runs import class_network, scene

BAD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "folder": Path.mkdir,
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "zeros": lambda path: path.write_bytes(b"a=\0"),
    "deep": lambda path: path.write_text("a=" + "[" * 100_000),
    "deep object": lambda path: path.write_text('{"a":' * 100_000),
    "list": lambda path: path.write_text("[1]"),
    "text": lambda path: path.write_text('"x"'),
    "number": lambda path: path.write_text("1e999"),
    "holes": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_geotiff(tmp_path / "a.tif", unique_pixels(4, 20, 20, np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def require_one_line(*words: str | Path, code: int, where: str = "") -> None:
    """The command ends with that code, and says why in one line that names the file."""
    gc.disable()  # what other tests have left cannot be freed deep in a recursion, and would say so
    try:
        done = outsize_here(*words)
    finally:
        gc.enable()
    said = [line for line in done.stderr.splitlines() if "rror" in line]
    assert done.returncode == code, done.stderr
    assert len(said) == 1, done.stderr
    assert "outsize: unexpected" not in said[0]
    assert where in said[0]


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_in_one_line_wherever_they_are_read(folder: Path, what: str) -> None:
    BAD[what](folder / "bad")
    require_one_line("--config", "bad", "plan", "a.tif", code=2, where="bad")
    require_one_line("plan", "a.tif", "--model", "bad", code=2, where="bad")
    require_one_line("plan", "a.tif", "--model", "torch.nn:Identity", "--weights", "bad", code=2, where="bad")
    require_one_line("model", "show", "bad", code=2, where="bad")
    require_one_line("plan", "bad", code=1, where="bad")
    for command in (("export", "bad", "x.tif"), ("verify", "bad"), ("report", "bad"), ("evaluate", "bad", "a.tif")):
        require_one_line(*command, code=1, where="bad")
    if what not in ("zeros", "text", "number", "deep", "deep object", "list"):  # which are a list of missing rasters
        require_one_line("segment", "--list", "bad", "--out-dir", "o", "--dry-run", code=2, where="bad")
    if what not in ("pipe", "link to nothing", "link to itself", "folder"):
        # Those are no files, and so are taken for rasters.
        BAD[what](folder / "item.json")
        require_one_line("segment", "item.json", "--out-dir", "o", "--dry-run", code=2, where="item.json")
    assert not (folder / "o").exists()
    assert not (folder / "x.tif").exists()


def test_files_are_read_once_and_only_if_they_are_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_regular(tmp_path / "a") == read_regular(tmp_path / "a", 3) == b"abc"
    with pytest.raises(OSError, match="it has 3 bytes, at most 2 are read"):
        read_regular(tmp_path / "a", 2)
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="it is no file, but a pipe, a device or a socket"):
            read_regular(Path(name))


OUTPUTS = {
    "a link to nothing": "dangling",
    "a link to itself": "loop",
    "below a link to itself": "loop/o.zarr",
    "below a file": "file/o.zarr",
    "a name of 255 bytes": "n" * 255,
    "a name of 250 bytes": "n" * 250,
    "memory": "memory://o.zarr",
    "a server": "https://localhost:1/o.zarr",
    "a device": "/dev/null",
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_places_that_take_no_output_are_told_before_anything_is_made(folder: Path, what: str) -> None:
    out = OUTPUTS[what]
    (folder / "dangling").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    (folder / "file").touch()
    before = sorted(folder.iterdir())
    code = 2 if "://" in out else 1
    require_one_line("ingest", "a.tif", out, code=code, where=out[:100])
    for suffix in (".html", ".tif"):
        if "://" in out:
            with pytest.raises(UsageError, match="outputs go to folders of this machine or to s3://"):
                require_lasting(place_of(out.replace(".zarr", suffix)))
    assert sorted(folder.iterdir()) == before


def test_nothing_is_written_where_it_would_be_lost(folder: Path) -> None:
    raster = open_raster("a.tif")
    with pytest.raises(
        UsageError, match="outputs go to folders of this machine or to s3://, gs://, az://, abfs://; got"
    ):
        copy_raster(raster, "memory://o.zarr")
    with pytest.raises(UsageError, match="got memory://"):
        predict(raster, cast("Any", None), "memory://o.zarr")  # before the network is looked at
    for words in (
        ("sample", "memory://s", "--size", "8"),
        ("train", "a.tif", "--labels", "a.tif", "--out", "s3://b/t"),
        ("segment", "a.tif", "--out-dir", "memory://d"),
        ("model", "pack", "torch.nn:Identity", "s3://b/m.json"),
    ):
        done = outsize_here(*words)
        assert done.returncode == 2, done.stderr
        assert "://" in done.stderr
    assert list(folder.iterdir()) == [folder / "a.tif"]


def test_what_the_system_refuses_is_one_line_and_no_surprise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), "somewhere")

        return fail

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG):
        monkeypatch.setattr("outsize.pipelines.segment.sample.run_sample", refuse(number))
        done = outsize_here("sample", "s")
        assert done.returncode == 1
        assert done.stderr.startswith(f"outsize: error: somewhere: {os.strerror(number)}; ")
        assert done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == [folder / "a.tif"]


def test_names_forge_no_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\noutsize done\x1b[2J\r.tif"
    assert one_line(name) == "a\\noutsize done\\x1b[2J\\r.tif"
    done = outsize_here("plan", name)
    assert done.stderr.splitlines() == [f"outsize: error: no such raster: {one_line(name)}"]
    Console().remark(f"failed    {name}")
    Console().remark_lines(["a", name])
    assert capsys.readouterr().err.splitlines() == [f"failed    {one_line(name)}", "a", one_line(name)]
    assert format_table(["name"], [[name]]).count("\n") == 2
    (folder / "c.toml").write_text('"a\\nforged\\u001b[31m" = 1\n')
    done = outsize_here("--config", "c.toml", "plan", "a.tif")
    assert (done.returncode, "no command knows a\\nforged\\x1b[31m" in done.stderr) == (2, True)
    (folder / "list.txt").write_text("a.tif\x85b\x0b.tif\n")  # which end a line for some
    done = outsize_here("segment", "--list", "list.txt", "--out-dir", "o", "--dry-run")
    assert done.stderr.startswith("outsize: error: a.tif\\x85b\\x0b.tif must be written to a name")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, client: Client) -> Path:
    """A small class map, made in this process."""
    folder = tmp_path_factory.mktemp("output")
    source = scene(folder, 40, 40).rename(folder / "a.tif")
    said = OutputDescription(kind="class", model="m", classes=("a", "b"), colours=((0, 0, 0), (255, 0, 9)))
    predict(source, class_network(), folder / "o.zarr", client=client, engine="torch", core=32, description=said)
    return folder / "o.zarr"


TAMPERED: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "kind": (("kind",), "other"),
    "kind of a list": (("kind",), ["class"]),
    "model": (("model",), None),
    "classes": (("classes",), {"a": 1}),
    "class": (("classes", 0), 1),
    "class value": (("classes", 1, "value"), 7),
    "colour": (("classes", 0, "colour"), [0, 0]),
    "colour beyond": (("classes", 0, "colour"), [0, 0, 256]),
    "plan": (("plan",), []),
    "plan without a part": (("plan", "in_flight"), "DELETE"),
    "core": (("plan", "core", 1), 1.5),
    "no core": (("plan", "core", 0), 0),
    "giant core": (("plan", "core", 0), 10**18),
    "shape": (("plan", "output_shape", 1), [[]]),
    "no spans": (("plan", "columns"), []),
    "spans": (("plan", "rows", 0, "window"), True),
    "scale": (("plan", "scale", 0), "x"),
    "no scale": (("plan", "scale", 0), "1/0"),
    "memory": (("plan", "memory", "client_bytes"), {}),
    "receptive": (("plan", "receptive"), "x"),
    "fingerprint": (("fingerprint",), 1),
    "fill": (("fingerprint", "fill"), None),
    "source": (("source", "paths"), "a.tif"),
    "source path": (("source", "paths", 0), 5),
    "options": (("source", "options"), []),
    "unknown option": (("source", "options"), {"strange": 1}),
    "option": (("source", "options"), {"mask_band": "x"}),
    "nodata option": (("source", "options"), {"nodata": ["x"]}),
    "run": (("run", "seconds"), "x"),
    "run's failures": (("run", "failures"), 3),
    "run's reading": (("run", "read_amplification"), {"a": 1}),
    "check": (("start_check",), {"a": 1}),
    "check's value": (("start_check", "max_abs"), []),
    "format": (("format",), [[1]]),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_headers_are_damaged_metadata_and_no_surprise(output: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "o.zarr"
    shutil.copytree(output, out)
    metadata = json.loads((out / "zarr.json").read_text())
    changed = copy.deepcopy(metadata)
    at, value = TAMPERED[what]
    place = changed["attributes"]["outsize"]
    for step in at[:-1]:
        place = place[step]
    if value == "DELETE":
        del place[at[-1]]
    else:
        place[at[-1]] = value
    (out / "zarr.json").write_text(json.dumps(changed))
    seen = 0
    for command in (
        ("report", out, tmp_path / "o.html", "--overwrite"),
        ("evaluate", out, output.with_name("a.tif")),
        ("export", out, tmp_path / "o.png", "--overwrite"),
        ("verify", out, "--samples", "1"),
    ):
        done = outsize_here(*command)
        assert "outsize: unexpected" not in done.stderr, done.stderr
        seen += "damaged" in done.stderr or "output format" in done.stderr
    assert seen, what


def test_a_damaged_output_is_replaced_as_its_message_says(output: Path, tmp_path: Path, client: Client) -> None:
    out = tmp_path / "o.zarr"
    shutil.copytree(output, out)
    metadata = json.loads((out / "zarr.json").read_text())
    metadata["attributes"]["outsize"]["model"] = None
    (out / "zarr.json").write_text(json.dumps(metadata))
    raster, options = open_raster(output.with_name("a.tif")), {"client": client, "engine": "torch", "core": 32}
    with pytest.raises(OutputError, match="segment --overwrite makes it anew"):
        predict(raster, class_network(), out, **options)
    predict(raster, class_network(), out, overwrite=True, **options)
    assert read_header(out)["model"] == ""


def test_an_honest_header_is_believed(output: Path) -> None:
    header = read_header(output)
    assert plan_of(output, header).core == (32, 32)
    with pytest.raises(OutputError, match="damaged metadata"):
        plan_of(output, {**header, "plan": {}})


def test_files_of_a_runs_folder_that_are_none_are_passed_over(output: Path, tmp_path: Path) -> None:
    folder = tmp_path / "o.zarr.run"
    shutil.copytree(output.with_name("o.zarr.run"), folder)
    for number, text in enumerate(("[1]", "{" * 10**5, '{"a":' * 10**5, '{"host": 1}', "\0"), 2):
        (folder / f"run-{number}.json").write_text(text)
    os.mkfifo(folder / "run-9.json")
    os.mkfifo(folder / "records-9.jsonl")
    owner = read_owner(folder)
    assert owner is not None
    assert (owner.generation, owner.host) == (9, "an unknown machine")
    assert [run["generation"] for run in read_runs(folder)] == [1, 2, 3, 4, 5, 6, 9]
    (folder / "run-10.json").write_text(json.dumps({**read_runs(folder)[0], "pid": "1", "host": ["a"]}))
    owner = read_owner(folder)
    assert owner is not None
    assert (owner.generation, owner.pid) == (10, 0)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (1.5, int, False),
        (None, int | None, True),
        ("a", int | None, False),
        ((1, 2), tuple[int, int], True),
        ((1, 2, 3), tuple[int, int], False),
        ((1, "a"), tuple[int, ...], False),
        ([1], tuple[int, ...], False),
        ([1, 2], list[int], True),
        ({"a": 1}, {"a": int}, True),
        ({"b": 1}, {"a": int}, False),
        ([], {"a": int}, False),
    ],
)
def test_types_are_told_apart(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
