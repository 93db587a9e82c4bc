"""Who may ask a run's dashboard: browsers that were led to it by one of its own names, and pages of its own.

The dashboard has no login. A page of any site could otherwise reach it through the user's browser: by a name of the
site's own that suddenly means 127.0.0.1, or by a websocket, which browsers open to any host.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from tornado.httputil import HTTPServerRequest
from tornado.routing import Matcher, Rule
from tornado.web import Application, RequestHandler


def guard(application: Application, names: Iterable[str], proxies: Iterable[str]) -> None:
    """Refuse all requests to an application, its later parts too, that come by a foreign name or from a foreign page.

    Args:
        names: of this machine, beside those that it knows.
        proxies: names of hosts that pass on requests, and pages, of their own.
    """
    application.default_router.rules.insert(0, Rule(_Foreign(frozenset(names), frozenset(proxies)), _Refused))


class _Foreign(Matcher):
    """Matches requests that are to be refused."""

    def __init__(self, names: frozenset[str], proxies: frozenset[str]) -> None:
        self._names, self._proxies = names, proxies

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        hosts, origins = (request.headers.get_list(name) for name in ("Host", "Origin"))
        return None if is_known(hosts, origins, self._names, self._proxies) else {}


class _Refused(RequestHandler):
    """The answer to any method, a websocket's beginning too."""

    async def prepare(self) -> None:
        self.set_status(403)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(
            "This dashboard is asked by this machine's names only, and by its own pages. Another name is allowed by "
            "Dask's setting distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin.\n"
        )


def is_known(hosts: list[str], origins: list[str], names: frozenset[str], proxies: frozenset[str]) -> bool:
    """Whether a request asks by one of our names, and comes from no page but ours.

    Args:
        hosts: values of its header Host.
        origins: values of its header Origin, which browsers send with websockets and from other pages.
        names, proxies: as of `guard`.
    """
    if len(hosts) != 1 or len(origins) > 1:
        return False
    host = _split(f"//{hosts[0]}")
    if host is None or not _is_ours(host[0], names | proxies):
        return False
    if not origins:
        return True
    origin = _split(origins[0])
    # Another port of this machine is another site, and perhaps another user's.
    return origin is not None and (origin == host or origin[0] in proxies)


def _split(address: str) -> tuple[str, int | None] | None:
    """Host and port; None: it is no address."""
    try:
        parts = urlsplit(address)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or parts.username is not None or parts.path or parts.query or parts.fragment:
        return None
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    return name.rstrip("."), None if port == usual else port


def _is_ours(name: str, names: frozenset[str]) -> bool:
    if name in names or name == "localhost" or name in own_names():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    # A number cannot be made to mean another machine.
    return True


@cache
def own_names() -> frozenset[str]:
    """Of this machine; looked up nowhere, as that can take seconds."""
    name = socket.gethostname().lower()
    return frozenset({name, name.partition(".")[0]} - {""})
