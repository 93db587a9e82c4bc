"""A real S3 server on loopback (moto's), and a proxy before it that fails on demand, in a process of their own.

Of its own, since rasterio holds Python's lock while GDAL asks for masks: a server in the same process could not answer.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

BUCKET = "rasters"
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Faults:
    """What the proxy does to the n-th data request, counted from 1."""

    errors: int = 0
    """Every so many are answered by 500; 0: none."""
    cuts: int = 0
    """Every so many are cut in the middle of their answer."""
    slow: int = 0
    """Every so many wait for a moment."""


@dataclass
class ObjectServer:
    """The server's process, as a test sees it."""

    process: subprocess.Popen[str]
    port: int
    proxy_port: int

    def use(self, monkeypatch: pytest.MonkeyPatch, faults: Faults | None = None) -> None:
        """Set the usual variables, for this process and its children. The endpoint is the proxy always: file systems
        keep the one that they began with."""
        self._ask(asdict(faults or Faults()))
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.proxy_port}",
            "AWS_S3_ENDPOINT": f"{HOST}:{self.proxy_port}",
            "AWS_HTTPS": "NO",
            "AWS_VIRTUAL_HOSTING": "FALSE",
            # That requests are tried again is what tests look at, not for how long others wait before.
            "GDAL_HTTP_RETRY_DELAY": "0.02",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.02)

    def count_faults(self) -> dict[str, int]:
        """How often each kind of fault was made since `use`."""
        return self._ask({})

    def client(self) -> boto3.client:  # pyright: ignore[reportGeneralTypeIssues] - made at run time
        return boto3.client(
            "s3",
            endpoint_url=f"http://{HOST}:{self.port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )

    def _ask(self, order: dict[str, int]) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def serve_objects() -> Iterator[ObjectServer]:
    """Serve an empty bucket. The process ends with its input, so also when this one is killed."""
    words = [sys.executable, "-P", __file__]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        server = ObjectServer(process, **json.loads(process.stdout.readline()))
        server.client().create_bucket(Bucket=BUCKET)
        try:
            yield server
        finally:
            process.stdin.close()


class _Proxy(ThreadingHTTPServer):
    """Hands requests on to a port, but for faults."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__((HOST, 0), _Handler)
        self.port = port
        self._guard = threading.Lock()
        self.set_faults({})

    def set_faults(self, every: dict[str, int]) -> None:
        with self._guard:
            self._every, self._requests = every, 0
            self.done = dict.fromkeys(every, 0)

    def next_fault(self) -> str:
        with self._guard:
            self._requests += 1
            for name, every in self._every.items():
                if every and self._requests % every == 0:
                    self.done[name] += 1
                    return name
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else a body waits for the headers before it to be acknowledged: 48 ms a request, not 2.
    disable_nagle_algorithm = True
    server: _Proxy  # pyright: ignore[reportIncompatibleVariableOverride] - which server it is for

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault()
        if fault == "errors":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "slow":
            time.sleep(0.1)
        upstream = http.client.HTTPConnection(HOST, self.server.port, timeout=60)
        upstream.request(self.command, self.path, body=body, headers=dict(self.headers))
        answer = upstream.getresponse()
        value = answer.read()
        self.send_response(answer.status)
        for name, text in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, text)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(value))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cuts":
            self.wfile.write(value[: len(value) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(value)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815 - the names of the base class

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args


def main() -> None:
    """Say both ports; then for each line of faults, or none, how many were made."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    proxy = _Proxy(server.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(json.dumps({"port": proxy.port, "proxy_port": proxy.server_address[1]}), flush=True)
    for line in sys.stdin:
        if order := json.loads(line):
            proxy.set_faults(order)
        print(json.dumps(proxy.done), flush=True)
    proxy.shutdown()
    server.stop()


if __name__ == "__main__":
    main()


def upload(server: ObjectServer, path: Path, name: str) -> str:
    """A file or a folder into the bucket; its URL."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        key = name if file == path else f"{name}/{file.relative_to(path).as_posix()}"
        server.client().upload_file(str(file), BUCKET, key)
    return f"s3://{BUCKET}/{name}"
