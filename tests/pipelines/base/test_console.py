"""Lines of progress: what an earlier call did tells nothing of how long the rest takes."""

from __future__ import annotations

import time

import pytest
from outsize.pipelines.base import console


@pytest.mark.parametrize(("done", "left"), [(0, "ETA 45 s"), (60, "ETA 15 s")])
def test_the_time_that_is_left_goes_by_what_this_call_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: int, left: str
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Console().step("train", 100, done=done, counts_pixels=False) as bar:
        bar.advance(0, "goes on")
        now[0] += 15.0
        bar.advance(25 if not done else 20)
        assert capsys.readouterr().err == f"train: {done + (20 if done else 25)} %, {left}\n"


def test_stages_are_told_of_only_where_they_take_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Console().stages("analysis") as tell:
        tell("the network is traced")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "LONG_S", 0.02)
    with console.Console().stages("analysis") as tell:
        tell("the network is traced")
        time.sleep(0.2)
        tell("rules are applied")
    traced, rules = capsys.readouterr().err.splitlines()
    assert traced.startswith("analysis  the network is traced, 0.")
    assert rules.startswith("analysis  rules are applied, 0.")
    time.sleep(0.05)
    assert capsys.readouterr().err == ""
