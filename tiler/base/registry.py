"""Registries: what may be added from outside, each kind of thing under its name."""

from __future__ import annotations

import inspect
import os
import re
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import UsageError

Thing = TypeVar("Thing")
Decorated = TypeVar("Decorated")

MODULES_VARIABLE = "OUTSIZE_MODULES"
"""Environment variable: names of modules, separated by commas, that every process imports before it lists names."""
_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


class Registry(Generic[Thing]):
    """Things of one kind by name: the package's own, those of installed packages, and those that a program adds.

    A package adds a thing by an entry point of the registry's group. A program adds one by the decorator `register`.
    The module of a thing is imported when the thing is first asked for. A name belongs to one thing: where two claim
    it, whoever asks for it is refused, and told of both.

    Other processes know the package's own things, entry points, and what the modules of OUTSIZE_MODULES register. For
    the rest they are sent `place`, and import the thing from there.

    Args:
        noun: of one thing, for refusals: "engine".
        group: of entry points: "outsize.engines".
        own: "module:name" of the package's own things, by name.
        protocol: class whose methods and attributes a thing must have; `__call__` is what it is called with.
        kind: error that refuses an unknown name.
    """

    def __init__(
        self, noun: str, group: str, own: Mapping[str, str], *, protocol: type, kind: type[Exception] = UsageError
    ) -> None:
        self.noun, self.group = noun, group
        self._protocol, self._kind = protocol, kind
        self._own = frozenset(own)
        self._places: dict[str, str] = dict(own)
        self._decorated: dict[str, str] = {}
        self._collisions: dict[str, str] = {}
        self._things: dict[str, Thing] = {}
        self._has_looked = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[Decorated], Decorated]:
        """A decorator: the function or class is the thing of that name. Again from the same place, it takes the place
        of the former.

        Raises:
            UsageError: a name that is none, or that is another's; a thing that lacks what the protocol asks.
        """
        self._require_name(name)

        def add(thing: Decorated) -> Decorated:
            place = _place_of(thing)
            self._look()
            with self._lock:
                former = self._places.get(name, place)
                if former != place:
                    raise UsageError(f"{self.noun} {name} is {former} already; register {place} by another name")
                self._things[name] = self._fitting(name, place, thing)
                self._places[name] = self._decorated[name] = place
            return thing

        return add

    def names(self) -> tuple[str, ...]:
        """All names, the package's own first."""
        self._look(modules=True)
        return tuple(self._places)

    def added_names(self) -> tuple[str, ...]:
        """All names that are not the package's own."""
        return tuple(name for name in self.names() if name not in self._own)

    def find(self, name: str, place: str = "") -> Thing:
        """The thing of that name.

        Args:
            place: "module:name" of the thing, as `place` gave it to another process.

        Raises:
            UsageError, or the registry's own kind: no such name; lists those that there are.
            UsageError: two things claim the name; it cannot be imported, or lacks what the protocol asks.
        """
        self._look(modules=name not in self._own)
        with self._lock:
            if place and name not in self._places:
                self._places[name] = self._decorated[name] = place
            known = self._places.get(name)
        if known is None:
            raise self._kind(f"{self.noun} must be one of {', '.join(self._places)}, got {name!r}")
        if place not in ("", known):
            raise UsageError(
                f"{self.noun} {name} is {known} here, and {place} where it is sent from; install one alone"
            )
        if name in self._collisions:
            raise UsageError(self._collisions[name])
        if name in self._things:
            return self._things[name]
        # Not under the lock: the module may be waited for by a thread that imports it and now registers here.
        thing = self._fitting(name, known, self._import(name, known))
        with self._lock:
            return self._things.setdefault(name, thing)

    def make(self, name: str, *args: Any, **options: Any) -> Any:
        """What the thing of that name gives, called so; of a function, with what the protocol asks of a class.

        Raises:
            As `find`; UsageError: the function gave something that lacks it.
        """
        thing: Any = self.find(name)
        made = thing(*args, **options)
        lacking = "" if inspect.isclass(thing) else _find_lacking(made, self._protocol, called=False)
        if lacking:
            raise UsageError(
                f"{self.noun} {name}: what {self._places[name]} gives must have {lacking}, as "
                f"{self._protocol.__name__} says"
            )
        return made

    def place(self, name: str) -> str:
        """What another process needs beside the name, for `find`: "" for what it finds by itself.

        Raises:
            UsageError: the thing cannot be imported elsewhere: it is of a script, or stands inside a function.
        """
        place = self._decorated.get(name, "")
        if place.startswith("__main__:") or "<" in place:
            raise UsageError(
                f"{self.noun} {name} is {place}, which other processes cannot import; move it to the top of a module"
            )
        return place

    def _look(self, *, modules: bool = False) -> None:
        """See what entry points there are, once, and import the modules of OUTSIZE_MODULES."""
        with self._lock:
            if not self._has_looked:
                self._has_looked = True
                for point in entry_points(group=self.group):
                    former = self._places.setdefault(point.name, point.value)
                    if former != point.value:
                        self._collisions[point.name] = (
                            f"{self.noun} {point.name} is {former}, and {point.value} by an entry point of "
                            f"{self.group}; uninstall one of the two"
                        )
        for module in filter(None, os.environ.get(MODULES_VARIABLE, "").split(",") if modules else ()):
            try:
                import_module(module.strip())
            except ImportError as error:
                raise UsageError(f"{MODULES_VARIABLE} names {module}, which cannot be imported: {error}") from error

    def _import(self, name: str, place: str) -> Any:
        module, _, attribute = place.partition(":")
        try:
            found: Any = import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            if name in self._own:
                raise
            raise UsageError(f"{self.noun} {name} cannot be imported from {place}: {error}") from error
        return found

    def _require_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(f"a {self.noun} is named by small letters, digits, - and _, such as my-own2, got {name!r}")

    def _fitting(self, name: str, place: str, thing: Any) -> Any:
        self._require_name(name)
        # What a function makes is looked at when it is made.
        makes = inspect.isfunction(thing) and "__call__" in vars(self._protocol)
        lacking = _find_lacking(thing, self._protocol, parts=not makes)
        if lacking:
            raise UsageError(f"{self.noun} {name}: {place} must have {lacking}, as {self._protocol.__name__} says")
        return thing


def _place_of(thing: Any) -> str:
    if not hasattr(thing, "__qualname__"):
        raise UsageError(f"a function or a class is registered, got {thing!r}")
    return f"{thing.__module__}:{thing.__qualname__}"


def _find_lacking(thing: Any, protocol: type, *, called: bool = True, parts: bool = True) -> str:
    """The first method or attribute that the protocol asks for and the thing has not; "" where it has all.

    Args:
        called: look at how it is called.
        parts: look at its methods and attributes.
    """
    makes = inspect.isclass(thing) and "__call__" in vars(protocol)
    for name in protocol.__annotations__ if parts else ():
        if not hasattr(thing, name):
            return name
    for name, asked in vars(protocol).items():
        is_call = name == "__call__"
        if not inspect.isfunction(asked) or (name.startswith("_") and not is_call):
            continue
        own, *wanted = inspect.signature(asked).parameters.values()
        if is_call:
            shown, given = "a call ", thing
            is_asked = called
        else:
            shown, given = name, getattr(thing, name, None)
            is_asked = parts
            # Of a class that is called to make one, methods are looked at as an object has them.
            if makes and inspect.isfunction(inspect.getattr_static(thing, name, None)):
                wanted = [own, *wanted]
        if is_asked and not (callable(given) and _takes(given, wanted)):
            return f"{shown}({', '.join(parameter.name for parameter in wanted if parameter is not own)})"
    return ""


def _takes(function: Callable[..., Any], wanted: list[inspect.Parameter]) -> bool:
    """Whether a function takes these arguments, those before a * by position."""
    by_name = [parameter.name for parameter in wanted if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    try:
        inspect.signature(function).bind(*[None] * (len(wanted) - len(by_name)), **dict.fromkeys(by_name))
    except TypeError:
        return False
    except ValueError:
        # Of what is written in C nobody knows.
        return True
    return True


def modules_with(*places: str) -> str:
    """OUTSIZE_MODULES for a process that is to know these places too."""
    named = os.environ.get(MODULES_VARIABLE, "").split(",")
    return ",".join(dict.fromkeys(filter(None, (*named, *(place.partition(":")[0] for place in places)))))


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function or class takes an argument of that name."""
    return argument in inspect.signature(function).parameters
