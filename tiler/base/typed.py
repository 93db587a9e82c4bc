"""Whether values that came from a file have the types that are written down for them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as annotations have it: of JSON's kinds, tuples, and dataclasses of these. A bool is
    no int, an int is a float; of a mapping that is given as a hint every name must be there."""
    if isinstance(hint, Mapping):
        return isinstance(value, Mapping) and all(name in value and fits(value[name], hint[name]) for name in hint)
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner and type(value) in {type(each) for each in inner}
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is ...:
            return all(fits(each, inner[0]) for each in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is not None:
        return isinstance(value, origin)
    if isinstance(hint, type) and is_dataclass(hint):
        return isinstance(value, hint) and not find_misfit(value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def find_misfit(value: Any) -> str:
    """The first field of a dataclass whose value is of another type than written down; empty: none."""
    hints = _hints(type(value))
    return next((each.name for each in fields(value) if not fits(getattr(value, each.name), hints[each.name])), "")
