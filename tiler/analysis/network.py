"""A network as tiling sees it: its graph, and what any window of its output needs of its input."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from ..base.errors import UntileableError, UsageError
from ..base.geometry import Halo, Interval, Window, align_down, align_up
from ..system.machine import one_thread
from ..system.process_locks import TRACING
from . import operations as operations  # registers the rules
from .agreement import require_agreement
from .aliasing import Aliases
from .axis_geometry import ImageAxis, compute_geometry
from .cost import compute_flops, compute_peak_bytes
from .foresight import Foresight
from .graph import LARGEST_MULTIPLE, TracedGraph, operation_name, trace, where
from .receptive import AxisGraph, AxisNode, AxisRule, Cut, Resample, Same, Slide
from .rules import (
    AXES,
    Call,
    Outcome,
    Pixels,
    apply_rule,
    bound_arguments,
    find_uniform,
    refuse_randomness,
    require_constant,
)
from .sizes import evaluate, expression_of, find_misfit, is_constant, sample_extents

LARGEST_DIRECT = 128
"""Height plus width of a resampled result up to which torch takes its direct kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """An analysed module: a window of its output equals the same window of the whole image's, or analysis refused it.

    Guarantee: run on `input_window(core, shape)` and cropped to `core`, the module gives what it gives on the whole
    image padded to `padded_shape(shape)`, up to floating-point rounding.
    """

    module: nn.Module = field(repr=False)
    """(1, bands, h, w) of `dtype` -> (1, channels, h * scale, w * scale) of `output_dtype`; in eval mode."""
    graph: TracedGraph = field(repr=False)
    axes: tuple[AxisGraph, AxisGraph] = field(repr=False)
    """The interval rules along height and width."""
    pixels: dict[Node, Pixels] = field(repr=False)
    """What is known of each tensor that has pixels, in the order of the axes' nodes."""
    bands: int
    dtype: torch.dtype
    channels: int
    output_dtype: torch.dtype
    largest_extent: int | None = None
    """Height or width of a raster up to which window runs are exact; None: any."""
    window_refusal: str = ""
    """Why windows of the image cannot be run through the module itself, though programs can; empty: they can."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes get the module, and analyse it: torch's graphs cannot be pickled."""
        return analyze_network, (self.module, self.bands, self.dtype)

    @property
    def has_logits(self) -> bool:
        """Whether the module shows what it decides from."""
        return self.graph.has_logits

    @property
    def program_refusal(self) -> str:
        """Why the network cannot be run by programs; empty: it can."""
        return ""

    @property
    def is_known(self) -> bool:
        """Whether its graph was analysed; else its user states its halo."""
        return True

    @property
    def smallest(self) -> tuple[int, int]:
        """Height and width below which the module takes another path or fails."""
        return self.graph.smallest

    @property
    def weight_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.graph.program.state_dict.values())

    def count_flops(self, shape_yx: tuple[int, int]) -> int:
        """Of the module on an image of that size."""
        return compute_flops(self.graph, shape_yx)

    def count_live_bytes(self, shape_yx: tuple[int, int]) -> int:
        """Largest sum of tensors alive at once when the module runs on an image of that size."""
        return compute_peak_bytes(self.graph, shape_yx)

    def needed_interval(self, axis: int, wanted: Interval) -> Interval:
        """Input pixels that a window must hold for `wanted`, unclamped.

        Raises:
            UntileableError: windows cannot be run, as `window_refusal` says.
        """
        if self.window_refusal:
            raise UntileableError(self.window_refusal)
        return self.axes[axis].input_interval(wanted)

    @property
    def stride(self) -> tuple[int, int]:
        """Alignment period of windows, in input pixels."""
        return (self.axes[0].stride, self.axes[1].stride)

    @property
    def scale(self) -> tuple[Fraction, Fraction]:
        """Output pixels for each input pixel."""
        return (self.axes[0].scale, self.axes[1].scale)

    @property
    def size_multiple(self) -> int:
        """Rasters are padded at bottom and right to a multiple of this; 1 for a network that takes every size."""
        return self.graph.size_multiple

    def sizes(self, axis: int, extent: int) -> list[int]:
        """Height or width of each of the axis's nodes for a (padded) image of that extent."""
        symbol = (self.graph.height, self.graph.width)[axis]
        return [evaluate(pixels.sizes[axis], symbol, extent) for pixels in self.pixels.values()]

    def on_image(self, shape_yx: tuple[int, int]) -> tuple[ImageAxis, ImageAxis]:
        """The axes for a raster of that shape, padded as the network needs it."""
        padded = self.padded_shape(shape_yx)
        sizes = tuple(zip(*(self.sizes(axis, extent) for axis, extent in enumerate(padded)), strict=True))

        def at(position: int, rule: AxisRule, extent: int) -> AxisRule:
            if isinstance(rule, Cut):
                return Slide(extent=1, stride=rule.step, padding=-evaluate(rule.start, rule.symbol, extent))
            if isinstance(rule, Resample) and sum(sizes[position]) <= LARGEST_DIRECT:
                return replace(rule, direct=True)
            return rule

        found: list[ImageAxis] = []
        for axis, extent in enumerate(padded):
            nodes = tuple(
                replace(node, sources=tuple((source, at(position, rule, extent)) for source, rule in node.sources))
                for position, node in enumerate(self.axes[axis].nodes)
            )
            output = sizes[nodes[-1].sources[0][0]][axis]
            extents = (*(pair[axis] for pair in sizes), output)
            found.append(ImageAxis(graph=AxisGraph(nodes=nodes), image=extent, sizes=extents))
        return (found[0], found[1])

    @property
    def halo(self) -> Halo:
        """Pixels that an aligned core needs beyond its sides; where only programs are exact, `program_halo`."""
        if self.window_refusal:
            return self.program_halo
        (top, bottom), (left, right) = (axis.halo() for axis in self.axes)
        return Halo(top=top, bottom=bottom, left=left, right=right)

    @property
    def program_halo(self) -> Halo:
        """Pixels that programs read beyond a core in a large image, at most, on each side: where that depends on
        position or size, of cores in several places of several images."""
        sides: list[tuple[int, int]] = []
        for axis in (0, 1):
            stride, scale = self.stride[axis], self.scale[axis]
            before = after = 0
            giant = align_down(1 << 20, lcm(stride, self.size_multiple))
            for more, phases in ((0, 64), (1, 4), (stride // 2 + 1, 4), (stride - 1, 4)):
                image = giant + more * self.size_multiple
                on_image = self.on_image((image, image))[axis]
                for place in (image // 2, image // 8, image - image // 8):
                    for phase in range(0, stride, -(-stride // phases)):
                        first = int((align_down(place, stride) + phase) * scale // 1)
                        core = Interval(start=first, stop=first + max(1, int(stride * scale)))
                        window = compute_geometry(on_image, core).window
                        before = max(before, int(core.start / scale) - window.start)
                        after = max(after, window.stop - int(-(-core.stop / scale // 1)))
            sides.append((before, after))
        (top, bottom), (left, right) = sides
        return Halo(top=top, bottom=bottom, left=left, right=right)

    def padded_shape(self, shape_yx: tuple[int, int]) -> tuple[int, int]:
        """The raster's shape with what the network's size multiple adds at bottom and right.

        Raises:
            UsageError: a raster below the network's smallest size.
        """
        height, width = (align_up(extent, self.size_multiple) for extent in shape_yx)
        for axis, extent, smallest in zip(AXES, (height, width), self.smallest, strict=True):
            if extent < smallest:
                raise UsageError(f"the network needs a {axis} of at least {smallest} pixels, the raster has {extent}")
        return (height, width)

    def output_shape(self, shape_yx: tuple[int, int]) -> tuple[int, int]:
        """Shape of the output for a raster: size * scale, rounded up or down as the network does it."""
        output = self.pixels[self.graph.output_nodes[0]]
        sides: list[int] = []
        for axis, symbol in enumerate((self.graph.height, self.graph.width)):
            extent = align_up(shape_yx[axis], self.size_multiple)
            given = evaluate(output.sizes[axis], symbol, extent)
            sides.append(min(given, int(-(-shape_yx[axis] * self.scale[axis] // 1))))
        return (sides[0], sides[1])

    def input_window(self, core: Window, shape_yx: tuple[int, int]) -> Window:
        """The window of the (padded) raster on which the module must run so that `core` of its output is exact.

        It holds every input pixel that the core needs or ends at the image's true edge, starts on the stride, and
        has a size that the module accepts.

        Raises:
            UsageError: a core that is empty or outside the output.
        """
        if self.window_refusal:
            raise UntileableError(self.window_refusal)
        if core.pixels == 0 or not Window.whole(self.output_shape(shape_yx)).contains(core):
            height, width = self.output_shape(shape_yx)
            raise UsageError(f"a core must be non-empty and inside the output of {height} x {width}, got {core}")
        rows, columns = (
            self._input_interval(axis, wanted, extent)
            for axis, wanted, extent in zip((0, 1), (core.rows, core.columns), self.padded_shape(shape_yx), strict=True)
        )
        return Window.from_intervals(rows, columns)

    def _input_interval(self, axis: int, wanted: Interval, extent: int) -> Interval:
        needed = self.needed_interval(axis, wanted).clamp(extent)
        return self.align(axis, needed, extent)

    def align(self, axis: int, needed: Interval, extent: int) -> Interval:
        """The smallest legal window along an axis that holds `needed`: start on the stride, size acceptable."""
        smallest = self.smallest[axis]
        # On multiples of the accepted size too: then what is left to the image's end is acceptable as well.
        stride = lcm(self.stride[axis], self.size_multiple)
        start = align_down(needed.start, stride)
        stop = min(start + max(align_up(needed.stop - start, self.size_multiple), smallest), extent)
        # Only at the image's end can a window be too small; then it grows backwards, by whole strides.
        while stop - start < smallest and start > 0:
            start = max(0, start - stride)
        return Interval(start=start, stop=stop)


Tell = Callable[[str], None]
"""Told in words what an analysis does next; its stages may take seconds each."""


def analyze_network(
    module: nn.Module,
    bands: int,
    dtype: torch.dtype | np.dtype[Any] | str | None = None,
    *,
    tell: Tell | None = None,
) -> Network:
    """Trace a module and derive what any window of its output needs of its input.

    Args:
        module: maps (1, bands, height, width) to one tensor (1, channels, h, w), for any height and width (or those
            divisible by some k); in eval mode.
        bands: number of input channels.
        dtype: of the pixels that will go in, torch's or numpy's; None: that of the module's first floating parameter.
        tell: called with each stage, as it begins.

    Raises:
        UntileableError: an operation without an exact rule, named with its module and source line; a module that fixes
            the image's size; an output that is not on the image's grid times a constant scale.
    """
    with TRACING, warnings.catch_warnings(), one_thread():
        # What torch remarks on while it is tried out is not what the user asked; made errors, remarks would look like
        # sizes that the module refuses.
        warnings.simplefilter("ignore")
        return _analyze(module, bands, dtype, tell or (lambda _: None))


def as_network(network: Network | nn.Module, bands: int, dtype: np.dtype[Any] | None) -> Network:
    """The network itself; a bare module analysed for such pixels.

    Raises:
        UntileableError: as `analyze_network` has it.
        UsageError: neither.
    """
    if isinstance(network, Network):
        return network
    if not isinstance(network, nn.Module):
        raise UsageError(f"a network must be an analysed Network or a torch module, got {type(network).__name__}")
    return analyze_network(network, bands, dtype)


def _analyze(module: nn.Module, bands: int, dtype: torch.dtype | np.dtype[Any] | str | None, tell: Tell) -> Network:
    if dtype is None:
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    elif not isinstance(dtype, torch.dtype):
        dtype = torch_dtype(np.dtype(dtype))
    tell("the network is traced")
    graph = trace(module, bands, dtype, Foresight(module))
    tell("rules are applied to the traced network")
    symbols = (graph.height, graph.width)
    known: dict[Node, Pixels] = {}
    position: dict[Node, int] = {}
    axes: tuple[list[AxisNode], list[AxisNode]] = ([], [])
    largest_extents: list[int] = []
    window_refusals: list[str] = []
    aliases = Aliases()

    def add(node: Node, pixels: Pixels, needs: tuple[Any, ...]) -> None:
        known[node] = pixels
        position[node] = len(axes[0])
        for axis in (0, 1):
            sources = tuple((position[operand], rules[axis]) for operand, *rules in needs)
            axes[axis].append(AxisNode(name=node.name, scale=pixels.scale[axis], sources=sources))

    one = (Fraction(1), Fraction(1))
    add(graph.input_node, Pixels(dims=(2, 3), scale=one, sizes=symbols), ())
    for node in graph.nodes:
        aliases.visit(node)
        if node.op != "call_function" or not _holds_tensor(node):
            continue
        refuse_randomness(node)
        operands = {source: known[source] for source in node.all_input_nodes if source in known}
        if not operands:
            if (uniform := find_uniform(node, symbols)) is not None:
                add(node, uniform, ())
            else:
                require_constant(node, symbols)
            continue
        call = Call(
            node=node,
            operands=operands,
            symbols=symbols,
            size_multiple=graph.size_multiple,
            smallest=graph.smallest,
            arguments=bound_arguments(node),
        )
        outcome = apply_rule(call)
        add(node, _result_pixels(call, outcome), outcome.needs)
        if outcome.largest_extent is not None:
            largest_extents.append(outcome.largest_extent)
        if outcome.window_refusal:
            window_refusals.append(outcome.window_refusal)

    output = graph.output_nodes[0]
    if len(graph.output_nodes) != (2 if graph.has_logits else 1) or any(n not in known for n in graph.output_nodes):
        raise UntileableError("the network must return one tensor computed from the image")
    _check_output(output, known[output])
    graph = replace(graph, smallest=_find_smallest(graph, known))
    result = Network(
        module=module,
        graph=graph,
        axes=(_axis_graph(axes[0], graph, position), _axis_graph(axes[1], graph, position)),
        pixels=known,
        bands=bands,
        dtype=dtype,
        channels=int(output.meta["val"].shape[1]),
        output_dtype=output.meta["val"].dtype,
        largest_extent=min(largest_extents, default=None),
        window_refusal=next(iter(window_refusals), ""),
    )
    _check_output_size(result, known, output)
    if not result.window_refusal:
        result = replace(result, window_refusal=_find_irregular_sizes(result, known))
    tell("the traced network is compared with its module at several sizes")
    require_agreement(module, graph, bands, dtype)
    return result


def _find_smallest(graph: TracedGraph, known: dict[Node, Pixels]) -> tuple[int, int]:
    """Height and width from which on every node has at least one pixel."""
    smallest = list(graph.smallest)
    for axis, symbol in enumerate((graph.height, graph.width)):
        expressions = {pixels.sizes[axis] for pixels in known.values()}
        for extent in sample_extents(graph.size_multiple, smallest[axis]):
            if any(evaluate(expression, symbol, extent) < 1 for expression in expressions):
                smallest[axis] = extent + 1
    return (smallest[0], smallest[1])


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """torch's name for a numpy dtype.

    Raises:
        UsageError: torch has none.
    """
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"pixels must be of a type that torch knows, got {dtype}; convert them first")
    return found


def _axis_graph(nodes: list[AxisNode], graph: TracedGraph, position: dict[Node, int]) -> AxisGraph:
    """The graph with one more node at its end that reads every output, so that the logits are exact too."""
    outputs = tuple(position[node] for node in graph.output_nodes)
    scale = nodes[outputs[0]].scale
    return AxisGraph(
        nodes=(*nodes, AxisNode(name="output", scale=scale, sources=tuple((index, Same()) for index in outputs)))
    )


def _holds_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(entry, torch.Tensor) for entry in value)
    )


def _tensors(node: Node) -> Iterator[torch.Tensor]:
    value = node.meta.get("val")
    yield from (
        entry for entry in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(entry, torch.Tensor)
    )


def _result_pixels(call: Call, outcome: Outcome) -> Pixels:
    """Scale and sizes of the result; refuses operands of different scale and results whose symbols went elsewhere."""
    scales: list[Fraction] = []
    for axis in (0, 1):
        ratios = {call.operands[operand].scale[axis] * rules[axis].ratio for operand, *rules in outcome.needs}
        if len(ratios) != 1:
            call.refuse(f"its operands have different scales ({', '.join(map(str, sorted(ratios)))})", "resample first")
        scales.append(ratios.pop())
    for value in _tensors(call.node):
        for dim, extent in enumerate(value.shape):
            symbols = expression_of(extent).free_symbols & set(call.symbols)
            expected = {call.symbols[outcome.dims.index(dim)]} if dim in outcome.dims else set()
            if symbols != expected and (
                expected or not is_constant(expression_of(extent), call.symbols, call.extents(0))
            ):
                call.refuse("it mixes height, width and other dimensions", "keep them as dimensions of their own")
    first = next(_tensors(call.node))
    return Pixels(
        dims=outcome.dims,
        scale=(scales[0], scales[1]),
        sizes=(expression_of(first.shape[outcome.dims[0]]), expression_of(first.shape[outcome.dims[1]])),
    )


def _check_output(output: Node, pixels: Pixels) -> None:
    value = output.meta["val"]
    if len(value.shape) != 4 or pixels.dims != (2, 3) or value.shape[0] != 1:
        raise UntileableError(
            f"the network must return (1, channels, height, width), got {tuple(value.shape)}; "
            "keep the batch and channel dimensions"
        )


def _find_irregular_sizes(network: Network, known: dict[Node, Pixels]) -> str:
    """The sentence on a node whose size does not move with the image by whole strides; empty where all do."""
    multiple = network.size_multiple
    seen: set[Any] = set()
    for node, pixels in known.items():
        for axis, symbol in enumerate((network.graph.height, network.graph.width)):
            expression, scale = pixels.sizes[axis], pixels.scale[axis]
            if (axis, expression, scale) in seen:
                continue
            seen.add((axis, expression, scale))
            period = network.stride[axis]
            for extent in sample_extents(multiple, network.graph.smallest[axis]):
                moved = evaluate(expression, symbol, extent + period * multiple)
                if moved - evaluate(expression, symbol, extent) != period * multiple * scale:
                    return (
                        f"{operation_name(node)} in {where(node)} cannot be tiled: its {AXES[axis]} does not follow "
                        "the image's in constant steps; crop and pad by constants or to another tensor's size"
                    )
    return ""


def _check_output_size(network: Network, known: dict[Node, Pixels], output: Node) -> None:
    """Refuse outputs that are not size * scale, rounded up or down."""
    multiple = network.size_multiple
    for axis, symbol in enumerate((network.graph.height, network.graph.width)):
        expression, scale = known[output].sizes[axis], known[output].scale[axis]
        extent = find_misfit(expression, symbol, scale, sample_extents(multiple, network.graph.smallest[axis]))
        if extent is not None:
            raise UntileableError(
                f"the network's output must have {scale} x the image's {AXES[axis]}, for all images or for those whose "
                f"sizes are divisible by some k up to {LARGEST_MULTIPLE}, but an image of {extent} gives "
                f"{evaluate(expression, symbol, extent)}; pad its convolutions, or pad the result"
            )
