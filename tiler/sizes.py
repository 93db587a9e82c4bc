"""Sizes as expressions of the image's size: evaluation, and the extents at which they are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.printers import PythonPrinter

from .geometry import align_up


def expression_of(value: Any) -> sympy.Expr:
    """A size as a sympy expression: of an int, a SymInt, or a graph node that holds one."""
    if isinstance(value, Node):
        value = value.meta["val"]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return sympy.Integer(int(value))


@cache
def _compiled(expression: sympy.Expr, symbols: tuple[sympy.Symbol, ...]) -> Callable[..., Any]:
    """The expression as a Python function of its symbols; sympy's own substitution is a thousand times slower."""
    names = [symbol.name for symbol in symbols]
    helpers = {"math": math, "min": min, "max": max, "torch": torch}
    return eval(f"lambda {', '.join(names)}: {PythonPrinter().doprint(expression)}", helpers)


def evaluate(expression: sympy.Expr, symbol: sympy.Symbol, extent: int) -> int:
    """A size expression of one symbol at one extent of the image.

    Raises:
        ValueError: it depends on another symbol too.
    """
    return int(_compiled_of_one(expression, symbol)(extent))


@cache
def _compiled_of_one(expression: sympy.Expr, symbol: sympy.Symbol) -> Callable[..., Any]:
    if expression.free_symbols - {symbol}:
        raise ValueError(f"{expression} depends on more than {symbol}")
    return _compiled(expression, (symbol,))


def evaluate_at(expression: sympy.Expr, symbols: tuple[sympy.Symbol, sympy.Symbol], size: tuple[int, int]) -> int:
    """A size expression of height and width at one size of the image."""
    return int(_compiled(expression, symbols)(*size))


def is_constant(expression: sympy.Expr, symbols: tuple[sympy.Symbol, sympy.Symbol], extents: tuple[int, ...]) -> bool:
    """Whether an expression has one value at all of some sizes: torch writes 4 as H // (H // 4) at times."""
    few = (*extents[16:48:5], *extents[-40::7])
    try:
        return len({evaluate_at(expression, symbols, (h, w)) for h in few for w in few}) == 1
    except ZeroDivisionError:
        return False


def evaluate_both(expression: sympy.Basic, symbols: tuple[sympy.Symbol, sympy.Symbol], size: tuple[int, int]) -> bool:
    """A condition on height and width at one size."""
    return bool(expression.subs(dict(zip(symbols, size, strict=True))))


PERIOD = 161_280
"""2^9 * 3^2 * 5 * 7 pixels: an image longer by so many has whole strides more at every scale that networks have."""


@cache
def sample_extents(size_multiple: int, smallest: int = 1) -> tuple[int, ...]:
    """Extents at which sizes are compared: all small ones, and every phase of strides up to 128 on a giant image."""
    first = align_up(max(1, smallest), size_multiple)
    small = range(first, first + 192 * size_multiple, size_multiple)
    giant = align_up(1 << 20, size_multiple)
    return (*small, *range(giant, giant + 129 * size_multiple, size_multiple))
