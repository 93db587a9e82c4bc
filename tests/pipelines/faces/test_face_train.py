"""`outsize face train` as its user runs it: sources, refusals, kills and resumes to the same bits, log and report."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from outsize.models.faceid.pictures.image_list import read_image_list
from outsize.pipelines.base.charts import BLUE, RED
from outsize.pipelines.commands.face import face_train
from outsize.pipelines.commands.face_train import make_face_training
from outsize.pipelines.faces import ranks as pipelines_ranks
from outsize.pipelines.faces import train as commanding
from outsize.pipelines.faces.options import FaceTraining
from outsize.pipelines.faces.ranks import RankError, RankRefusedError, run_as_rank, run_ranks
from outsize.sample_data.faces import write_faces
from outsize.tests.support import commands
from outsize.tiler.base.errors import UsageError
from PIL import Image
from pyarrow import csv as csv_reader
from pyarrow import parquet

from ...support.record_files import indexed

pytestmark = pytest.mark.system

TINY = ("--size", "16", "--batch", "8", "--micro-batch", "4", "--dim", "16", "--held-out", "6")
STEPS = (
    "--faces",
    "synthetic:40",
    *TINY,
    "--sample",
    "0.5",
    "--steps",
    "30",
    "--save-every",
    "10",
    "--evaluate-every",
    "5",
)


def train(out: Path, *words: str | Path, code: int = 0) -> tuple[dict[str, Any], str]:
    """(values, what stands on stderr) of a call in this process."""
    done = commands.outsize_here("--json", "face", "train", out, *words)
    assert done.returncode == code, done.stderr
    return (json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}), done.stderr


def read_steps(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation" not in line]


def read_validations(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [line["validation"] for line in lines if "validation" in line]


def hashes(out: Path, step: int) -> dict[str, Any]:
    return json.loads((out / f"step-{step:09d}" / "manifest.json").read_text())["files"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A training that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, *train(out, *STEPS, "--threads", "1")


def wait_for_steps(command: Any, out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and command.poll() is None:
        if (out / "train.jsonl").exists() and len((out / "train.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the training did not come so far")


def test_killed_and_stopped_it_goes_on_to_the_same_bits(
    tmp_path: Path, whole: tuple[Path, dict[str, Any], str]
) -> None:
    """Two ranks until one is killed, then one until Ctrl-C, then one of two threads: every file as if undisturbed."""
    out = tmp_path / "run"
    said = tmp_path / "said.txt"
    with said.open("w") as errors:
        command = commands.Command("face", "train", out, *STEPS, "--ranks", "2", stderr=errors)
        wait_for_steps(command, out, 12)
        ranks = psutil.Process(command.pid).children()
        assert len(ranks) == 2
        next(rank for rank in ranks if rank.cmdline()[-3] == "1").kill()
        assert command.wait(60) == 1
    lines = said.read_text().strip().splitlines()
    assert not [line for line in lines if "onnection" in line]  # the others say nothing of their own
    assert lines[-1] == (
        "outsize: error: rank 1 of 2 was ended by SIGKILL; the same command goes on from step 10, with any number of "
        "ranks"
    )
    assert not [process for process in ranks if process.is_running()]
    log = out / "train.jsonl"
    assert len(log.read_text().splitlines()) >= 12  # steps that are not saved are made again, and so are their lines
    # Ten steps and the validation of the fifth, by two ranks, as if killed before that of the tenth, which is saved.
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:11]))
    assert [line["step"] for line in read_validations(out)] == [5]
    with said.open("w") as errors:
        command = commands.Command("face", "train", out, *STEPS, stderr=errors)
        wait_for_steps(command, out, 13)
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
    stopped = len(read_steps(out))
    assert 12 <= stopped < 30
    assert f"the same command goes on from step {stopped}, with any number of ranks" in said.read_text()
    values, said_now = train(out, *STEPS, "--threads", "2")
    assert values["first_step"] == stopped
    assert f"goes on after step {stopped}" in said_now or "step 30/30" in said_now
    undisturbed, expected, _ = whole
    same = ("step", "loss", "rate", "gradient_norm", "samples", "skipped")
    assert [[line[key] for key in same] for line in read_steps(out)] == [
        [line[key] for key in same] for line in read_steps(undisturbed)
    ]
    assert hashes(out, 30) == hashes(undisturbed, 30)
    assert read_validations(out) == read_validations(undisturbed)
    assert [values[key] for key in ("full_loss", "rank_1", "tar")] == [
        expected[key] for key in ("full_loss", "rank_1", "tar")
    ]


def test_log_and_report_hold_what_was_done(whole: tuple[Path, dict[str, Any], str]) -> None:
    out, values, said = whole
    steps = read_steps(out)
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert all(line["samples"] == 8 and line["seconds"] > 0 and line["memory_bytes"] > 1e8 for line in steps)
    assert steps[0]["rate"] == pytest.approx(0.001)
    assert steps[-1]["rate"] < 1e-5
    assert values["loss"] == pytest.approx(np.mean([line["loss"] for line in steps]))
    assert np.mean([line["loss"] for line in steps[-5:]]) < steps[0]["loss"]
    validations = read_validations(out)
    assert [line["step"] for line in validations] == [5, 10, 15, 20, 25, 30]
    assert values["rank_1"] == validations[-1]["rank_1"]
    assert values["full_loss"] == validations[-1]["full_loss"] < validations[0]["full_loss"]
    assert f"step 20: loss over all classes {validations[3]['full_loss']:.3f}, rank-1 of 6 identities" in said
    assert (values["identities"], values["pictures"], values["unusable"]) == (6, 24, 0)
    assert values["peak_bytes"] > 1e8
    assert "step 30/30, loss" in said
    assert "images/s, memory" in said
    page = (out / "report.html").read_text()
    HTMLParser().feed(page)
    assert page.count("<svg") == 8  # six curves, ROC, scores
    assert "Images a second" in page
    assert "Memory of all ranks, GB" in page
    marks = re.findall(r'<circle [^>]*stroke="(#\w+)"[^>]*><title>(step [^<]*)</title>', page)
    # Of the second line of the first chart, drawn as that line is.
    full = {f"step {line['step']}: {line['full_loss']:.4g}" for line in validations}
    assert {text for colour, text in marks if colour == RED} >= full
    assert (BLUE, f"step 1: {steps[0]['loss']:.4g}") in marks
    (speed,) = re.findall(r"step 7: ([^<]+)<", page[page.index("Images a second") : page.index("Memory of all")])
    assert float(speed) == pytest.approx(8 / steps[6]["seconds"], rel=1e-3)
    assert "Rank-1" in page
    assert "over all classes, of one batch" in page
    assert "synthetic:40" in page
    assert page.startswith("<!DOCTYPE html>")
    assert {path.name for path in out.iterdir()} == {
        "LATEST", "report.html", "step-000000020", "step-000000030", "train.jsonl", "training.json", ".lock"
    }  # fmt: skip


def test_a_finished_training_is_measured_again_and_not_trained(
    tmp_path: Path, whole: tuple[Path, dict[str, Any], str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    values, _ = train(out, *STEPS)
    assert (values["first_step"], values["loss"], values["rank_1"]) == (30, None, whole[1]["rank_1"])
    assert hashes(out, 30) == hashes(whole[0], 30)
    assert read_validations(out) == read_validations(whole[0])


RANK = """
import pathlib, signal, sys, time
rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: time.sleep(1.5 * rank) or sys.exit(130))
(folder / str(rank)).touch()
time.sleep(0.3 * rank)
if (folder / "codes").exists():
    sys.exit(int((folder / "codes").read_text().split()[rank]))
time.sleep(60)
"""
"""A rank that waits to be stopped, or ends as it is told."""


def test_ranks_are_waited_for_and_the_cause_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell's background jobs ignore it, and so would the ranks.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _check_ranks(tmp_path, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def _check_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for codes, said in (
        ("0 4", "rank 1 of 2 ended with code 4"),
        ("75 4", "rank 1 of 2 ended with code 4"),
        ("75 75", "the 2 ranks lost"),
    ):
        (tmp_path / "codes").write_text(codes)
        with pytest.raises(RankError, match=said):
            run_ranks("some_rank", 2, 1, tmp_path)
    # What a rank refuses is told as if this process did, with its exit code.
    (tmp_path / "codes").write_text("2 75")
    (tmp_path / "refusal-0.txt").write_text("that is not there")
    with pytest.raises(RankRefusedError, match=r"^that is not there$") as refused:
        run_ranks("some_rank", 2, 1, tmp_path)
    assert refused.value.exit_code == 2
    (tmp_path / "codes").unlink()
    for rank in (0, 1):
        (tmp_path / str(rank)).unlink()

    def interrupt() -> None:
        while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # One rank stops at once, the other saves for longer than failed ranks are given.
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_ranks("some_rank", 2, 1, tmp_path)
    thread.join()


def test_a_rank_leaves_its_result_or_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines_ranks, "die_with_parent", Mock())
    (tmp_path / "spec.json").write_text('{"ranks": 1, "of": 7}')

    def rank(work: Callable[[dict[str, Any]], dict[str, Any] | None]) -> int:
        with warnings.catch_warnings():
            return run_as_rank(["0", str(tmp_path), "1"], work)

    assert rank(Mock(return_value=None)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]
    assert rank(lambda spec: {"found": spec["of"]}) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {"found": 7}
    assert rank(Mock(side_effect=UsageError("that is not there"))) == 2
    assert (tmp_path / "refusal-0.txt").read_text() == "that is not there"
    assert rank(Mock(side_effect=KeyboardInterrupt())) == 130
    assert rank(Mock(side_effect=RuntimeError("[gloo/transport] Connection closed by peer"))) == 75
    with pytest.raises(RuntimeError, match="a mistake of our own"):
        rank(Mock(side_effect=RuntimeError("a mistake of our own")))


def test_what_a_rank_refuses_is_told_without_a_way_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code, end in (
        (RankRefusedError("no picture of step 1 can be used", 2), 2, "no picture of step 1 can be used\n"),
        (RankError("rank 1 of 2 was ended by SIGKILL"), 1, "nothing was saved yet, with any number of ranks\n"),
    ):
        monkeypatch.setattr(commanding, "run_ranks", Mock(side_effect=error))
        _, said = train(tmp_path / str(code), *STEPS, "--ranks", "2", code=code)
        assert said.splitlines()[-1].startswith(f"outsize: error: {error}")
        assert said.endswith(end)


def test_a_rank_whose_command_died_before_it_came_up_ends_at_once() -> None:
    words = "import os, sys; from outsize.tiler.system.machine import die_with_parent as die; "
    words += "die(os.getppid() + int(sys.argv[1])); print(1)"
    ran = [subprocess.run([sys.executable, "-c", words, away], capture_output=True, text=True) for away in ("1", "0")]
    assert [(run.returncode, run.stdout, run.stderr) for run in ran] == [(1, "", ""), (0, "1\n", "")]


@pytest.mark.parametrize("name", ["backbone.safetensors", "optimiser.safetensors", "tablet-000000.rows"])
def test_a_damaged_generation_is_made_again(tmp_path: Path, whole: tuple[Path, dict[str, Any], str], name: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    damaged = out / "step-000000030" / name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    values, said = train(out, *STEPS)
    assert values["first_step"] == 20
    assert "step-000000030 is damaged, and made again" in said
    assert hashes(out, 30) == hashes(whole[0], 30)


def test_a_folder_holds_one_training(tmp_path: Path, whole: tuple[Path, dict[str, Any], str]) -> None:
    _, said = train(whole[0], *STEPS, "--margin", "arcface", code=1)
    assert 'holds another training: margin "cosface" there, "arcface" now; choose another folder' in said
    place = STEPS.index("--held-out")
    _, said = train(whole[0], *STEPS[:place], *STEPS[place + 2 :], code=1)
    assert "holds another training: held out 6 there, not given now; choose another folder" in said
    (tmp_path / "notes.txt").write_text("x")
    assert "must be a new or empty folder, or hold this training, got notes.txt" in train(tmp_path, *STEPS, code=1)[1]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve identities of three pictures, 16 x 16, and what goes wrong with some."""
    folder = tmp_path_factory.mktemp("people")
    write_faces(folder, identities=12, images=3, height=16, width=16)
    one = folder / "identity-000000"
    (one / "identity-000000_0001.png").write_bytes(b"no picture")
    Image.new("L", (16, 16), 90).save(one / "grey.png")
    Image.new("RGB", (20, 16)).save(one / "wide.png")
    (one / "notes.txt").write_text("x")
    shutil.copy(folder / "identity-000001" / "identity-000001_0001.png", folder / "identity-000002" / "copy.png")
    for number in range(1, 12):
        third = folder / f"identity-{number:06d}" / f"identity-{number:06d}_0003.png"
        with Image.open(third) as picture:
            grey = picture.convert("L")
        grey.save(third)
    (folder / "nobody").mkdir()
    (folder / "single").mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "single" / "a.png")
    return folder


FOLDER = ("--batch", "8", "--micro-batch", "4", "--dim", "16", "--held-out", "3", "--steps", "6")


def test_a_folder_is_trained_on_and_what_is_wrong_is_named(tmp_path: Path, people: Path) -> None:
    values, said = train(tmp_path / "run", "--faces", people, *FOLDER, "--steps", "12", "--evaluate-every", "6", code=3)
    named = {
        Path(entry["path"]).name: entry["reason"]
        for entry in map(json.loads, (tmp_path / "run" / "unreadable.jsonl").read_text().splitlines())
    }
    assert named.pop("nobody") == "its folder has no picture"
    assert named.pop("copy.png").endswith("identity-000001_0001.png, of another identity")
    # Identities are held out by the seed. The first picture is named whether it is trained on or measured with; of five
    # pictures of a held out identity the last is not measured with.
    assert {"identity-000000_0001.png"} <= set(named) <= {"identity-000000_0001.png", "wide.png"}
    assert values["unusable"] == len(named) + 2
    assert "1 of 13 identities have one picture" in said
    assert "1 file left alone (notes.txt): no pictures, or in no identity's folder" in said
    (grey,) = re.findall(r"(\d) of the \d pictures of step \d+ are without colour: grey is taken for red", said)
    assert int(grey) > 0
    # One of each; of the first identity it is the first picture.
    assert (
        len(re.findall(r"3 of the [89] pictures of identities never seen are without colour: grey is taken", said)) == 1
    )
    assert values["identities"] == 3
    described = json.loads((tmp_path / "run" / "training.json").read_text())
    assert described["fingerprint"]["size"] == [16, 16]
    assert described["fingerprint"]["augment"] == "flip,colour"
    assert "its folder has no picture" in (tmp_path / "run" / "report.html").read_text()


def test_a_list_gives_the_bits_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "people"
    write_faces(folder, identities=8, images=3, height=16, width=16)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows([path.relative_to(tmp_path), path.parent.name] for path in sorted(folder.rglob("*.png")))
    parquet.write_table(csv_reader.read_csv(tmp_path / "list.csv"), tmp_path / "list.parquet")
    found = [
        train(tmp_path / f"run {source.name}", "--faces", source, *FOLDER)[0]
        for source in (folder, tmp_path / "list.csv", tmp_path / "list.parquet")
    ]
    assert found[0]["loss"] == found[1]["loss"] == found[2]["loss"]
    for name in ("list.csv", "list.parquet"):
        assert hashes(tmp_path / "run people", 6) == hashes(tmp_path / f"run {name}", 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,0\nb.png,ada\nc.png,1\n", "line 3 of {list} has 'ada', line 2 '0'; mend or delete it"),
        ("path,label\na.png,-1\nb.png,0\nc.png,1\n", "line 2 of {list} has '-1', line 3 '0'; mend or delete it"),
        ("path,label\na.png,ada\nb.png,7\nc.png,eve\n", "line 3 of {list} has '7', line 2 'ada'; mend or delete it"),
        ("path,label\na,b.png,0\n", "line 2 of {list} must have 2 fields, as the first line has, got more"),
        ("path,label\na.png,0\nb.png\n", "line 3 of {list} must have a path and a label, got 'b.png', None"),
        ("path,who\na.png,0\n", "{list} must begin with the line path,label, got 'path,who'"),
        ("", "{list} must begin with the line path,label, got ''"),
    ],
)
def test_a_list_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UsageError) as refused:
        read_image_list(tmp_path / "list.csv")
    assert message.format(list=tmp_path / "list.csv") in str(refused.value)


def test_pictures_that_a_list_has_and_the_disk_has_not_are_named(tmp_path: Path) -> None:
    """The first picture is of another size than most, the second is not there."""
    write_faces(tmp_path / "people", identities=4, images=3, height=16, width=16)
    paths = sorted((tmp_path / "people").rglob("*.png"))
    with Image.open(paths[0]) as picture:
        picture.resize((20, 20)).save(paths[0])
    paths[1].unlink()
    lines = [f"{path.relative_to(tmp_path)},{place // 3}" for place, path in enumerate(paths)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    run = tmp_path / "run"
    _, said = train(run, "--faces", tmp_path / "list.csv", *FOLDER, "--held-out", "0", "--steps", "3", code=3)
    assert "images 16 x 16" in said
    named = dict(json.loads(line).values() for line in (run / "unreadable.jsonl").read_text().splitlines())
    assert named == {
        str(paths[0]): "it must be 16 x 16 pixels, got 20 x 20; crop it, or give --resize",
        str(paths[1]): "it is not there",
    }


def test_pictures_of_other_sizes_are_scaled_where_asked(tmp_path: Path) -> None:
    """A training on pictures of all sizes has the bits of one on pictures that were scaled before."""
    for folder in ("mixed", "scaled"):
        write_faces(tmp_path / folder, identities=6, images=2, height=32, width=32)
    for place, path in enumerate(sorted((tmp_path / "mixed").rglob("*.png"))):
        with Image.open(path) as picture:
            sized = picture.resize((place + 14, place + 14))
        sized.save(path)
        if sized.size != (16, 16):
            sized = sized.resize((16, 16), Image.Resampling.BICUBIC, reducing_gap=3.0)
        sized.save(tmp_path / "scaled" / path.relative_to(tmp_path / "mixed"))
    words = (*FOLDER, "--held-out", "0", "--steps", "3", "--size", "16")
    for folder, more in (("mixed", ("--resize",)), ("scaled", ())):
        train(tmp_path / f"run {folder}", "--faces", tmp_path / folder, *words, *more)
    assert hashes(tmp_path / "run mixed", 3) == hashes(tmp_path / "run scaled", 3)
    # What a training of an earlier version says of itself, which knew no other way.
    assert "resize" not in json.loads((tmp_path / "run scaled" / "training.json").read_text())["fingerprint"]
    _, said = train(tmp_path / "run mixed", "--faces", tmp_path / "mixed", *words, code=1)
    assert "holds another training: resize true there, not given now" in said
    Image.new("RGB", (16, 20)).save(tmp_path / "mixed" / "identity-000000" / "tall.png")
    run = tmp_path / "run tall"
    train(run, "--faces", tmp_path / "mixed", *words, "--batch", "13", "--steps", "1", "--resize", code=3)
    (named,) = (json.loads(line) for line in (run / "unreadable.jsonl").read_text().splitlines())
    assert named["path"].endswith("tall.png")
    assert named["reason"] == "it must have the shape of 16 x 16 pixels, got 20 x 16; crop it"


def test_a_record_file_is_trained_on_and_other_labels_than_its_index_has_are_remarked_on(tmp_path: Path) -> None:
    path = indexed(tmp_path, [0, 0, 1, 1, 1, 2, 2], wrong={2: 1.0}, size=(18, 16))
    body = bytearray(path.read_bytes())
    at = int((tmp_path / "train.idx").read_text().splitlines()[7].split("\t")[1])
    body[at] ^= 1  # of record 7
    path.write_bytes(body)
    words = ("--faces", path, *FOLDER, "--held-out", "0")
    assert train(tmp_path / "small", *words, "--size", "27x24", "--resize", code=3)[0]["unusable"] == 1
    _, said = train(tmp_path / "none", *words, "--size", "27x24", code=2)
    assert said.endswith(
        "--size must be that of the pictures, got 27 x 24, where not one of 6 that were opened has it and most "
        "have 18 x 16; give --resize, or leave it out\n"
    )
    assert not (tmp_path / "none").exists()
    values, said = train(tmp_path / "run", *words, code=3)
    assert values["unusable"] == 1
    assert f"{path}, record 7: it is damaged: no record begins at byte {at:,}" in said
    assert "1 of 3 identity records in train.rec list pictures of several labels: the pictures' own labels" in said
    assert "images 18 x 16" in said
    samples = [line["samples"] for line in read_steps(tmp_path / "run")]
    assert sum(samples) == 48


def test_an_iresnet_is_trained_saved_and_enrolls(tmp_path: Path) -> None:
    write_faces(tmp_path / "people", identities=5, images=3, height=16, width=16)
    words = (
        "--faces",
        tmp_path / "people",
        *FOLDER,
        "--network",
        "r18",
        "--dim",
        "8",
        "--recompute",
        "--steps",
        "1",
        "--optimiser",
        "sgd",
        "--micro-batch",
        "8",
    )
    values, said = train(tmp_path / "run", *words, "--held-out", "0")
    assert "embedder  r18, 11.2 M parameters, images 16 x 16" in said
    assert "rank_1" not in values
    gallery = commands.outsize_here(
        "--json", "face", "enroll", tmp_path / "g", tmp_path / "people", "--embedder", tmp_path / "run"
    )
    assert commands.result_of(gallery)["dim"] == 8


def test_a_margin_may_be_three_numbers(tmp_path: Path) -> None:
    words = ("--faces", "synthetic:40", *TINY, "--held-out", "0", "--steps", "2", "--threads", "1")
    for margin in ("cosface", "1,0,0.35"):
        train(tmp_path / margin, *words, "--margin", margin)
    named, three = (hashes(tmp_path / margin, 2) for margin in ("cosface", "1,0,0.35"))
    assert named["backbone.safetensors"] == three["backbone.safetensors"]
    _, said = train(tmp_path / "1,0,0.35", *words, "--margin", "1,0.2,0.3", code=1)
    assert "margin [1.0, 0.0, 0.35] there, [1.0, 0.2, 0.3] now" in said
    # What ranks are told is what the command was told.
    options = face_train.make_context("train", ["out", "--margin", "1,0.2,0.1", "--size", "16"]).params
    told = {key: options[key] for key in options.keys() - {"out", "ranks", "threads", "memory"}}
    training = make_face_training(tmp_path, told)
    assert training.margin == (1.0, 0.2, 0.1)
    assert FaceTraining.from_json(json.loads(json.dumps(asdict(training)))) == training


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--faces", "synthetic:1"), "synthetic faces need 2 identities or more"),
        (
            ("--faces", "synthetic:x"),
            "synthetic faces need 2 identities or more, such as synthetic:2000, got synthetic:x",
        ),
        (("--faces", "nowhere"), "NAME.parquet or NAME.rec, got nowhere, which is not there"),
        (("--faces", "nowhere.rec"), "must be a RecordIO file with nowhere.idx beside it, got no nowhere.rec$"),
        (
            ("--faces", "nowhere.csv"),
            "nowhere.csv must be a list of pictures that can be read: No such file or directory$",
        ),
        (("--resize",), "--resize is of pictures; synthetic faces are drawn in --size"),
        (("--network", "r50", "--size", "20"), "sides that are multiples of 16, got 20 x 20"),
        (("--size", "4"), "faces must be 8 x 8 or larger, got 4 x 4"),
        (("--batch", "16", "--ranks", "2"), "2 ranks need a micro-batch each, a batch of 16 has 1 of 16"),
        (("--batch", "1"), "--batch must be 2 or more, since features are normalised over a step, got 1"),
        (("--ranks", "4096"), "ranks must be at most the machine's"),
        (("--memory", "100MB"), "layer and embedder need|classes would fit"),
        (("--warm-up", "9", "--steps", "3"), r"the warm-up must be 0 \.\.\. 3 steps"),
        (("--augment", "turn"), "augmentations are crop, flip, colour, grey, blur, resolution, jpeg, erase, such as"),
        (("--size", "big"), "sides in pixels, such as 112"),
        (("--lr", "nan"), "Invalid value for '--lr': nan is not a finite number"),
        (("--margin", "1,2"), r"arcface, cosface, softmax, or M1,M2,M3 such as 1,0\.3,0\.2, got '1,2'"),
        (("--margin", "0.5,0,0"), r"margins must be m1 >= 1, 0 <= m2 < pi, m3 >= 0, got 0\.5, 0\.0, 0\.0"),
        (("--margin", "arcface", "--margin-value", "4"), "margins must be m1 >= 1, 0 <= m2 < pi"),
        (("--margin", "softmax", "--margin-value", "0.2"), "--margin-value is of arcface or cosface"),
    ],
)
def test_bad_choices_are_refused_in_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    _, said = train(tmp_path / "runs" / "run", *words, code=2)
    last = said.strip().splitlines()[-1]
    assert re.search(message, last)
    assert "Errno" not in last
    assert not any(tmp_path.iterdir())  # folders that were made for it are gone


def test_under_torchrun_the_first_rank_alone_refuses(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for words, code, message in (
        ((tmp_path / "run", "--faces", "synthetic:1"), 2, "synthetic faces need 2 identities or more"),
        ((tmp_path, *STEPS), 1, "must be a new or empty folder, or hold this training, got notes.txt"),
        ((tmp_path / "run", *STEPS, "--lr", "1e30", "--optimiser", "sgd", "--clip", "0"), 1, "was not finite in 10 st"),
        ((tmp_path / "more", *STEPS, "--ranks", "3"), 2, "torchrun started 2 ranks, --ranks asks for 3"),
    ):
        first, other = commands.outsize_on_two_ranks("face", "train", *words)
        assert (first.returncode, other.returncode) == (code, code if "--lr" in words else 0)
        assert message in first.stderr.splitlines()[-1]
        assert first.stderr.count("outsize: error") == 1
        assert (other.stdout, other.stderr) == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "run"}


def test_sources_that_teach_nothing_are_refused(tmp_path: Path, people: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    _, said = train(tmp_path / "run", "--faces", tmp_path / "empty", code=2)
    assert "must hold a folder for each person with pictures" in said
    assert (tmp_path / "run").exists()  # it was there before
    write_faces(tmp_path / "one", identities=1, images=2, height=16, width=16)
    assert (
        "must have 2 identities to tell apart, got 1" in train(tmp_path / "run", "--faces", tmp_path / "one", code=2)[1]
    )
    _, said = train(tmp_path / "run", "--faces", people, "--held-out", "12", code=2)
    assert "12 identities cannot be held out of 13, of which 12 have two pictures or more and 2 must be left" in said
    for path in (tmp_path / "bad" / "a", tmp_path / "bad" / "b"):
        path.mkdir(parents=True)
        (path / "x.png").write_bytes(path.name.encode())
    _, said = train(tmp_path / "run", "--faces", tmp_path / "bad", code=2)
    assert "pictures must be files that can be opened, got 2 that cannot; " in said
    assert f"{path.parent / 'a' / 'x.png'}: cannot identify" in said
    _, said = train(tmp_path / "run", "--faces", tmp_path / "bad", "--size", "16", *FOLDER[:6], code=1)
    assert "no picture of step 1 can be used" in said


def test_a_rate_that_blows_up_is_told(tmp_path: Path) -> None:
    _, said = train(tmp_path / "run", *STEPS, "--lr", "1e30", "--optimiser", "sgd", "--clip", "0", code=1)
    assert "was not finite in 10 steps up to step" in said
    assert "lower --lr or --head-lr" in said


@pytest.mark.long
def test_under_the_user_s_torchrun_it_is_the_same_training(
    tmp_path: Path, whole: tuple[Path, dict[str, Any], str]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "outsize"]
    done = subprocess.run(
        [*command, "--json", "face", "train", str(tmp_path / "run"), *STEPS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert (values["steps"], values["full_loss"]) == (30, whole[1]["full_loss"])
    assert hashes(tmp_path / "run", 30) == hashes(whole[0], 30)
