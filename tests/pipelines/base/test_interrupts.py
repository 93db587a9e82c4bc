"""Interrupts: one KeyboardInterrupt, in one line, whatever Dask's threads meet as their cluster goes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from outsize.pipelines.base.interrupts import heed_interrupts

pytestmark = pytest.mark.unit

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.getLogger("tornado.application").disabled = False


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_interrupts_once_and_silences_callbacks(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(number, signal.SIG_DFL)  # in the background it may be ignored, and would stay so
    ended: list[int] = []
    heed_interrupts(lambda: ended.append(1))
    log = logging.getLogger("tornado.application")
    log.error("Exception in callback: before")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    log.error("Exception in callback: after")
    assert "after" not in capsys.readouterr().err
    assert log.disabled
    signal.raise_signal(number)
    assert ended == ([1] if number == signal.SIGINT else [])


def test_what_was_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heed_interrupts(lambda: None)
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
