"""`outsize face train` that goes on with more: steps, identities, pictures, the weights of another training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from outsize.models.faceid.embedder.file import load_embedder
from outsize.models.faceid.layer.checkpoint import list_generations, load_checkpoint
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.row_rules import RowRMS
from outsize.sample_data.faces import write_faces
from torch import Tensor

from ...support import commands

pytestmark = pytest.mark.system

TINY = ("--batch", "8", "--micro-batch", "4", "--dim", "16", "--threads", "1", "--augment", "none")
HELD = ("--held-out", "3")


def train(out: Path, *words: str | Path, code: int = 0) -> tuple[dict[str, Any], str]:
    done = commands.outsize_here("--json", "face", "train", out, *words)
    assert done.returncode == code, done.stderr
    return (json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}), done.stderr


def read_steps(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation" not in line]


def roll(out: Path) -> dict[str, list[str]]:
    return json.loads((out / "identities.json").read_text())


def rows_of(out: Path, step: int | None = None) -> Tensor:
    classes = json.loads((list_generations(out)[0].folder / "manifest.json").read_text())["classes"]
    head = ShardedMarginHead(classes, 16, rule=RowRMS(lr=0.1))
    load_checkpoint(head, out, step=step, grow=True)
    return head.dense_weight().clone()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 identities of 3 pictures: names in the order of numbers."""
    folder = tmp_path_factory.mktemp("faces") / "people"
    write_faces(folder, identities=24, images=3, height=16, width=16)
    return folder


def some(people: Path, into: Path, chosen: range, pictures: int = 3) -> Path:
    names = sorted(path for path in people.iterdir() if path.is_dir())
    for place in chosen:
        (into / names[place].name).mkdir(parents=True, exist_ok=True)
        for picture in sorted(names[place].iterdir())[:pictures]:
            shutil.copy(picture, into / names[place].name)
    return into


def test_raised_steps_go_on_with_the_rates_of_as_many(tmp_path: Path) -> None:
    words = ("--faces", "synthetic:20", "--size", "16", *TINY, *HELD, "--save-every", "4")
    train(tmp_path / "run", *words, "--steps", "8")
    before = read_steps(tmp_path / "run")
    _, said = train(tmp_path / "run", *words, "--steps", "6", code=1)
    assert "steps 8 there, 6 now" in said
    values, said = train(tmp_path / "run", *words, "--steps", "12")
    assert "4 steps more than before: learning rates go on as those of a training of 12 steps" in said
    assert (values["first_step"], values["steps"]) == (8, 12)
    steps = read_steps(tmp_path / "run")
    assert steps[:8] == before
    assert [line["step"] for line in steps] == list(range(1, 13))
    train(tmp_path / "whole", *words, "--steps", "12")
    rates = [line["rate"] for line in read_steps(tmp_path / "whole")]
    assert [line["rate"] for line in steps[8:]] == rates[8:]
    described = json.loads((tmp_path / "run" / "training.json").read_text())
    assert described["changes"] == [{"step": 8, "steps": [8, 12], "warm_up": [0, 0]}]
    assert described["fingerprint"]["steps"] == 12
    values, said = train(tmp_path / "run", *words, "--steps", "12")
    assert "more than before" not in said
    assert values["loss"] is None
    _, said = train(tmp_path / "run", *words, "--steps", "20", "--lr", "0.5", code=1)
    assert "holds another training: lr 0.001 there, 0.5 now" in said


def test_identities_and_pictures_are_added_behind_those_that_are_there(tmp_path: Path, people: Path) -> None:
    faces = some(people, tmp_path / "faces", range(4, 20), pictures=2)
    words = ("--faces", faces, *TINY, *HELD, "--save-every", "3")
    train(tmp_path / "run", *words, "--steps", "6")
    before, rows = roll(tmp_path / "run"), rows_of(tmp_path / "run")
    assert (len(before["classes"]), len(before["held_out"]), len(rows)) == (13, 3, 13)
    some(people, faces, range(4))  # their names come before all others
    some(people, faces, range(8, 10))  # a picture more of each
    _, said = train(tmp_path / "run", *words, "--steps", "6", code=1)
    assert "choose another folder, or add identities and pictures with --grow" in said
    assert roll(tmp_path / "run") == before
    values, said = train(tmp_path / "run", *words, "--steps", "9", "--grow")
    fresh = sorted(path.name for path in people.iterdir() if path.is_dir())[:4]
    assert f"4 new identities ({', '.join(fresh)})" in said
    assert ": 17 identities, " in said
    assert (values["first_step"], values["steps"]) == (6, 9)
    after = roll(tmp_path / "run")
    assert after["classes"] == before["classes"] + fresh
    assert after["held_out"] == before["held_out"]
    grown = rows_of(tmp_path / "run")
    assert len(grown) == 17
    assert (grown[:13] - rows).float().norm(dim=1).max() < 1  # three steps further
    assert grown.isfinite().all()
    # The same command goes on, with --grow and without it.
    for more in ((), ("--grow",)):
        values, said = train(tmp_path / "run", *words, "--steps", "9", *more)
        assert values["loss"] is None
        assert "new identit" not in said
    shutil.rmtree(faces / before["classes"][0])
    _, said = train(tmp_path / "run", *words, "--steps", "12", "--grow", code=2)
    assert f"identities that were trained on must stay in the source, {before['classes'][0]} is not there" in said


def test_a_grown_training_that_was_stopped_has_the_bits_of_one_that_was_not(tmp_path: Path, people: Path) -> None:
    faces = some(people, tmp_path / "faces", range(4, 16))
    words = ("--faces", faces, *TINY, *HELD, "--save-every", "2")
    train(tmp_path / "a", *words, "--steps", "4")
    some(people, faces, range(4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(tmp_path / "a", *words, "--steps", "8", "--grow")
    train(tmp_path / "b", *words, "--steps", "8", "--grow")
    # As if killed in the middle: what was saved after step 6 is gone, and its lines with it.
    shutil.rmtree(tmp_path / "b" / "step-000000008")
    train(tmp_path / "b", *words, "--steps", "8")
    assert [line["loss"] for line in read_steps(tmp_path / "a")] == [
        line["loss"] for line in read_steps(tmp_path / "b")
    ]
    assert torch.equal(rows_of(tmp_path / "a"), rows_of(tmp_path / "b"))
    assert load_embedder(tmp_path / "a").sha256 == load_embedder(tmp_path / "b").sha256


def test_synthetic_identities_grow_by_their_number(tmp_path: Path) -> None:
    words = (*TINY, *HELD, "--size", "16")
    train(tmp_path / "run", "--faces", "synthetic:20", *words, "--steps", "3")
    _, said = train(tmp_path / "run", "--faces", "synthetic:30", *words, "--steps", "5", "--grow")
    assert "10 new identities, 80 pictures more: 30 identities, 240 pictures" in said
    assert len(rows_of(tmp_path / "run")) == 30
    _, said = train(tmp_path / "new", "--faces", "synthetic:30", *words, "--steps", "5", "--grow", code=1)
    assert "--grow is of a training that is there" in said


def test_a_training_starts_from_another_ones_weights_and_rows_by_name(tmp_path: Path, people: Path) -> None:
    one = some(people, tmp_path / "one", range(12))
    two = some(people, tmp_path / "two", range(6, 24))
    train(tmp_path / "a", "--faces", one, *TINY, "--held-out", "0", "--steps", "5")
    words = ("--faces", two, *TINY, "--held-out", "0", "--init", tmp_path / "a")
    values, said = train(tmp_path / "b", *words, "--steps", "1", "--lr", "1e-30", "--head-lr", "1e-30")
    names = roll(tmp_path / "b")["classes"]
    fresh = [name for name in names if name not in roll(tmp_path / "a")["classes"]]
    assert len(fresh) == 12
    assert "with the rows of 6 of 18 identities; 12 rows new: " + ", ".join(fresh[:5]) + " and others" in said
    # Rates of nothing: what was taken stands as it was.
    theirs, ours = load_embedder(tmp_path / "a").model.state_dict(), load_embedder(tmp_path / "b").model.state_dict()
    for name, value in theirs.items():
        if "feature_norm" not in name:
            assert torch.equal(value, ours[name]), name
    before, after = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    old = roll(tmp_path / "a")["classes"]
    for name in set(names) & set(old):
        assert torch.equal(before[old.index(name)], after[names.index(name)])
    # It goes on with the option and without it, and not with another.
    for more in (("--init", tmp_path / "a"), ()):
        values, said = train(tmp_path / "b", *words[:-2], *more, "--steps", "1", "--lr", "1e-30", "--head-lr", "1e-30")
        assert values["loss"] is None
        assert "starts from" not in said
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    _, said = train(
        tmp_path / "b", *words[:-1], tmp_path / "c", "--steps", "1", "--lr", "1e-30", "--head-lr", "1e-30", code=1
    )
    assert "holds another training: init" in said
    _, said = train(tmp_path / "a", "--faces", one, *TINY, "--held-out", "0", "--steps", "5", *words[-2:], code=1)
    assert "holds another training: init not given there" in said


@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt"])
def test_a_training_starts_from_a_file(tmp_path: Path, kind: str) -> None:
    words = ("--faces", "synthetic:20", "--size", "16", *TINY, *HELD, "--steps", "2")
    train(tmp_path / "a", *words)
    state = load_embedder(tmp_path / "a").model.state_dict()
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"module.{name}": v for name, v in state.items()}} if kind == "ckpt" else state, path
        )
    still = ("--lr", "1e-30", "--init", path)
    _, said = train(tmp_path / "b", *words, *still)
    assert f"starts from {path}, embedder " in said
    assert "all 20 identities are new to it, and begin with random rows" in said
    ours = load_embedder(tmp_path / "b").model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in state.items() if "feature_norm" not in name)


def test_weights_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    words = ("--faces", "synthetic:20", "--size", "16", *TINY, *HELD, "--steps", "2")
    train(tmp_path / "a", *words)
    for change, message in (
        (("--dim", "24"), "has dim 16, this training 24; give --dim 16"),
        (("--network", "r18", "--dim", "16"), "has architecture small, this training r18; give --network small"),
    ):
        _, said = train(tmp_path / "b", *words, *change, "--init", tmp_path / "a", code=2)
        assert message in said
        assert not (tmp_path / "b").exists()
    state = load_embedder(tmp_path / "a").model.state_dict()
    first = next(iter(state))
    torch.save({**state, first: torch.full_like(state[first], torch.nan)}, tmp_path / "nan.pt")
    torch.save({name: value for name, value in state.items() if name != first}, tmp_path / "less.pt")
    for path, message, code in (
        (tmp_path / "nan.pt", f"must hold finite weights, {first} has others", 2),
        (tmp_path / "less.pt", f"it lacks 1 tensor such as {first}", 2),
        (tmp_path / "elsewhere", "--init must be the folder of a training of faces, or a file of weights, got", 2),
    ):
        _, said = train(tmp_path / "b", *words, "--init", path, code=code)
        assert message in said
        assert len(said.strip().splitlines()) <= 2, said
        assert not (tmp_path / "b").exists()
    (tmp_path / "empty").mkdir()
    _, said = train(tmp_path / "b", *words, "--init", tmp_path / "empty", code=1)
    assert "must be a folder that outsize face train made" in said


def test_labels_that_are_numbers_keep_no_rows_in_another_source(tmp_path: Path, people: Path) -> None:
    """Number 3 of one list is nobody's number 3 of another."""
    folders = sorted(path for path in people.iterdir() if path.is_dir())
    for name, chosen in (("one", range(8)), ("two", range(8, 16))):
        lines = [f"{p},{label}" for label, place in enumerate(chosen) for p in sorted(folders[place].iterdir())]
        (tmp_path / f"{name}.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    words = (*TINY, "--held-out", "0", "--steps", "2")
    train(tmp_path / "a", "--faces", tmp_path / "one.csv", *words)
    _, said = train(tmp_path / "b", "--faces", tmp_path / "two.csv", *words, "--init", tmp_path / "a")
    assert "all 8 identities are new to it" in said
    _, said = train(tmp_path / "c", "--faces", tmp_path / "one.csv", *words, "--init", tmp_path / "a")
    assert "with the rows of all 8 identities" in said


def test_rows_of_other_tablets_and_types_come_over(tmp_path: Path) -> None:
    """More identities than a tablet has rows are another matter of the same code: places are by name alone."""
    from outsize.pipelines.faces.init import _copy_rows

    head = ShardedMarginHead(50, 8, rule=RowRMS(lr=0.1), storage=torch.float32, tablet_rows=16, block_rows=8, seed=1)
    from outsize.models.faceid.layer.checkpoint import save_checkpoint

    save_checkpoint(head, tmp_path, 3)
    other = ShardedMarginHead(40, 8, rule=RowRMS(lr=0.1), tablet_rows=24, block_rows=8, seed=2)
    before = other.dense_weight().clone()
    wanted = torch.from_numpy(np.random.default_rng(0).permutation(50)[:40].copy())
    wanted[::3] = -1
    _copy_rows(other, list_generations(tmp_path)[0], wanted)
    expected = torch.where((wanted >= 0)[:, None], head.dense_weight()[wanted].half(), before)
    assert torch.equal(other.dense_weight(), expected)
