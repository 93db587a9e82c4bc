"""Registries: what may be added from outside, each kind of thing under its name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import UsageError

Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """Things of one kind by name: the package's own, those of installed packages, and those that a program adds.

    A package adds a thing by an entry point of the registry's group; its module is imported when the name is first
    asked for. A program adds one by the decorator `register`. A name is given once.

    Args:
        noun: of one thing, for refusals: "engine".
        group: of entry points: "outsize.engines".
        own: "module:name" of the package's own things, by name; imported when they are first asked for.
        kind: error that refuses an unknown name.
    """

    def __init__(self, noun: str, group: str, own: Mapping[str, str], *, kind: type[Exception] = UsageError) -> None:
        self.noun, self.group = noun, group
        self._kind = kind
        self._places = dict(own)
        self._things: dict[str, Thing] = {}
        self._looked = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[Any], Any]:
        """A decorator: the function or class is the thing of that name.

        Raises:
            UsageError: the name is taken.
        """

        def add(thing: Any) -> Any:
            with self._lock:
                if name in self.names():
                    raise UsageError(f"{self.noun} {name} is there already; register it by another name")
                self._things[name] = thing
            return thing

        return add

    def names(self) -> tuple[str, ...]:
        """All names, the package's own first."""
        with self._lock:
            if not self._looked:
                self._looked = True
                for point in entry_points(group=self.group):
                    # What came first keeps its name: an installed package cannot put itself in another's place.
                    self._places.setdefault(point.name, point.value)
            return tuple(dict.fromkeys((*self._places, *self._things)))

    def find(self, name: str) -> Thing:
        """The thing of that name.

        Raises:
            UsageError, or the registry's own kind: no such name; lists those that there are.
        """
        with self._lock:
            if name not in self._things:
                if name not in self.names():
                    raise self._kind(f"{self.noun} must be one of {', '.join(self.names())}, got {name!r}")
                module, _, attribute = self._places[name].partition(":")
                self._things[name] = getattr(import_module(module), attribute)
            return self._things[name]
