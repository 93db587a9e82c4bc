"""The tile map in a Dask scheduler: a plugin that keeps the maps of runs, `/tilemap.json`, and the page `/tilemap`.

Installed by every run; or with the scheduler: dask scheduler --preload outsize.tiler.cluster.dashboard
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado.web import RequestHandler

from ..base.text import first_line
from ..system.logs import log
from .tile_map import TOPIC, Message, TileMap, end_message

if TYPE_CHECKING:
    from distributed import Scheduler

NAME = "outsize-tilemap"
RUNS = 8
"""Maps that are kept, the last ones."""
PAGE = "tilemap"
LAST_LOOK_S = 1.0
"""What open pages get, at most, to show how a run ended, before its cluster may close."""
SENDING_S = 0.2
"""Of that, for what the server has written to reach the browser."""


class TileMapPlugin(SchedulerPlugin):
    """Keeps the maps of the last runs in a scheduler, and shows them in its dashboard."""

    name = NAME
    idempotent = True

    def __init__(self) -> None:
        self.maps: dict[str, TileMap] = {}
        self.pages: set[Callable[[], Awaitable[None]]] = set()
        """Of each page that is open now: brings it up to date."""
        self._scheduler: Scheduler | None = None

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # A scheduler without a web server, or a Dask whose inner parts have changed, must not stop a run.
        try:
            _add_route(scheduler, self)
        except Exception as error:  # noqa: BLE001
            log.warning("no /tilemap.json: %r", error)
            return
        try:
            _add_page(scheduler, self)
        except Exception as error:  # noqa: BLE001
            log.warning("no page /tilemap, /tilemap.json has the same: %r; is bokeh installed?", error)

    def log_event(self, topic: str, msg: Any) -> None:
        """Take a message of a run."""
        if topic != TOPIC:
            return
        # Anybody who reaches the scheduler can send messages; a wrong one must not hurt it.
        with contextlib.suppress(Exception):
            if msg["type"] == "begin":
                self.maps.pop(msg["run"], None)
                while len(self.maps) >= RUNS:
                    self.maps.pop(next(iter(self.maps)))
                self.maps[msg["run"]] = TileMap(msg)
            elif msg["run"] in self.maps:
                self.maps[msg["run"]].apply(msg)

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:  # noqa: ARG002 - Dask's signature
        for tiles in self.maps.values():
            tiles.lose(worker)

    async def bring_up_to_date(self) -> None:
        """What is known is on its way to all open pages; at once where none is open."""
        if self.pages:
            await asyncio.gather(*(refresh() for refresh in self.pages), return_exceptions=True)
            await asyncio.sleep(SENDING_S)

    def describe_workers(self, tiles: TileMap | None) -> list[dict[str, Any]]:
        """Name, memory and tiles of every worker there is."""
        if self._scheduler is None:
            return []
        found: list[dict[str, Any]] = []
        busy = tiles.count_running() if tiles is not None else {}
        for address, state in self._scheduler.workers.items():
            running = busy.get(address, 0)
            found.append(
                {
                    "worker": address,
                    "name": str(state.name),
                    "state": "running" if running else "idle",
                    "running": running,
                    "done": tiles.done_by[address] if tiles is not None else 0,
                    "memory_bytes": int(state.metrics.get("memory", 0)),
                    "threads": state.nthreads,
                }
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """All runs, the last one first."""
        return {
            "runs": [
                {**tiles.to_json(), "workers": self.describe_workers(tiles)} for tiles in reversed(self.maps.values())
            ],
            "at": round(time.time(), 3),
        }


class _JsonRoute(RequestHandler):
    def initialize(self, plugin: TileMapPlugin) -> None:
        self._plugin = plugin

    def get(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.write(self._plugin.to_json())


def _prefix_of(scheduler: Any) -> str:
    """Of the dashboard's pages, as Dask's own have it: "", or what `dask scheduler --dashboard-prefix` says."""
    for application in scheduler.http_application.applications:
        prefix = str(getattr(application, "prefix", "") or "").strip("/")
        if prefix:
            return f"/{prefix}"
    return ""


def _add_route(scheduler: Any, plugin: TileMapPlugin) -> None:
    route = (rf"{_prefix_of(scheduler)}/{PAGE}\.json", _JsonRoute, {"plugin": plugin})
    scheduler.http_application.add_handlers(r".*", [route])


def _add_page(scheduler: Any, plugin: TileMapPlugin) -> None:
    """The page, and its entry in the navigation of Dask's own pages; by parts of Dask that are not promised to stay."""
    if "dashboard" not in scheduler.services:
        return
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    from .dashboard_page import open_page

    variables = template_variables(scheduler)

    def page(_scheduler: Any, extra: dict[str, Any], document: Any) -> None:
        open_page(plugin, extra, document)

    application = BokehApplication(
        {f"/{PAGE}": page}, scheduler, prefix=_prefix_of(scheduler), template_variables=variables
    )
    scheduler.http_application.add_application(application)
    application.initialize(IOLoop.current())
    application.start()
    if PAGE not in variables["pages"]:
        variables["pages"].insert(1, PAGE)


async def dask_setup(scheduler: Scheduler) -> None:
    """What `dask scheduler --preload outsize.tiler.cluster.dashboard` calls."""
    plugin = TileMapPlugin()
    await plugin.start(scheduler)
    scheduler.add_plugin(plugin, name=NAME, idempotent=True)


class Watch:
    """The commanding process's line to the map; silent where there is none."""

    def __init__(self, client: Client | None) -> None:
        self._client = client

    @property
    def is_on(self) -> bool:
        """Whether somebody listens."""
        return self._client is not None

    def tell(self, message: Message) -> None:
        """Send a message; a map that cannot be reached is given up, not the run."""
        if self._client is None:
            return
        try:
            self._client.log_event(TOPIC, message)
        except Exception as error:  # noqa: BLE001
            log.warning("the tile map was lost: %r", error)
            self._client = None


@contextlib.contextmanager
def watch_run(client: Client, begin: Message | None) -> Iterator[Watch]:
    """Show a run on the scheduler's tile map, which is installed if it is not there.

    Args:
        begin: `begin_message`; None: nothing is shown.
    """
    watch = Watch(client if begin is not None and _install(client) else None)
    if begin is None:
        yield watch
        return
    watch.tell(begin)
    try:
        yield watch
    except BaseException as error:
        reason = first_line(error, "")
        watch.tell(end_message(begin["run"], f"{type(error).__name__}: {reason}".rstrip(": ")))
        _let_pages_see(client)
        raise
    watch.tell(end_message(begin["run"], "finished"))
    _let_pages_see(client)


def _let_pages_see(client: Client) -> None:
    """Give open pages a moment where the scheduler is in this process: it may close with the run."""
    with contextlib.suppress(Exception):  # such as a cluster of another kind
        cluster: Any = client.cluster
        plugin: TileMapPlugin = cluster.scheduler.plugins[NAME]
        cluster.sync(plugin.bring_up_to_date, callback_timeout=LAST_LOOK_S)


def _install(client: Client) -> bool:
    try:
        client.register_plugin(TileMapPlugin())
    except Exception as error:  # noqa: BLE001 - such as a scheduler where outsize is not installed
        log.warning("no tile map: %r; install outsize where the scheduler runs", error)
        return False
    return True
