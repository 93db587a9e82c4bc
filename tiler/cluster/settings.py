"""Dask's settings for the clusters that this process starts: Dask's own defaults and what a run needs, not the user's.

Settings in a user's files and DASK_ variables are meant for clusters that he starts: they name addresses, certificates,
ports and modules to load, and make workers spill, pause and restart. A run's own cluster they would break, or open to
whoever can write such a file.
"""

from __future__ import annotations

import copy
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dask import config

from ..system.private_folder import private_folder

PLACE = "temporary-directory"
PLACE_REMEDY = "name a folder of your own by DASK_TEMPORARY_DIRECTORY or TMPDIR"
LINK = "distributed.dashboard.link"
BOKEH = "distributed.scheduler.dashboard.bokeh-application"
ORIGINS = f"{BOKEH}.allow_websocket_origin"
METHOD = "distributed.worker.multiprocessing-method"
METHODS = ("spawn", "forkserver")
"""Ways to start a worker; a plain fork has threads' locks and none of the threads."""
NVML = "distributed.diagnostics.nvml"
SAFE_PATH = "PYTHONSAFEPATH"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What a cluster that is started now has to be told."""

    environment: dict[str, str]
    """Variables of its worker processes."""
    proxies: frozenset[str]
    """Names of hosts that pass on the dashboard's pages to the user."""


@contextmanager
def cluster_settings(environment: Mapping[str, str]) -> Iterator[ClusterSettings]:
    """While it is open, Dask starts clusters in this process by settings of ours, with temporary files in a folder that
    nobody else can write. Several runs at a time share both: the first brings them, the last takes them away.

    Args:
        environment: variables that worker processes get, but for those that the user has set himself.

    Raises:
        TemporaryFolderError: there is no such place for temporary files.
    """
    with _LOCK:
        if not _SHARED.users:
            _SHARED.open(environment)
        _SHARED.users += 1
    try:
        yield ClusterSettings(
            environment={name: _SHARED.environment.get(name, value) for name, value in environment.items()},
            proxies=_SHARED.proxies,
        )
    finally:
        with _LOCK:
            _SHARED.users -= 1
            if not _SHARED.users:
                _SHARED.stack.close()


class _Shared:
    """What the runs of this process share."""

    def __init__(self) -> None:
        self.users = 0
        self.stack = ExitStack()
        self.environment: dict[str, str] = {}
        """Of this process, before."""
        self.proxies: frozenset[str] = frozenset()

    def open(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(os.environ)
        self.proxies = find_proxies()
        with ExitStack() as stack:
            folder = stack.enter_context(private_folder(config.get(PLACE, None), PLACE_REMEDY))
            stack.callback(_forget_modules_of, str(folder))
            stack.callback(_restore_variables, self.environment, (SAFE_PATH, "PYTHONHASHSEED", *environment))
            stack.enter_context(config.set(make_settings(environment) | {PLACE: str(folder)}))
            # Python looks for the first modules of a process that it starts, worker or tracker, in the current folder.
            os.environ[SAFE_PATH] = "1"
            self.stack = stack.pop_all()


_SHARED, _LOCK = _Shared(), threading.Lock()


def _begin_anew() -> None:
    """In a fork: what is open is the parent's, and a thread that held the lock is not there to let it go."""
    global _SHARED, _LOCK
    _SHARED, _LOCK = _Shared(), threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


def _forget_modules_of(folder: str) -> None:
    """Dask has Python import from its temporary files before all else, and does not always take that back."""
    sys.path[:] = [entry for entry in sys.path if not str(entry).startswith(folder)]


def _restore_variables(before: Mapping[str, str], names: tuple[str, ...]) -> None:
    """Dask sets those of its workers in this process."""
    for name in names:
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)


def make_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Dask's defaults, with what a run needs, and of the user's those that harm no cluster."""
    defaults: dict[str, Any] = {}
    config.refresh(config=defaults, paths=[], env={})
    routes: list[str] = config.get("distributed.scheduler.http.routes", config=defaults)
    method, nvml = config.get(METHOD, None), config.get(NVML, None)
    return {
        "distributed": copy.deepcopy(defaults["distributed"]),
        # A run holds few, small results; Dask must neither spill nor stop workers at a share of its own guess.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        "distributed.nanny.pre-spawn-environ": dict(environment),
        # A cell whose worker dies twice is set aside and tried alone; more deaths beside others only cost time.
        "distributed.scheduler.allowed-failures": 1,
        # Workers show no pages, and the scheduler fetches none from elsewhere.
        "distributed.worker.http.routes": [],
        "distributed.scheduler.http.routes": [route for route in routes if route != "distributed.http.proxy"],
        # Bokeh takes a page's sessions only from who has read the page; hosts are looked at by `dashboard_guard`.
        f"{BOKEH}.sign_sessions": True,
        f"{BOKEH}.secret_key": secrets.token_bytes(32),
        METHOD: method if method in METHODS else METHODS[0],
        NVML: nvml if isinstance(nvml, bool) else config.get(NVML, config=defaults),
        LINK: _find_link() or config.get(LINK, config=defaults),
    }


def _find_link() -> str:
    """The user's form of the dashboard's address, as JupyterHubs have one; empty: none that can be filled in."""
    link = config.get(LINK, None)
    try:
        link.format(**{**os.environ, "scheme": "http", "host": "127.0.0.1", "port": 8787})
    except (AttributeError, LookupError, TypeError, ValueError):
        return ""
    return link


def find_proxies() -> frozenset[str]:
    """Hosts that Dask's settings name for the user's browser: in the dashboard's address, and as those whose
    pages may open its websockets."""
    origins: Any = config.get(ORIGINS, None)
    stated = origins if isinstance(origins, list | tuple) else ()
    shown = [_find_link(), *(f"//{origin}" for origin in stated if isinstance(origin, str))]
    names = set[str]()
    for address in shown:
        try:
            name = urlsplit(address).hostname
        except ValueError:
            continue
        if name and not set(name) & set("*{}") and name != "localhost" and not name.startswith(("127.", "::1")):
            names.add(name)
    return frozenset(names)
