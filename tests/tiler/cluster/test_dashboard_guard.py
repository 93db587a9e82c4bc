"""The dashboard of a run: asked by its own names, from its own pages, with its own tokens, and by nothing else."""

from __future__ import annotations

import base64
import http.client
import os
import re
import socket
from collections.abc import Iterator

import pytest
from bokeh.util.token import generate_jwt_token, generate_session_id
from outsize.tiler.cluster.client import ClusterOptions, open_client
from outsize.tiler.cluster.dashboard import TileMapPlugin
from outsize.tiler.cluster.dashboard_guard import is_known, own_names
from outsize.tiler.cluster.settings import ORIGINS

pytestmark = pytest.mark.system

NAMES, PROXIES = frozenset({"box.example.org"}), frozenset({"hub.example.org"})
ME = socket.gethostname().lower()


@pytest.mark.parametrize(
    ("host", "origin", "known"),
    [
        ("127.0.0.1:8787", None, True),
        ("localhost:8787", None, True),
        ("LOCALHOST:8787", None, True),
        ("[::1]:8787", None, True),
        (f"{ME}:8787", None, True),
        ("10.1.2.3:8787", None, True),  # a number cannot be made to mean another machine
        ("hub.example.org", None, True),
        ("box.example.org:8787", "http://box.example.org:8787", True),
        ("box.example.org:8787", "http://box.example.org:9999", False),
        ("evil.example:8787", None, False),
        ("localhost.evil.example:8787", None, False),
        ("127.0.0.1.evil.example:8787", None, False),
        ("evil.example#localhost", None, False),
        ("evil.example@localhost:8787", None, False),
        ("user@localhost:8787", None, False),
        ("localhost:8787/x", None, False),
        ("localhost:port", None, False),
        ("", None, False),
        ("127.0.0.1:8787", "http://127.0.0.1:8787", True),
        ("localhost:8787", "http://localhost:8787", True),
        ("localhost:8787", "http://LOCALHOST:8787", True),
        ("hub.example.org", "https://hub.example.org", True),
        ("127.0.0.1:8787", "https://hub.example.org", True),  # a proxy that asks by a name of its own
        ("127.0.0.1:8787", "http://127.0.0.1:9999", False),  # another port can be another user's
        ("127.0.0.1:8787", "http://localhost:8787", False),
        ("127.0.0.1:8787", "http://evil.example", False),
        ("evil.example:8787", "http://evil.example:8787", False),
        ("127.0.0.1:8787", "null", False),
        ("127.0.0.1:8787", "", False),
        ("127.0.0.1:8787", "http://[", False),
    ],
)
def test_hosts_and_origins_that_are_known(host: str, origin: str | None, known: bool) -> None:
    assert is_known([host], [] if origin is None else [origin], NAMES, PROXIES) is known


def test_a_request_names_one_host_and_one_origin() -> None:
    assert not is_known([], [], NAMES, PROXIES)
    assert not is_known(["localhost", "evil.example"], [], NAMES, PROXIES)
    assert not is_known(["localhost"], ["http://localhost", "http://evil.example"], NAMES, PROXIES)
    assert ME in own_names()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a dashboard as runs have it, with the tile map, for which a user has stated a name."""
    from dask import config

    options = ClusterOptions(dashboard_address="127.0.0.1:0", processes=False)
    with (
        config.set({ORIGINS: ["*", "hub.example.org:443"]}),
        open_client(options, workers=1, threads=1, gdal_cache_bytes=1 << 24) as client,
    ):
        client.register_plugin(TileMapPlugin())
        yield client.scheduler_info()["services"]["dashboard"]


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


PAGES = [
    "/tilemap",
    "/tilemap.json",
    "/status",
    "/info/main/workers.html",
    "/health",
    "/json/identity.json",
    "/nowhere",
]


@pytest.mark.parametrize("path", PAGES)
def test_no_page_is_shown_to_who_comes_by_another_name(port: int, path: str) -> None:
    assert ask(port, path)[0] == (404 if path == "/nowhere" else 200)
    assert ask(port, path, Host="hub.example.org")[0] in (200, 404)
    for method in ("GET", "POST", "OPTIONS"):
        status, said = ask(port, path, method, Host=f"evil.example:{port}")
        assert (status, said.split(" is ")[0]) == (403, "This dashboard")
    assert ask(port, path, Origin="http://evil.example")[0] == 403


def test_the_scheduler_fetches_no_pages_from_elsewhere(port: int) -> None:
    assert ask(port, "/proxy/80/127.0.0.1/")[0] == 404


def greet(port: int, path: str, token: str, **headers: str) -> tuple[int, int]:
    """The status of a websocket's beginning, and the first byte of what comes: 0x81 a message, 0x88 its end."""
    lines = {
        "Host": f"127.0.0.1:{port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": f"bokeh, {token}",
    } | headers
    with socket.create_connection(("127.0.0.1", port), timeout=20) as channel:
        channel.sendall(
            "".join([f"GET {path} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in lines.items()), "\r\n"]).encode()
        )
        said = b""
        while b"\r\n\r\n" not in said and (part := channel.recv(4096)):
            said += part
        head, _, rest = said.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        return status, (rest or channel.recv(1) or b"\0")[0] if status == 101 else 0


@pytest.mark.parametrize("page", ["tilemap", "status"])
def test_websockets_are_for_the_dashboards_own_pages_and_tokens(port: int, page: str) -> None:
    found = re.search(r'"token":"([^"]+)"', ask(port, f"/{page}")[1])
    assert found is not None
    token, path, own = found[1], f"/{page}/ws", f"http://127.0.0.1:{port}"
    assert greet(port, path, token, Origin=own) == (101, 0x81)
    assert greet(port, path, token, Origin="https://hub.example.org") == (101, 0x81)
    assert greet(port, path, token, Origin="http://evil.example")[0] == 403
    assert greet(port, path, token, Origin="http://127.0.0.1:1")[0] == 403
    assert greet(port, path, token, Origin=f"http://evil.example:{port}", Host=f"evil.example:{port}")[0] == 403
    forged = generate_jwt_token(generate_session_id(signed=False), signed=False)
    guessed = generate_jwt_token(generate_session_id(b"guessed", signed=True), b"guessed", signed=True)
    for token in (forged, guessed):
        assert greet(port, path, token, Origin=own) == (101, 0x88)


def test_dasks_stream_of_events_is_not_for_other_sites(port: int) -> None:
    assert greet(port, "/eventstream", "x", Origin=f"http://127.0.0.1:{port}")[0] == 101
    assert greet(port, "/eventstream", "x", Origin="http://evil.example")[0] == 403
