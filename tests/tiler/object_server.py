"""A real S3 server on loopback (moto's), and a proxy before it that fails on demand."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest

BUCKET = "rasters"


@dataclass
class Faults:
    """What the proxy does to the n-th data request, counted from 1."""

    errors: int = 0
    """Every so many are answered by 500; 0: none."""
    cuts: int = 0
    """Every so many are cut in the middle of their answer."""
    slow: int = 0
    """Every so many wait for a moment."""
    done: dict[str, int] = field(default_factory=lambda: {"errors": 0, "cuts": 0, "slow": 0, "requests": 0})
    guard: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> str:
        with self.guard:
            self.done["requests"] += 1
            for name in ("errors", "cuts", "slow"):
                every = getattr(self, name)
                if every and self.done["requests"] % every == 0:
                    self.done[name] += 1
                    return name
        return ""


@dataclass
class ObjectServer:
    """Where it is, and what fails there."""

    host: str
    port: int
    proxy_port: int
    faults: Faults = field(default_factory=Faults)

    def use(self, monkeypatch: pytest.MonkeyPatch, faults: Faults | None = None) -> None:
        """Set the usual variables, for this process and its children. The endpoint is the proxy always: file systems
        keep the one that they began with."""
        self.faults, port = faults or Faults(), self.proxy_port
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{self.host}:{port}",
            "AWS_S3_ENDPOINT": f"{self.host}:{port}",
            "AWS_HTTPS": "NO",
            "AWS_VIRTUAL_HOSTING": "FALSE",
            # rasterio holds Python's lock while GDAL looks for masks, and this process cannot serve what it may ask for
            # then: not for long.
            "GDAL_HTTP_TIMEOUT": "5",
            # That requests are tried again is what tests look at, not for how long others wait before.
            "GDAL_HTTP_RETRY_DELAY": "0.02",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.02)

    def client(self) -> boto3.client:  # pyright: ignore[reportGeneralTypeIssues] - made at run time
        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.host}:{self.port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )


@contextmanager
def serve_objects() -> Iterator[ObjectServer]:
    """Serve an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = ObjectServer(host=host, port=port, proxy_port=0)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    proxy.daemon_threads = True
    found.proxy_port = proxy.server_address[1]
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    found.client().create_bucket(Bucket=BUCKET)
    try:
        yield found
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def _handler(server: ObjectServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = server.faults.next()
            if fault == "errors":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "slow":
                time.sleep(0.1)
            upstream = http.client.HTTPConnection(server.host, server.port, timeout=60)
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

    return Handler
