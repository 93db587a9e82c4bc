"""What options of all commands are made of: their variables, and values that click does not know; exit codes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click

from ...tiler.base.exact_numbers import parse_number

EXIT_FAILED, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 1, 3, 130
"""Beside click's own 2, of a wrong call. Some: tiles, windows or pictures; the rest is done."""

_NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?", re.IGNORECASE)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    """An option whose variable is OUTSIZE_NAME too, whatever the command."""
    variable = "OUTSIZE_" + names[0].lstrip("-").replace("-", "_").upper()
    return click.option(*names, envvar=settings.pop("envvar", variable), **settings)


def together(*decorators: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """Several decorators as one, in their order."""

    def decorate(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Real(click.FloatRange):
    """A number within bounds; neither nan, which no bound stops, nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class RegisteredName(click.ParamType):
    """The name of a registered thing, which is looked for when a name is given that is not the package's own.

    Args:
        registry: "module:name" in this package.
        own: the package's names, and other words that the option takes.
    """

    name = "name"

    def __init__(self, registry: str, own: tuple[str, ...]) -> None:
        self._registry, self.own = registry, own

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002 - click's signature
        return f"[{'|'.join(self.own)}]"

    def names(self) -> tuple[str, ...]:
        """Those of the package, and all that were added."""
        module, _, attribute = self._registry.partition(":")
        registry = getattr(import_module(module), attribute)
        return tuple(dict.fromkeys((*self.own, *registry.names())))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.own and value not in (names := self.names()):
            self.fail(f"{value!r} is not one of {', '.join(names)}", param, ctx)
        return value


class Place(click.ParamType):
    """A path, or the URL of an object store."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002 - click's signature
        from ...tiler.system.places import place_of

        return value if isinstance(value, Path) else place_of(value)


class Folder(click.Path):
    """A path of this machine; not an address, which would become a folder of that name."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ...tiler.system.places import scheme_of

        if scheme_of(value):
            self.fail(f"it is a path of this machine, got the address {value!r}", param, ctx)
        return super().convert(value, param, ctx)


class Texts(click.ParamType):
    """Texts between commas; a list in a TOML file."""

    name = "texts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = tuple(value) if isinstance(value, (list, tuple)) else tuple(str(value).split(","))
        texts = tuple(str(part).strip() for part in parts)
        if not all(texts):
            self.fail(f"texts between commas, got {value!r}", param, ctx)
        return texts


class Numbers(click.ParamType):
    """Numbers between commas, `count` of them; or that one word."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], count: int | None = None, word: str | None = None) -> None:
        self.kind, self.count, self.word = kind, count, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.word is not None and value == self.word:
            return value
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        try:
            numbers = tuple(self.kind(part) for part in parts)
            if any(float(part) != number for part, number in zip(parts, numbers, strict=True)):
                raise ValueError
        except (TypeError, ValueError):
            also = f"{self.word}, or " if self.word else ""
            self.fail(f"{also}numbers between commas, got {value!r}", param, ctx)
        if self.count is not None and len(numbers) != self.count:
            self.fail(f"{self.count} numbers between commas, got {value!r}", param, ctx)
        return numbers


class Bands(click.ParamType):
    """Bands between commas, by number or by name; a list in a TOML file."""

    name = "bands"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        texts = [str(part).strip() for part in parts]
        # A fraction or a sign is a number that was meant for something else.
        if not all(text and (text.isdecimal() or not _NUMBER.fullmatch(text)) for text in texts):
            self.fail(f"numbers between commas, from 1, or names, got {value!r}", param, ctx)
        return tuple(int(text) if text.isdecimal() else text for text in texts)


class Size(click.ParamType):
    """Height and width of pictures: 112, or 112x96."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(value)
        sides = str(value).lower().split("x")
        if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
            self.fail(f"sides in pixels, such as 112 or 112x96 (height x width), got {value!r}", param, ctx)
        return (int(sides[0]), int(sides[-1]))


class NodataValue(click.ParamType):
    """A number, nan, or none."""

    name = "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value is None or str(value).lower() == "none":
            return "none"
        try:
            return value if isinstance(value, float) else parse_number(str(value))
        except ValueError:
            self.fail(f"a number, nan or none, got {value!r}", param, ctx)


class MaskBand(click.ParamType):
    """N=V,V,...: a band and its values that mean nodata."""

    name = "mask"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        band, _, values = str(value).partition("=")
        try:
            return int(band), tuple(parse_number(part) for part in values.split(","))
        except ValueError:
            self.fail(f"a band and its values that mean nodata, such as 8=2,4; got {value!r}", param, ctx)


class OrderedGroup(click.Group):
    """Commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)
