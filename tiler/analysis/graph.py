"""Tracing: a torch module becomes an ATen graph whose height and width are symbols."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from ..base.errors import UntileableError, UntraceableError
from ..base.text import first_line
from ..system.cache_folder import keep_compiled_here
from ..system.time_limit import time_limit
from .sizes import expression_of, find_whole_multiple

# Two primes, so that no size is special and neither axis can be taken for the other; large enough for strides of 128,
# since torch.export takes an inner size of 1 for a constant.
_TRACE_SIZE = (331, 293)
# Primes above the largest multiple, too. Images of this size are computed: a seventh of the pixels, and of the time.
_TRIED_SIZE = (131, 113)
LARGEST_MULTIPLE = 64
TRACE_LIMIT_S = 180.0
"""Of this process's computing that a trace may take; those of the usual networks take 1 to 15."""


@runtime_checkable
class HasLogits(Protocol):
    """A module that can show what it decides from: forward(x) == finish(logits(x)).

    The start check then compares logits, since class numbers have no distance.
    """

    def logits(self, x: Tensor) -> Tensor: ...

    def finish(self, logits: Tensor) -> Tensor: ...


@runtime_checkable
class HasBound(Protocol):
    """A module that may decide between two classes by one channel of logits."""

    @property
    def bound(self) -> float | None:
        """The second class is where the logit is greater; None: it decides otherwise."""
        ...


def bound_of(module: nn.Module) -> float | None:
    """As `HasBound` has it; None for other modules."""
    return module.bound if isinstance(module, HasBound) else None


class WithLogits(nn.Module):
    """(finished, logits) of a HasLogits module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module = cast("HasLogits", self.module)
        logits = module.logits(x)
        return module.finish(logits), logits


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGraph:
    """One traced module: what every later step looks at."""

    program: ExportedProgram
    """Outputs: the result, and the logits where the module has them."""
    height: sympy.Symbol
    width: sympy.Symbol
    size_multiple: int
    """The module is run on sizes divisible by this alone (1: all): it accepts no others, or gives no whole result."""
    smallest: tuple[int, int]
    """Height and width below which the module takes another path or fails."""
    has_logits: bool

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return list(self.program.graph.nodes)

    @property
    def input_node(self) -> torch.fx.Node:
        name = next(iter(self.program.graph_signature.user_inputs))
        return next(node for node in self.program.graph.nodes if node.name == name)

    @property
    def output_nodes(self) -> tuple[torch.fx.Node, ...]:
        return tuple(self.program.graph.output_node().args[0])  # pyright: ignore[reportArgumentType, reportReturnType]


def _runs(module: nn.Module, bands: int, size: tuple[int, int], dtype: torch.dtype) -> Exception | None:
    try:
        with torch.no_grad():
            module(torch.zeros((1, bands, *size), dtype=dtype))
    except Exception as error:  # noqa: BLE001 - any failure of the user's module is the answer
        return error
    return None


def shows_logits(module: nn.Module, example: Tensor) -> bool:
    """Whether the module has logits, pixel for pixel under its result and other than it."""
    if not isinstance(module, HasLogits) or any(isinstance(part, nn.Module) for part in (module.logits, module.finish)):
        return False
    with torch.no_grad():
        logits = module.logits(example)
        finished = module.finish(logits)
        if finished is logits or finished.shape[2:] != logits.shape[2:]:
            return False
        return bool(torch.equal(finished, cast("nn.Module", module)(example)))


def find_accepted_sizes(module: nn.Module, bands: int, dtype: torch.dtype) -> tuple[int, tuple[int, int]]:
    """The smallest k such that the module accepts sizes divisible by k, found by running it on small images; and the
    first size that it ran at.

    Raises:
        UntileableError: it fails for every k up to 64; carries the module's own words.
    """
    first = None
    # Only where the widest kernels and the deepest strides meet no pixel is left of the first size.
    for height, width in (_TRIED_SIZE, _TRACE_SIZE):
        first = _runs(module, bands, (height, width), dtype)
        if first is None and _runs(module, bands, (height + 1, width + 1), dtype) is None:
            return 1, (height, width)
    for multiple in range(2, LARGEST_MULTIPLE + 1):
        sizes = [(multiple * a, multiple * b) for a, b in ((3, 5), (4, 3), (7, 6))]
        if all(_runs(module, bands, size, dtype) is None for size in sizes):
            return multiple, sizes[0]
    if first is None:
        raise UntileableError(
            "the network runs on images of odd height and width only; pad or crop inside it so that every size will do"
        )
    raise UntileableError(
        f"the network fails on {str(dtype).removeprefix('torch.')} images of {bands} bands ({first_line(first)}), "
        f"also at sizes divisible by up to {LARGEST_MULTIPLE}; give a module that maps (1, {bands}, height, width) "
        "to one tensor, scaling included"
    )


def trace(
    module: nn.Module, bands: int, dtype: torch.dtype, watch: AbstractContextManager[Any] | None = None
) -> TracedGraph:
    """Trace a module for images of any height and width, or for those divisible by some k up to 64: the smallest at
    which it runs, and gives an output of a constant scale.

    Args:
        watch: entered while the module is traced; may raise an UntileableError of its own.

    Raises:
        UntileableError: the module cannot be traced, accepts one size only, or changes with the size.
    """
    watch = watch or nullcontext()
    multiple, accepted = find_accepted_sizes(module, bands, dtype)
    traced = WithLogits(module) if shows_logits(module, torch.zeros((1, bands, *accepted), dtype=dtype)) else module
    graph = _trace_multiples(module, traced, bands, dtype, multiple, watch)
    shape = graph.output_nodes[0].meta["val"].shape
    if len(shape) != 4:
        return graph
    sizes, symbols = (expression_of(shape[2]), expression_of(shape[3])), (graph.height, graph.width)
    tried = range(multiple, LARGEST_MULTIPLE + 1, multiple)
    whole = find_whole_multiple(sizes, symbols, graph.smallest, tried) or multiple
    # Once more: such sizes may take another path, and say things more simply.
    return graph if whole == multiple else _trace_multiples(module, traced, bands, dtype, whole, watch)


def trace_size(multiple: int) -> tuple[int, int]:
    """Sizes divisible by that, and by as little else as can be."""
    found: list[int] = []
    for extent, least in zip(_TRACE_SIZE, (7, 5), strict=True):
        times = max(least, -(-extent // multiple))
        while any(times % factor == 0 for factor in range(2, times)) or times * multiple in found:
            times += 1
        found.append(times * multiple)
    return (found[0], found[1])


def _trace_multiples(
    module: nn.Module,
    traced: nn.Module,
    bands: int,
    dtype: torch.dtype,
    multiple: int,
    watch: AbstractContextManager[Any],
) -> TracedGraph:
    """`trace` for sizes divisible by a known number.

    Args:
        traced: the module, with its logits where it has them.
    """
    example = torch.zeros((1, bands, *trace_size(multiple)), dtype=dtype)
    free = {2: Dim.AUTO, 3: Dim.AUTO}
    spec = {next(iter(_parameter_names(traced.forward))): free}
    exports_log = logging.getLogger("torch.export")
    level = exports_log.level
    keep_compiled_here()
    # Not from the start: its import takes as long as torch's, and who does not trace is spared it.
    from torch._dynamo import config as dynamo_config

    try:
        exports_log.setLevel(logging.ERROR)
        # Without gradients, as inference runs: writing into views in place is then allowed. torch keeps what operations
        # gave for shapes that it may meet again: with free sizes it hardly does, and keeping takes a third of a trace.
        no_kept_shapes = dynamo_config.patch(fake_tensor_cache_enabled=False)
        with warnings.catch_warnings(), torch.no_grad(), no_kept_shapes, time_limit(TRACE_LIMIT_S):
            warnings.simplefilter("ignore")
            with watch:
                program = export(traced, (example,), dynamic_shapes=spec, strict=False)
    except UntileableError:
        raise
    except TimeoutError:
        raise UntraceableError(
            f"the network cannot be traced by torch.export within {TRACE_LIMIT_S:g} s of computing; state its --halo"
        ) from None
    except Exception as error:
        raise UntraceableError(
            f"the network cannot be traced by torch.export: {first_line(error)}; "
            "remove control flow that depends on pixel values or sizes, or state its --halo"
        ) from error
    finally:
        exports_log.setLevel(level)

    if not _returns_one_tensor(program, pair=traced is not module):
        raise UntileableError("the network must return one tensor, not a tuple, list or dict; wrap it in such a module")
    graph = program.graph
    name = next(iter(program.graph_signature.user_inputs))
    shape = next(node for node in graph.nodes if node.name == name).meta["val"].shape
    symbols: list[sympy.Symbol] = []
    smallest: list[int] = []
    for axis, extent in zip(("height", "width"), shape[2:], strict=True):
        symbol = extent.node.expr if isinstance(extent, torch.SymInt) else None
        if not isinstance(symbol, sympy.Symbol):
            raise UntileableError(
                f"the network must accept any {axis}, but its code fixes it ({extent}); "
                "replace constants of that size (position embeddings, fixed reshapes) by size-free operations"
            )
        limits = program.range_constraints.get(symbol)
        lower, upper = (int(limits.lower), limits.upper) if limits is not None else (1, sympy.oo)
        if upper.is_number and upper < 2**31:
            raise UntileableError(
                f"the network takes another path above a {axis} of {upper}; remove control flow that depends on sizes"
            )
        # torch.export treats sizes 0 and 1 apart, so that 2 is its word for "no limit"; the module itself is asked.
        smallest.append(lower if lower > 2 else 1)
        symbols.append(symbol)
    if symbols[0] == symbols[1]:
        raise UntileableError("the network must accept any height with any width, but its code makes the two equal")
    return TracedGraph(
        program=program,
        height=symbols[0],
        width=symbols[1],
        size_multiple=multiple,
        smallest=(smallest[0], smallest[1]),
        has_logits=traced is not module,
    )


def _returns_one_tensor(program: ExportedProgram, *, pair: bool) -> bool:
    spec = program.call_spec.out_spec
    if spec is None:
        return False
    leaves, children = (2, 2) if pair else (1, 0)
    return spec.num_leaves == leaves and spec.num_children == children


def _parameter_names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def operation_name(node: torch.fx.Node) -> str:
    """ "aten.conv2d" for aten.conv2d.default and every other overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))


def where(node: torch.fx.Node) -> str:
    """Where in the user's code a node comes from: module path and source line, as far as the trace knows."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")
    ]
    own = [line for line in lines if "/torch/" not in line]
    place = (own or lines or [""])[-1]
    parts = [f"module '{paths[-1]}'" if paths else "the top module"]
    if place:
        file, _, rest = place.removeprefix("File ").partition(", line ")
        parts.append(f"{file.strip(chr(34))}:{rest.partition(',')[0]}")
    return " at ".join(parts)
