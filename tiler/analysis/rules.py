"""The rule book: what a rule is given, what it answers, where it is registered, and what is refused before any rule.

A rule takes a `Call` and returns an `Outcome`; `register_rule` puts it under the operation's name without overload
("aten.conv2d"). Whatever has no rule is refused: nothing is guessed. How to add one: CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NoReturn

import sympy
import torch
from torch.fx import Node

from ..base.errors import UntileableError, UntraceableError
from .graph import operation_name, where
from .receptive import AxisRule
from .sizes import PERIOD, evaluate, expression_of, sample_extents

AXES = ("height", "width")
WHOLE_IMAGE = "it needs whole-image statistics"
"""A reason, of several operations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """What is known of a tensor that has pixels."""

    dims: tuple[int, int]
    """Which of its dimensions are height and width."""
    scale: tuple[Fraction, Fraction]
    """Its pixels for each pixel of the network's input."""
    sizes: tuple[sympy.Expr, sympy.Expr]
    """Its height and width as functions of the input's."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule says: where the result's height and width are, and what it needs of each operand."""

    dims: tuple[int, int]
    needs: tuple[tuple[Node, AxisRule, AxisRule], ...]
    largest_extent: int | None = None
    """Height or width of the image up to which window runs are exact; None: any."""
    window_refusal: str = ""
    """Why windows cannot be exact though programs can; empty: they can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operation of the graph, its arguments by name."""

    node: Node
    operands: dict[Node, Pixels]
    """The operands that have pixels."""
    symbols: tuple[sympy.Symbol, sympy.Symbol]
    size_multiple: int
    smallest: tuple[int, int]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return operation_name(self.node)

    def sentence(self, reason: str, remedy: str) -> str:
        return f"{self.name} in {where(self.node)} cannot be tiled: {reason}; {remedy}"

    def refuse(self, reason: str, remedy: str) -> NoReturn:
        raise UntileableError(self.sentence(reason, remedy))

    def pixels(self, argument: str = "self") -> tuple[Node, Pixels]:
        """The operand that must have pixels."""
        node = self.arguments[argument]
        if node not in self.operands:
            self.refuse(f"its operand '{argument}' must be computed from the image", "restructure the module")
        for other in self.operands:
            if other is not node:
                self.refuse("only its first operand may be computed from the image", "restructure the module")
        return node, self.operands[node]

    def spatial_dim(self, dim: int, dims: tuple[int, int], rank: int) -> int | None:
        """0 for height, 1 for width, None for any other dimension."""
        positive = dim % rank
        return dims.index(positive) if positive in dims else None

    def size_at(self, axis: int, expression: Any, extent: int) -> int:
        """An expression of the image's size along `axis`, at one extent."""
        return evaluate(expression, self.symbols[axis], extent)

    def extents(self, axis: int) -> tuple[int, ...]:
        """Extents of the image along `axis` at which sizes are compared."""
        return sample_extents(self.size_multiple, self.smallest[axis])

    def constant_or_none(self, axis: int, value: Any) -> int | None:
        """An argument that is the same number for every image size; None where it is not."""
        if isinstance(value, int):
            return value
        expression = expression_of(value)
        values = {self.size_at(axis, expression, extent) for extent in self.extents(axis)}
        return values.pop() if len(values) == 1 else None


def bound_arguments(node: Node) -> dict[str, Any]:
    """The operation's arguments by the names of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    bound: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


Rule = Callable[[Call], Outcome]
_RULES: dict[str, Rule] = {}
_REFUSALS: dict[str, tuple[str, str]] = {}


def register_refusal(names: Iterable[str], reason: str, remedy: str) -> None:
    """Say why operations without a rule cannot be tiled, and what to use instead."""
    _REFUSALS.update(dict.fromkeys(names, (reason, remedy)))


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under operation names such as "aten.conv2d" or "mylib.myop"."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def find_refusal(name: str) -> tuple[str, str] | None:
    """(reason, remedy) of an operation that no rule can make exact; None: there is a rule, or nothing is known."""
    return _REFUSALS.get(name) if name not in _RULES else None


def apply_rule(call: Call) -> Outcome:
    """The outcome of the operation's rule.

    Raises:
        UntileableError: no rule, or the rule refuses; names the operation, its module and the source line.
    """
    rule = _RULES.get(call.name)
    if rule is None:
        refusal = find_refusal(call.name)
        if refusal is not None:
            call.refuse(*refusal)
        raise UntraceableError(
            call.sentence(
                "no rule says which pixels it needs",
                "replace it, register a rule (CONTRIBUTING.md), or state the network's --halo",
            )
        )
    _refuse_sizes_as_values(call.node)
    try:
        return rule(call)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UntileableError(
            f"{call.name} in {where(call.node)} cannot be tiled: its rule does not understand it ({error}); replace it"
        ) from error


_TAKE_SIZES = frozenset(
    f"aten.{name}"
    for name in (
        *("_upsample_nearest_exact2d", "constant_pad_nd", "expand", "flatten", "narrow", "pad", "reflection_pad2d"),
        *(
            "conv_transpose2d",
            "layer_norm",
            "repeat",
            "replication_pad2d",
            "reshape",
            "slice",
            "unflatten",
            "upsample_bicubic2d",
            "upsample_bilinear2d",
        ),
        *("upsample_nearest2d", "view"),
    )
)
"""Operations whose rules look at every size among their arguments."""


def _refuse_sizes_as_values(node: Node) -> None:
    """A size may say where to cut, pad and resample; among the numbers computed with, pixels would depend on it."""
    if operation_name(node) in _TAKE_SIZES:
        return
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and value.node.expr.free_symbols:
            raise UntileableError(
                f"{operation_name(node)} in {where(node)} cannot be tiled: it uses the image's size as a number; "
                "replace it by a constant"
            )


def find_uniform(node: Node, symbols: tuple[sympy.Symbol, sympy.Symbol]) -> Pixels | None:
    """A tensor of the image's size whose pixels are all alike: a constant expanded, filled, or of no channels; None
    for all else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    extents = [expression_of(extent) for extent in value.shape]
    dims = [[d for d, extent in enumerate(extents) if extent.free_symbols & {symbol}] for symbol in symbols]
    if any(len(found) != 1 for found in dims) or dims[0] == dims[1]:
        return None
    both = (dims[0][0], dims[1][0])
    if operation_name(node) == "aten.expand":
        source = bound_arguments(node)["self"].meta["val"].shape
        moved = len(extents) - len(source)
        if any(d >= moved and source[d - moved] != 1 for d in both):
            return None
    elif operation_name(node) == "aten.empty":
        if all(extent != 0 for extent in value.shape):
            return None  # it would have pixels of no known value
    elif operation_name(node) not in ("aten.full", "aten.zeros", "aten.ones"):
        return None
    sizes = (extents[both[0]], extents[both[1]])
    if any(sizes[axis].free_symbols - {symbols[axis]} for axis in (0, 1)):
        return None
    giant = 1 << 20
    growth = [
        Fraction(evaluate(size, symbol, giant + PERIOD) - evaluate(size, symbol, giant), PERIOD)
        for size, symbol in zip(sizes, symbols, strict=True)
    ]
    return Pixels(dims=both, scale=(growth[0], growth[1]), sizes=sizes)


def require_constant(node: Node, symbols: tuple[sympy.Symbol, sympy.Symbol]) -> None:
    """Refuse a node without pixels among its operands whose value is no constant.

    Raises:
        UntileableError: it has the image's size, holds it, or is random.
    """
    values = node.meta.get("val")
    tensors = [v for v in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(v, torch.Tensor)]
    if any(expression_of(extent).free_symbols & set(symbols) for value in tensors for extent in value.shape):
        raise UntileableError(
            f"{operation_name(node)} in {where(node)} cannot be tiled: it makes a tensor of the image's size, so its "
            "values may depend on the position; replace it by a constant that broadcasts"
        )
    _refuse_sizes_as_values(node)


def refuse_randomness(node: Node) -> None:
    """Refuse operations that draw random numbers (dropout has its own rule)."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags and "dropout" not in operation_name(node):
        raise UntileableError(
            f"{operation_name(node)} in {where(node)} cannot be tiled: it is random; remove it for inference"
        )
