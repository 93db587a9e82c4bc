"""Checkpoints: whole or ignored, for any number of ranks, whatever happens to files or to the process that saves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.layer.checkpoint import LATEST, MANIFEST, list_generations, load_checkpoint, save_checkpoint
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.row_rules import SGD, Momentum, RowRMS, RowRule

pytestmark = pytest.mark.system

DIM = 12


def make_head(classes: int = 61, rule: RowRule | None = None, seed: int = 0) -> ShardedMarginHead:
    return ShardedMarginHead(classes, DIM, rule=rule or RowRMS(lr=0.01), seed=seed, tablet_rows=8, block_rows=4)


def step(head: ShardedMarginHead, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn((7, DIM), generator=generator).requires_grad_()
    loss = head(features, torch.randint(0, head.classes, (7,), generator=generator))
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("rule", [SGD(lr=0.1), Momentum(lr=0.1), RowRMS(lr=0.01)], ids=lambda rule: type(rule).__name__)
def test_training_goes_on_as_if_never_stopped(tmp_path: Path, rule: RowRule) -> None:
    head = make_head(rule=rule)
    losses = [step(head, seed) for seed in range(2)]
    save_checkpoint(head, tmp_path, 2, extra={"cursor.json": b"{}"})
    losses += [step(head, seed) for seed in range(2, 4)]
    other = make_head(rule=rule, seed=99)
    generation = load_checkpoint(other, tmp_path)
    assert generation.step == 2
    assert generation.read_extra("cursor.json") == b"{}"
    assert [step(other, seed) for seed in range(2, 4)] == losses[2:]
    assert torch.equal(other.rows, head.rows)
    assert torch.equal(other.state, head.state)
    with pytest.raises(HeadError, match=r"has no backbone, it has: cursor\.json"):
        generation.read_extra("backbone")


@pytest.mark.parametrize("place", [0, 20, 127, 130, 200, -1])
def test_a_flipped_byte_is_found_and_the_generation_before_is_loaded(tmp_path: Path, place: int) -> None:
    head = make_head()
    save_checkpoint(head, tmp_path, 1)
    first = head.rows.clone()
    step(head)
    save_checkpoint(head, tmp_path, 2)
    path = tmp_path / "step-000000002" / "tablet-000003.rows"
    value = bytearray(path.read_bytes())
    value[place] ^= 4
    path.write_bytes(value)
    other = make_head()
    assert load_checkpoint(other, tmp_path).step == 1
    assert torch.equal(other.rows, first)
    with pytest.raises(HeadError, match="tablet-000003"):
        load_checkpoint(other, tmp_path, step=2)


@pytest.mark.parametrize("damage", ["short", "long", "missing", "manifest", "no manifest"])
def test_what_is_not_whole_is_passed_over(tmp_path: Path, damage: str) -> None:
    head = make_head()
    save_checkpoint(head, tmp_path, 1)
    save_checkpoint(head, tmp_path, 2)
    folder = tmp_path / "step-000000002"
    tablet = folder / "tablet-000000.rows"
    if damage == "short":
        tablet.write_bytes(tablet.read_bytes()[:-1])
    elif damage == "long":
        tablet.write_bytes(tablet.read_bytes() + b"\0")
    elif damage == "missing":
        tablet.unlink()
    elif damage == "manifest":
        (folder / MANIFEST).write_text("{")
    else:
        (folder / MANIFEST).unlink()
    assert load_checkpoint(make_head(), tmp_path).step == 1


def test_another_layers_checkpoint_is_refused_with_what_differs(tmp_path: Path) -> None:
    save_checkpoint(make_head(), tmp_path, 1)
    with pytest.raises(HeadError, match="step 1 has 61 classes, the layer 60"):
        load_checkpoint(make_head(60), tmp_path)
    with pytest.raises(HeadError, match="step 1 has state_width 1, the layer 0"):
        load_checkpoint(make_head(rule=SGD(lr=1)), tmp_path)
    with pytest.raises(HeadError, match="none is complete"):
        load_checkpoint(make_head(), tmp_path / "elsewhere")
    with pytest.raises(HeadError, match="is complete already"):
        save_checkpoint(make_head(), tmp_path, 1)
    with pytest.raises(HeadError, match="needs a plain name"):
        save_checkpoint(make_head(), tmp_path, 2, extra={"../x": b""})


def test_new_classes_fill_the_last_tablet(tmp_path: Path) -> None:
    head = make_head(61)
    step(head)
    save_checkpoint(head, tmp_path, 1)
    larger = make_head(70)
    fresh = larger.dense_weight()[61:].clone()
    with pytest.raises(HeadError, match="61 classes"):
        load_checkpoint(larger, tmp_path)
    load_checkpoint(larger, tmp_path, grow=True)
    assert torch.equal(larger.dense_weight()[:61], head.dense_weight())
    assert torch.equal(larger.dense_weight()[61:], fresh)
    assert fresh.abs().sum(dim=1).min() > 0


def test_the_last_generations_stay_and_latest_names_the_newest(tmp_path: Path) -> None:
    head = make_head()
    (tmp_path / "step-000000000").mkdir()  # of a save that was killed
    for number in (1, 2, 3, 4):
        save_checkpoint(head, tmp_path, number, keep=2)
    assert [generation.step for generation in list_generations(tmp_path)] == [4, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-000000003", "step-000000004"]
    assert (tmp_path / LATEST).read_text() == "step-000000004"
    manifest = json.loads((tmp_path / "step-000000004" / MANIFEST).read_text())
    assert set(manifest["files"]) == {f"tablet-{index:06d}.rows" for index in range(8)}


JOB = """
    import os, sys
    import torch
    from outsize.models.faceid.layer.checkpoint import load_checkpoint, list_generations, save_checkpoint
    from outsize.models.faceid.layer.head import ShardedMarginHead
    from outsize.models.faceid.layer.row_rules import SGD
    torch.set_num_threads(1)
    while os.fork():  # each job is a process of its own, but torch is imported once
        os.wait()
        print("dead", flush=True)
        if not sys.stdin.readline():
            sys.exit()
    head = ShardedMarginHead(40_000, 16, rule=SGD(lr=0.1), tablet_rows=512, block_rows=512)
    number = list_generations(sys.argv[1])[0].step if list_generations(sys.argv[1]) else 0
    print(os.getpid(), flush=True)
    while True:
        number += 1
        head.rows.fill_(number % 1000)  # every row says which generation it is of
        save_checkpoint(head, sys.argv[1], number)
        print(number, flush=True)
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_generation(tmp_path: Path) -> None:
    head = ShardedMarginHead(40_000, 16, rule=SGD(lr=0.1), tablet_rows=512, block_rows=512)
    save_checkpoint(head, tmp_path, 0)
    random.seed(7)
    newest = 0
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(JOB), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as jobs:
        assert jobs.stdin is not None
        assert jobs.stdout is not None
        try:
            for _ in range(5):
                pid = int(jobs.stdout.readline())
                promised = int(jobs.stdout.readline())  # however slow the disk is: each job saves at least once
                time.sleep(random.uniform(0.0, 0.5))
                os.kill(pid, signal.SIGKILL)
                while jobs.stdout.readline() != "dead\n":
                    pass
                generation = load_checkpoint(head, tmp_path)
                assert generation.step >= promised > newest
                newest = generation.step
                assert (head.dense_weight() == newest % 1000).all()
                jobs.stdin.write("another\n")
                jobs.stdin.flush()
        finally:
            os.killpg(jobs.pid, signal.SIGKILL)


def test_a_layer_into_which_damage_was_read_is_not_used(tmp_path: Path) -> None:
    """What is read is checked when it is there: rows of a damaged file must teach nobody."""
    head = make_head()
    save_checkpoint(head, tmp_path, 1)
    path = tmp_path / "step-000000001" / "tablet-000003.rows"
    value = bytearray(path.read_bytes())
    value[140] ^= 4
    path.write_bytes(value)
    other = make_head()
    with pytest.raises(HeadError, match="tablet-000003"):
        load_checkpoint(other, tmp_path)
    for use in (lambda: step(other), lambda: save_checkpoint(other, tmp_path, 2)):
        with pytest.raises(HeadError, match=r"a backward or a load ended early after step 0, .* load a checkpoint"):
            use()
    save_checkpoint(head, tmp_path, 3)
    load_checkpoint(other, tmp_path)
    assert torch.equal(other.rows, head.rows)
    step(other)


def test_a_checkpoint_of_another_layer_leaves_the_rows_as_they_are(tmp_path: Path) -> None:
    save_checkpoint(make_head(), tmp_path, 1)
    other = make_head(60)
    before = other.rows.clone()
    with pytest.raises(HeadError, match="61 classes, the layer 60"):
        load_checkpoint(other, tmp_path)
    assert torch.equal(other.rows, before)
    step(other)


def test_a_forward_before_a_load_has_no_backward_after_it(tmp_path: Path) -> None:
    head = make_head()
    save_checkpoint(head, tmp_path, 1)
    features = torch.randn(4, head.dim, dtype=torch.float32).requires_grad_()
    loss = head(features, torch.tensor([0, 1, 2, 3]))
    load_checkpoint(head, tmp_path)
    with pytest.raises(HeadError, match="the rows have moved since this forward"):
        loss.backward()


@pytest.mark.parametrize("place", [12, 52])
def test_a_header_of_an_unknown_type_is_damage(tmp_path: Path, place: int) -> None:
    save_checkpoint(make_head(), tmp_path, 1)
    save_checkpoint(make_head(), tmp_path, 2)
    path = tmp_path / "step-000000002" / "tablet-000000.rows"
    value = bytearray(path.read_bytes())
    value[place] = 200
    path.write_bytes(value)
    assert load_checkpoint(make_head(), tmp_path).step == 1
