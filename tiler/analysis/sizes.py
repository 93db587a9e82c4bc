"""Sizes as expressions of the image's size: evaluation, and the extents at which they are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.printers import PythonPrinter

from ..base.geometry import align_up


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


def find_misfit(expression: sympy.Expr, symbol: sympy.Symbol, scale: Fraction, extents: Iterable[int]) -> int | None:
    """The first extent of the image at which a size is not the extent times `scale`, rounded up or down; None: none."""
    return next((n for n in extents if abs(evaluate(expression, symbol, n) - n * scale) >= 1), None)


def find_whole_multiple(
    sizes: tuple[sympy.Expr, sympy.Expr],
    symbols: tuple[sympy.Symbol, sympy.Symbol],
    smallest: tuple[int, int],
    multiples: Iterable[int],
) -> int | None:
    """The first k such that the output of images whose sizes are divisible by k is as large as the image times a
    constant, rounded up or down; None: there is no such k, or a size of the output does not follow one of the image.

    Patchify stems, poolings without ceil_mode and even kernels with a stride give floor(n / k) * k pixels: fewer than
    the image has, but not where it is padded to a multiple of k.

    Args:
        sizes: height and width of the output.
        multiples: the numbers that are tried.
    """
    if any(expression.free_symbols - {symbol} for expression, symbol in zip(sizes, symbols, strict=True)):
        return None

    def fits(k: int, axis: int) -> bool:
        extents = sample_extents(k, smallest[axis])
        grown = [evaluate(sizes[axis], symbols[axis], extents[-1] + more) for more in (0, PERIOD * k)]
        scale = Fraction(grown[1] - grown[0], PERIOD * k)
        return scale > 0 and find_misfit(sizes[axis], symbols[axis], scale, extents) is None

    return next((k for k in multiples if fits(k, 0) and fits(k, 1)), None)
