"""The quick end of a process beside Python's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

PROGRAM = """
import atexit, sys, threading, time
from outsize.tiler.system.process_end import end_with

class Kept:
    def __del__(self):
        print("freed")

kept = Kept()
atexit.register(print, "registered early")

def main():
    atexit.register(print, "registered late")
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
    print("main")
    {statement}
"""
QUICK, USUAL = "end_with(main)", "sys.exit(main())"


def run(statement: str, end: str, **streams: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PROGRAM.format(statement=statement) + end]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    # Unbuffered streams would fail earlier.
    return subprocess.run(words, **how, text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": ""})


@pytest.mark.parametrize(
    "statement", ["return 0", "return 3", "pass", "sys.exit(130)", "sys.exit()", "sys.exit('why')", "1 / 0"]
)
def test_code_threads_and_exit_functions_are_those_of_python_and_only_objects_are_not_freed(statement: str) -> None:
    quick, usual = run(statement, QUICK), run(statement, USUAL)
    assert usual.stdout.splitlines() == ["main", "thread", "registered late", "registered early", "freed"]
    assert quick.stdout.splitlines() == usual.stdout.splitlines()[:-1]
    assert quick.returncode == usual.returncode
    assert quick.stderr.splitlines()[-1:] == usual.stderr.splitlines()[-1:]


def test_a_process_that_was_begun_without_a_stream_ends_in_silence() -> None:
    program = PROGRAM.format(statement="return 3") + QUICK
    words = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, program]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_what_a_stream_does_not_take_is_no_success() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        assert run("return 0", QUICK, stdout=full).returncode == 1
        assert run("return 3", QUICK, stdout=full).returncode == 3
    finally:
        os.close(full)
