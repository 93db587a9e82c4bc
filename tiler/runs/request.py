"""What a call asks of a run, as frozen values: how it is planned, written and shown, and which tiles it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from distributed import Client

from ..cluster.client import ClusterKeeper, ClusterOptions
from ..output.options import WriteKeywords, WriteOptions
from ..output.store import OutputDescription
from ..planning.options import PlanKeywords, PlanOptions
from .events import Event, Listener


class RunKeywords(PlanKeywords, WriteKeywords, total=False):
    """The fields of `PlanOptions` and `WriteOptions`, as keywords."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which of a plan's tiles one call does."""

    redo: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of tiles that are done again, done or not."""
    rest: bool = True
    """What no call has done yet is done too; False: only `redo`, and an unfinished output stays so."""


def ignore(event: Event) -> None:
    """The listener of a run that nobody watches."""
    del event


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What a call asks of a run."""

    planning: PlanOptions = field(default_factory=PlanOptions)
    writing: WriteOptions = field(default_factory=WriteOptions)
    description: OutputDescription | None = None
    """What the output means; None: told from the network's output dtype and channels."""
    fill: tuple[float, ...] | None = None
    """Raw value of each band that stands in for nodata; None: 0."""
    client: Client | None = None
    """A Dask client to use; None: one is opened as `cluster` says."""
    cluster: ClusterOptions | ClusterKeeper = field(default_factory=ClusterOptions)
    tile_map: bool = True
    """The run is shown on the page /tilemap of the Dask dashboard."""
    listener: Listener = ignore
    """Called with every event."""
    scope: Scope = field(default_factory=Scope)
    since: float | None = None
    """`time.perf_counter()` from which start-up is counted; None: the call."""

    @property
    def cluster_options(self) -> ClusterOptions:
        return self.cluster.options if isinstance(self.cluster, ClusterKeeper) else self.cluster

    @property
    def serves_dashboard(self) -> bool:
        """Whether this process serves Dask's dashboard."""
        return self.client is None and self.cluster_options.serves_dashboard

    @property
    def shows_map(self) -> bool:
        return self.tile_map and (self.client is not None or self.cluster_options.dashboard_address is not None)


def split_keywords(
    keywords: Mapping[str, Any], planning: PlanOptions | None, writing: WriteOptions | None
) -> tuple[PlanOptions, WriteOptions]:
    """The options with those of their fields replaced that keywords name.

    Raises:
        TypeError: a name that is no field of either.
        UsageError: a value that its field does not take.
    """
    planned, written = ({each.name for each in fields(kind)} for kind in (PlanOptions, WriteOptions))
    for name in keywords:
        if name not in planned | written:
            raise TypeError(f"no option is called {name!r}; options are {', '.join(sorted(planned | written))}")
    return (
        replace(planning or PlanOptions(), **{name: keywords[name] for name in keywords if name in planned}),
        replace(writing or WriteOptions(), **{name: keywords[name] for name in keywords if name in written}),
    )
