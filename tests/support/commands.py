"""The `outsize` command for tests: every call a process of its own, forked from one that has done the imports.

Imports take a command two to four seconds, and tests make some hundred calls. What a call does is the same; only sizes
of processes differ, since forked ones share their pages: where memory is measured, or imports are the point, tests call
a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, Any

from outsize import pipelines
from outsize.pipelines.commands.cli import main
from outsize.tiler.system.process_end import end_with

TIMEOUT_S = 600.0
COMMAND = [sys.executable, "-m", "outsize"]
"""In a fresh interpreter."""


class Command:
    """A call of `outsize` that runs; the methods are subprocess.Popen's."""

    def __init__(
        self,
        *words: str | Path,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        start_new_session: bool = False,
        first: str = "",
    ) -> None:
        """Args:
        env: variables beside those of this process.
        first: Python that the process runs before the command, as to get a signal at a certain place.
        stdin, stdout, stderr: where they go; None: nowhere.
        """
        self.args = [str(word) for word in words]
        self.returncode: int | None = None
        self._server = _server()
        request = {
            "words": self.args,
            "env": {**os.environ, **(env or {})},
            "cwd": str(cwd or Path.cwd()),
            "session": start_new_session,
            "first": first,
        }
        with Path(os.devnull).open("r+b") as nowhere:
            streams = [nowhere if stream is None else stream for stream in (stdin, stdout, stderr)]
            handles = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
            self.pid = int(self._server.ask(request, handles))
        self._ended = os.pidfd_open(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._server.ask({"pid": self.pid}))
            os.close(self._ended)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def outsize(
    *words: str | Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    first: str = "",
    timeout: float = TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """The command, and what it said and how it ended."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        command = Command(*words, env=env, cwd=cwd, first=first, stdout=out, stderr=errors)
        try:
            command.wait(timeout)
        except BaseException:
            command.kill()
            raise
        for stream in (out, errors):
            stream.seek(0)
        return subprocess.CompletedProcess(command.args, command.wait(), out.read(), errors.read())


def outsize_on_two_ranks(*words: str | Path) -> list[subprocess.CompletedProcess[str]]:
    """The same as each of two ranks, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    with contextlib.ExitStack() as opened:
        streams = [[opened.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in range(2)]
        ranks = [
            Command(*words, env={**shared, "RANK": str(rank)}, stdout=out, stderr=errors)
            for rank, (out, errors) in enumerate(streams)
        ]
        try:
            codes = [rank.wait(60) for rank in ranks]
        except BaseException:
            for rank in ranks:
                rank.kill()
            raise
        for stream in itertools.chain(*streams):
            stream.seek(0)
        return [
            subprocess.CompletedProcess(list(words), code, out.read(), errors.read())
            for code, (out, errors) in zip(codes, streams, strict=True)
        ]


def fresh_outsize(
    *words: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """The same in an interpreter of its own, imports and all."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )


def outsize_here(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process and its current folder: where no fresh process matters."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has ignored
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


def result_of(completed: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a call with --json gave, which has to have gone well."""
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


class _Server:
    """The process that forks calls; it ends when this one does."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "outsize.tests.support.commands", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # Only a process of one thread may be forked.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        atexit.register(self.close)
        assert self._channel.recv(16) == b"ready", "the server of commands did not start"

    def ask(self, request: dict[str, Any], handles: list[int] | None = None) -> bytes:
        socket.send_fds(self._channel, [json.dumps(request).encode()], handles or [])
        answer = self._channel.recv(64)
        assert answer, "the server of commands has died"
        return answer

    def close(self) -> None:
        self._channel.close()
        self._process.wait()


@cache
def _server() -> _Server:
    return _Server()


def _import_all() -> None:
    """What commands import, and what torch imports and remembers as it traces for the first time; OpenVINO would start
    threads."""
    for module in pkgutil.iter_modules(pipelines.__path__, "outsize.pipelines."):
        importlib.import_module(module.name)
    from outsize.models import as_tile_network, load_model
    from outsize.tiler.analysis.network import analyze_network
    from outsize.tiler.system.machine import one_thread

    with one_thread():
        analyze_network(as_tile_network(load_model()), bands=4, dtype="uint8")


def _serve(channel: socket.socket) -> list[str] | None:
    """Fork for each request; returns in each child, with the words of its call, and at the end."""
    sys.path[:] = [folder for folder in sys.path if folder not in ("", str(Path.cwd()))]
    _import_all()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "imports started threads"
    gc.collect()
    gc.freeze()
    channel.send(b"ready")
    while True:
        data, handles, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not data:
            return None
        request = json.loads(data)
        if "pid" in request:
            _, status = os.waitpid(request["pid"], 0)
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if not pid:
            channel.close()
            _become(request, handles)
            return request["words"]
        channel.send(str(pid).encode())
        for handle in handles:
            os.close(handle)


def _become(request: dict[str, Any], handles: list[int]) -> None:
    """Streams, folder, variables and signals as a new process has them."""
    if request["session"]:
        os.setsid()
    for stream, handle in enumerate(handles):
        os.dup2(handle, stream)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # Shells start background jobs with signals ignored, and so this suite, perhaps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["outsize", *request["words"]]
    exec(request["first"], {})


if __name__ == "__main__":
    call = _serve(socket.socket(fileno=int(sys.argv[1])))
    if call is not None:
        end_with(lambda: main(call))
