"""Programs: a network specialised to one core, in which every operation computes only the pixels that are needed.

Padding is explicit and only at the image's true edges, operands are cropped where paths join, and resampling takes the
whole image's own coordinates. So there is no alignment to keep, and what depends on position or size is exact too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..base.errors import UsageError
from ..base.geometry import Interval, Window
from .axis_geometry import AxisGeometry, beyond, block_factor, compute_geometry, tap_arrays
from .graph import operation_name
from .network import Network
from .receptive import AxisRule, EnlargeNearest, Extents, Mirror, Resample, Shift, Slide, Spread
from .rules import bound_arguments
from .sizes import evaluate_at, expression_of


def graph_tensors(network: Network) -> dict[str, Any]:
    """Weights and constants of the traced graph, by name."""
    program = network.graph.program
    return {**program.state_dict, **program.constants}


class Program(nn.Module):
    """The network for one core: (1, bands, window) of pixels -> (finished, logits) of the core, or (finished,).

    Cores of one `geometry_key` along both axes have one program, with `inputs` of their own beside the image.

    Guarantee: equal to the core's pixels of the module on the whole (padded) image, up to floating-point rounding. With
    `tensors`, autograd through it gives the core's part of the whole image's gradient too.

    Args:
        tensors: parameters and buffers by their names in the traced module, in place of those of the trace. What is
            derived from them is then computed at every call, so that gradients reach them and their changes count.
        outputs: what to compute, of the graph's outputs; None: all.
        cuts: positions in `order` at which the graph is cut; where gradients are wanted, the parts keep only what they
            hand on, and are computed again in backward. Empty: everything is kept.
    """

    def __init__(
        self,
        network: Network,
        rows: AxisGeometry,
        columns: AxisGeometry,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        outputs: tuple[Node, ...] | None = None,
        cuts: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.rows, self.columns = rows, columns
        self.taps: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self.device = torch.device("cpu")
        self.position = {node: index for index, node in enumerate(network.pixels)}
        self.outputs = network.graph.output_nodes if outputs is None else outputs
        self.order = list_order(network, self.outputs)
        self.cuts = cuts
        self.is_trained = tensors is not None
        program = network.graph.program
        known: dict[str, Any] = {**program.state_dict, **program.constants, **(tensors or {})}
        self.constants: dict[Node, Any] = {node: known[name] for node, name in name_placeholders(network).items()}

    @property
    def window(self) -> Window:
        """The image's pixels that the program takes."""
        return Window.from_intervals(self.rows.window, self.columns.window)

    def interval(self, node: Node) -> tuple[Interval, Interval] | None:
        """What is computed of a tensor; None: nothing."""
        rows, columns = (axis.intervals[self.position[node]] for axis in (self.rows, self.columns))
        return None if rows is None or columns is None or not (rows.length and columns.length) else (rows, columns)

    def inputs(self) -> list[Tensor]:
        """The arrays that `forward` takes after the image: indices and weights of resampling, rows before columns."""
        return [torch.from_numpy(array) for geometry in (self.rows, self.columns) for array in tap_arrays(geometry)]

    def _name(self, inputs: Sequence[Tensor]) -> dict[tuple[int, int], tuple[Tensor, Tensor | None]]:
        """The inputs by axis and by the tensor that they make."""
        left = list(inputs)
        found: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        for axis, geometry in enumerate((self.rows, self.columns)):
            for taps in geometry.taps():
                indices = left.pop(0)
                found[axis, taps.position] = (indices, left.pop(0) if taps.weights is not None else None)
        return found

    def forward(self, image: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.device = image.device
        self.taps = self._name(inputs or [_like(tensor, image) for tensor in self.inputs()])
        values: dict[Node, Any] = {self.network.graph.input_node: image}
        last_use = _last_uses(self.order)
        if not (self.cuts and torch.is_grad_enabled()):
            self._run(self.order, values, last_use)
        else:
            for start, stop in zip((0, *self.cuts), (*self.cuts, len(self.order)), strict=True):
                self._run_part(self.order[start:stop], values, last_use)
        outputs: list[Tensor] = []
        for node in self.outputs:
            rows, columns = (axis.intervals[-1] for axis in (self.rows, self.columns))
            assert rows is not None
            assert columns is not None
            outputs.append(_crop(values[node], self.network.pixels[node].dims, self.interval(node), (rows, columns)))
        return tuple(outputs)

    def _run(self, nodes: Sequence[Node], values: dict[Node, Any], last_use: dict[Node, list[Node]]) -> None:
        """Compute nodes from `values` into it; what nobody reads any more goes out of it."""
        for node in nodes:
            if node in self.constants:
                values[node] = self.constants[node]
            elif node.op == "call_function":
                if node in self.position:
                    if self.interval(node) is not None:
                        values[node] = _run(_Step(self, node, values))
                elif not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                    values[node] = self._constant(node, values)
            for done in last_use.get(node, ()):
                if done not in self.outputs:
                    values.pop(done, None)

    def _run_part(self, nodes: list[Node], values: dict[Node, Any], last_use: dict[Node, list[Node]]) -> None:
        """`_run`, remembering only what goes in: the part's inner tensors are computed again in backward."""
        own = set(nodes)
        inputs = {s: values[s] for node in nodes for s in node.all_input_nodes if s in values}
        leaving = {done for node in nodes for done in last_use.get(node, ()) if done not in self.outputs}

        def compute(given: dict[Node, Any]) -> dict[Node, Any]:
            inner = dict(given)
            self._run(nodes, inner, last_use)
            return {node: value for node, value in inner.items() if node in own}

        # No operation draws random numbers, so that there is no state of theirs to keep.
        made = checkpoint(compute, inputs, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(made, dict)
        for node in leaving:
            values.pop(node, None)
        values.update(made)

    def _constant(self, node: Node, values: dict[Node, Any]) -> Any:
        """A value that no pixel goes into; computed once where weights stay."""
        if not all(source in values for source in node.all_input_nodes):
            return None  # asks for sizes only; they are put in as numbers
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: values[source])
        assert callable(node.target)
        value = node.target(*args, **self.here(kwargs))
        if not self.is_trained:
            self.constants[node] = value
        return value

    def here(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What an operation makes anew is made where the image is, not where the network was traced."""
        return {**kwargs, "device": self.device} if kwargs.get("device") is not None else kwargs


def _like(tensor: Tensor, image: Tensor) -> Tensor:
    """The tensor on the image's device; as it is where it is there already, so that no exporter sees a copy."""
    return tensor if image.device.type == "cpu" else tensor.to(image.device)


def name_placeholders(network: Network) -> dict[Node, str]:
    """The names, in the traced module, of the parameters, buffers and constants that its graph takes."""
    names = [spec.target for spec in network.graph.program.graph_signature.input_specs]
    placeholders = [node for node in network.graph.nodes if node.op == "placeholder"]
    return {node: name for node, name in zip(placeholders, names, strict=True) if name is not None}


def list_order(network: Network, outputs: tuple[Node, ...]) -> list[Node]:
    """The nodes that these outputs are computed from, in the graph's order."""
    needed = set(outputs)
    for node in reversed(network.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in network.graph.nodes if node in needed and node.op in ("placeholder", "call_function")]


def _last_uses(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """For each node the tensors that nobody reads after it."""
    last: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    ends: dict[Node, list[Node]] = {}
    for source, node in last.items():
        ends.setdefault(node, []).append(source)
    return ends


def _crop(
    value: Any,
    dims: tuple[int, int],
    have: tuple[Interval, Interval] | None,
    want: tuple[Interval, Interval],
) -> Any:
    """The wanted pixels of a tensor, or of each of several."""
    if isinstance(value, (tuple, list)):
        return type(value)(_crop(part, dims, have, want) for part in value)
    assert have is not None
    for dim, mine, wanted in zip(dims, have, want, strict=True):
        if mine != wanted:
            value = value.narrow(dim, wanted.start - mine.start, wanted.length)
    return value


class _Step:
    """One operation of a program: what it is asked for, and its operands cut to what that takes."""

    def __init__(self, program: Program, node: Node, values: dict[Node, Any]) -> None:
        self.program, self.node, self.values = program, node, values
        self.arguments = bound_arguments(node)
        self.position = program.position[node]
        self.dims = program.network.pixels[node].dims
        wanted = program.interval(node)
        assert wanted is not None
        self.wanted = wanted

    @property
    def geometry(self) -> tuple[AxisGeometry, AxisGeometry]:
        return (self.program.rows, self.program.columns)

    def rules(self, source: Node) -> tuple[AxisRule, AxisRule]:
        found = []
        for geometry in self.geometry:
            sources = geometry.axis.graph.nodes[self.position].sources
            found.append(next(rule for index, rule in sources if index == self.program.position[source]))
        return (found[0], found[1])

    def extents(self, axis: int, source: Node) -> Extents:
        return self.geometry[axis].axis.extents(self.position, self.program.position[source])

    def reads(self, source: Node) -> tuple[Interval, Interval]:
        rules = self.rules(source)
        rows, columns = (rules[axis].reads(self.wanted[axis], self.extents(axis, source)) for axis in (0, 1))
        return rows, columns

    def operand(self, source: Node) -> Any:
        """The pixels of an operand that the wanted ones are computed from."""
        dims, reads = self.program.network.pixels[source].dims, self.reads(source)
        if not (reads[0].length and reads[1].length):
            # All that is wanted lies in the padding beyond an edge.
            shape = [self.number(extent) for extent in source.meta["val"].shape]
            shape[dims[0]], shape[dims[1]] = reads[0].length, reads[1].length
            return torch.zeros(shape, dtype=source.meta["val"].dtype, device=self.program.device)
        return _crop(self.values[source], dims, self.program.interval(source), reads)

    def value(self, argument: Any) -> Any:
        """An argument as it goes into the operation: operands cut, constants, sizes of the whole image as numbers."""

        def one(source: Node) -> Any:
            if source in self.program.position:
                return self.operand(source)
            if isinstance(source.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return self.number(source)
            return self.values[source]

        return map_arg(argument, one)

    def number(self, value: Any) -> int:
        """A size of the whole image."""
        graph = self.program.network.graph
        image = (self.program.rows.axis.image, self.program.columns.axis.image)
        return evaluate_at(expression_of(value), (graph.height, graph.width), image)

    def taps(self, axis: int) -> tuple[Tensor, Tensor | None]:
        """(indices, weights) of this resampling along an axis."""
        return self.program.taps[axis, self.position]

    def local_shape(self) -> list[int]:
        """The result's shape, with only the wanted pixels."""
        shape = [self.number(extent) for extent in self.node.meta["val"].shape]
        for dim, interval in zip(self.dims, self.wanted, strict=True):
            shape[dim] = interval.length
        return shape


_Runner = Callable[[_Step], Any]
_RUNNERS: dict[str, _Runner] = {}


def register_program(*names: str) -> Callable[[_Runner], _Runner]:
    """Register how an operation such as "mylib.myop" computes just the wanted pixels; not needed where its interval
    rule is `Same`."""

    def register(runner: _Runner) -> _Runner:
        _RUNNERS.update(dict.fromkeys(names, runner))
        return runner

    return register


def _runs(*names: str) -> Callable[[_Runner], _Runner]:
    return register_program(*(f"aten.{name}" for name in names))


def _run(step: _Step) -> Any:
    runner = _RUNNERS.get(operation_name(step.node))
    if runner is not None:
        return runner(step)
    for source in step.node.all_input_nodes:
        if source in step.program.position and any(type(rule).__name__ != "Same" for rule in step.rules(source)):
            raise UsageError(
                f"{operation_name(step.node)} has an interval rule but no program; register one with register_program"
            )
    args, kwargs = step.value((step.node.args, step.node.kwargs))
    keeps = step.program.is_trained and torch.is_grad_enabled()
    target = _out_of_place(step.node) if keeps else step.node.target
    assert callable(target)
    return target(*args, **step.program.here(kwargs))


def _out_of_place(node: Node) -> Any:
    """The operation that gives what this one writes in place: autograd may need what would be written over, and a
    view that several operands are cut from must stay. (Nobody reads the written memory by another name: aliasing.py.)
    """
    target, name = node.target, operation_name(node)
    if not (isinstance(target, torch._ops.OpOverload) and name.endswith("_")):
        return target
    packet = getattr(getattr(torch.ops, target.namespace), name.partition(".")[2].removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if found is not None:
        return found

    def on_copy(value: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert callable(target)
        return target(value.clone(), *args, **kwargs)

    return on_copy


def _pad(value: Tensor, dims: tuple[int, int], amounts: list[tuple[int, int]], fill: float) -> Tensor:
    """Constant padding along height and width."""
    if not any(any(pair) for pair in amounts):
        return value
    flat: list[int] = []
    for dim in range(value.ndim - 1, min(dims) - 1, -1):
        flat += amounts[dims.index(dim)] if dim in dims else (0, 0)
    return F.pad(value, flat, value=fill)


def _padded_operand(step: _Step, source: Node, fill: float) -> Tensor:
    """The operand of a sliding window with its true-edge padding."""
    rules, reads = step.rules(source), step.reads(source)
    amounts: list[tuple[int, int]] = []
    for axis, rule in enumerate(rules):
        assert isinstance(rule, Slide)
        amounts.append(beyond(rule.under(step.wanted[axis]), reads[axis]))
    return _pad(step.operand(source), step.program.network.pixels[source].dims, amounts, fill)


@_runs("conv2d", "convolution")
def _run_convolution(step: _Step) -> Tensor:
    arguments = step.arguments
    if arguments.get("transposed"):
        return _run_transposed(step)
    image = _padded_operand(step, arguments["input"], 0.0)
    weight, bias = step.value((arguments["weight"], arguments.get("bias")))
    options = [arguments.get(name, 1) for name in ("stride", "dilation", "groups")]
    return F.conv2d(image, weight, bias, options[0], 0, options[1], options[2])


@_runs("conv_transpose2d")
def _run_transposed(step: _Step) -> Tensor:
    arguments = step.arguments
    source: Node = arguments["input"]
    rules, reads = step.rules(source), step.reads(source)
    weight, bias = step.value((arguments["weight"], arguments.get("bias")))
    groups = arguments.get("groups", 1)
    image = step.operand(source)
    if min(interval.length for interval in reads):
        stride, dilation = arguments.get("stride", 1), arguments.get("dilation", 1)
        spread = F.conv_transpose2d(image, weight, None, stride, 0, 0, groups, dilation)
    else:
        # Between inputs further apart than the kernel reaches only the bias is left.
        spread = image.new_zeros((1, weight.shape[1] * groups, 0, 0))
    for axis, dim in ((0, 2), (1, 3)):
        rule, wanted = rules[axis], step.wanted[axis]
        assert isinstance(rule, Spread)
        first = reads[axis].start * rule.stride - rule.padding
        have = Interval(start=first, stop=first + spread.shape[dim])
        start, stop = min(max(wanted.start, have.start), have.stop), max(min(wanted.stop, have.stop), have.start)
        spread = spread.narrow(dim, start - have.start, max(0, stop - start))
        beyond = (start - wanted.start, wanted.stop - max(start, stop)) if stop > start else (wanted.length, 0)
        pads = [beyond, (0, 0)] if axis == 0 else [(0, 0), beyond]
        spread = _pad(spread, (2, 3), pads, 0.0)
    return spread if bias is None else spread + bias.to(spread.dtype)[None, :, None, None]


@_runs("max_pool2d", "max_pool2d_with_indices")
def _run_max_pool(step: _Step) -> Any:
    arguments = step.arguments
    source: Node = arguments["self"]
    dtype = source.meta["val"].dtype
    lowest = -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    image = _padded_operand(step, source, lowest)
    pooled = F.max_pool2d(
        image, arguments["kernel_size"], arguments.get("stride") or None, 0, arguments.get("dilation", 1)
    )
    return (pooled, None) if operation_name(step.node) == "aten.max_pool2d_with_indices" else pooled


@_runs("avg_pool2d")
def _run_average_pool(step: _Step) -> Tensor:
    arguments = step.arguments
    source: Node = arguments["self"]
    image = _padded_operand(step, source, 0.0)
    kernel, stride = arguments["kernel_size"], arguments.get("stride") or None
    # Not by torch's divisor_override, which OpenVINO does not know.
    area = math.prod(rule.extent for rule in step.rules(source) if isinstance(rule, Slide))
    divisor = arguments.get("divisor_override")
    if divisor is not None:
        return F.avg_pool2d(image, kernel, stride, 0) * (area / divisor)
    counts: list[np.ndarray] = []
    for axis, rule in enumerate(step.rules(source)):
        assert isinstance(rule, Slide)
        size = step.extents(axis, source).operand
        start = np.arange(step.wanted[axis].start, step.wanted[axis].stop) * rule.stride - rule.padding
        if arguments.get("count_include_pad", True):
            counts.append(np.minimum(start + rule.extent, size + rule.padding) - start)
        else:
            counts.append(np.minimum(start + rule.extent, size) - np.maximum(start, 0))
    whole = [rule.extent for rule in step.rules(source) if isinstance(rule, Slide)]
    if all((count == extent).all() for count, extent in zip(counts, whole, strict=True)):
        return F.avg_pool2d(image, kernel, stride, 0)
    total = F.avg_pool2d(image, kernel, stride, 0) * area
    divisors = torch.from_numpy(counts[0][:, None] * counts[1][None, :]).to(total)
    return total / divisors


@_runs("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d")
def _run_resample(step: _Step) -> Tensor:
    source: Node = step.arguments["input" if "input" in step.arguments else "self"]
    value, reads, rules = step.operand(source), step.reads(source), step.rules(source)
    # Where all positions are alike, whole pixels are enlarged, which engines do faster than they gather.
    blocks = [block_factor(rule) for rule in rules]
    if any(blocks):
        assert isinstance(rules[0], Resample)
        mode = rules[0].mode if rules[0].mode in ("bilinear", "bicubic") else "nearest"
        value = F.interpolate(value, scale_factor=[float(factor or 1) for factor in blocks], mode=mode)
    for axis, (dim, factor) in enumerate(zip((2, 3), blocks, strict=True)):
        wanted = step.wanted[axis]
        if factor:
            value = value.narrow(dim, wanted.start - reads[axis].start * factor, wanted.length)
        else:
            value = _mix(value, dim, *step.taps(axis))
    return value


LARGEST_GATHER = 1 << 24
"""Elements of one gather along the last axis. OpenVINO 2026.4 takes wrong pixels where a thread makes more than that
(seen at 2^25 with 2 threads; the start check found it); along other axes it does not."""


def _gather(value: Tensor, dim: int, indices: Tensor) -> Tensor:
    """`index_select`, in parts where the result is large."""
    parts = 1
    if dim == value.ndim - 1:
        parts = -(-(value.numel() // value.shape[dim] * len(indices)) // LARGEST_GATHER)
    if parts == 1:
        return value.index_select(dim, indices)
    # By channels where there are enough, since those lie whole in memory; else by rows.
    along = 1 if value.shape[1] >= parts else 2
    length = max(1, value.shape[along] // parts)
    pieces = [piece.index_select(dim, indices) for piece in value.split(length, dim=along)]
    return torch.cat(pieces, dim=along)


def _mix(value: Tensor, dim: int, indices: Tensor, weights: Tensor | None) -> Tensor:
    """The sum over taps of weight times the tensor's pixels at the tap's indices."""
    picked = [_gather(value, dim, tap) for tap in indices]
    if weights is None:
        return picked[0]
    shape = [-1 if d == dim else 1 for d in range(value.ndim)]
    parts = [tap * weight.to(value).reshape(shape) for tap, weight in zip(picked, weights, strict=True)]
    mixed = parts[0]
    for part in parts[1:]:
        mixed = mixed + part
    return mixed


@_runs("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def _run_pad(step: _Step) -> Tensor:
    arguments = step.arguments
    source: Node = arguments["self"]
    dims = step.program.network.pixels[source].dims
    value, reads, rules = step.operand(source), step.reads(source), step.rules(source)
    fill = arguments.get("value")
    fill = 0.0 if fill is None else fill
    amounts = [(0, 0), (0, 0)]
    for axis, rule in enumerate(rules):
        if isinstance(rule, Mirror):
            indices = rule.indices(step.wanted[axis], step.extents(axis, source)) - reads[axis].start
            if not np.array_equal(indices, np.arange(value.shape[dims[axis]])):
                places = torch.from_numpy(indices)
                value = _gather(value, dims[axis], places if value.is_cpu else places.to(value.device))
        elif isinstance(rule, (Shift, Slide)):
            amounts[axis] = beyond(rule.under(step.wanted[axis]), reads[axis])
    value = _pad(value, dims, amounts, fill)
    given = list(arguments["pad" if "pad" in arguments else "padding"])
    others = [0] * len(given)
    for pair, dim in enumerate(range(value.ndim - 1, value.ndim - 1 - len(given) // 2, -1)):
        if dim not in dims:
            others[2 * pair : 2 * pair + 2] = given[2 * pair : 2 * pair + 2]
    return F.pad(value, others, value=fill) if any(others) else value


@_runs("slice")
def _run_slice(step: _Step) -> Tensor:
    source: Node = step.arguments["self"]
    dims = step.program.network.pixels[source].dims
    dim = int(step.arguments.get("dim", 0)) % len(source.meta["val"].shape)
    value = step.operand(source)
    if dim not in dims:
        start, end, width = (step.value(step.arguments.get(name)) for name in ("start", "end", "step"))
        return torch.ops.aten.slice.Tensor(value, dim, start, end, width or 1)
    rule = step.rules(source)[dims.index(dim)]
    stride = rule.stride if isinstance(rule, Slide) else 1
    return value if stride == 1 else torch.ops.aten.slice.Tensor(value, dim, 0, None, stride)


def _cut_enlarged(step: _Step, source: Node, value: Tensor) -> Tensor:
    """The wanted pixels of what was enlarged from whole pixels of the operand."""
    reads = step.reads(source)
    for axis, rule in enumerate(step.rules(source)):
        if isinstance(rule, EnlargeNearest):
            offset = step.wanted[axis].start - reads[axis].start * rule.factor
            value = value.narrow(step.dims[axis], offset, step.wanted[axis].length)
    return value


@_runs("pixel_shuffle")
def _run_pixel_shuffle(step: _Step) -> Tensor:
    source: Node = step.arguments["self"]
    return _cut_enlarged(step, source, F.pixel_shuffle(step.operand(source), step.arguments["upscale_factor"]))


@_runs("pixel_unshuffle")
def _run_pixel_unshuffle(step: _Step) -> Tensor:
    return F.pixel_unshuffle(step.operand(step.arguments["self"]), step.arguments["downscale_factor"])


@_runs("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _run_reshape(step: _Step) -> Tensor:
    source: Node = step.arguments["self"]
    shape, reads = step.local_shape(), step.reads(source)
    for axis, rule in enumerate(step.rules(source)):
        if isinstance(rule, EnlargeNearest):
            shape[step.dims[axis]] = reads[axis].length * rule.factor
    return _cut_enlarged(step, source, step.operand(source).reshape(shape))


@_runs("expand")
def _run_expand(step: _Step) -> Tensor:
    return step.value(step.arguments["self"]).expand(step.local_shape())


@_runs("full", "zeros", "ones", "empty")
def _run_fill(step: _Step) -> Tensor:
    known = {"aten.zeros": 0, "aten.ones": 1, "aten.empty": 0}  # empty has no channels, and so no pixel
    value = known.get(operation_name(step.node), step.arguments.get("fill_value"))
    dtype = step.node.meta["val"].dtype
    return torch.full(step.local_shape(), step.value(value), dtype=dtype, device=step.program.device)


def hash_sizes(network: Network, image: tuple[int, int]) -> str:
    """Of the image's sizes that go as numbers into operations: equal for images whose programs are the same."""
    graph = network.graph
    digest = hashlib.sha256()
    for node in graph.nodes:
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if node.op == "call_function" and is_tensor and operation_name(node) not in _RUNNERS:
            for source in node.all_input_nodes:
                if isinstance(source.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                    number = evaluate_at(expression_of(source), (graph.height, graph.width), image)
                    digest.update(f"{node.name},{number};".encode())
    return digest.hexdigest()[:16]


def make_program(network: Network, shape_yx: tuple[int, int], core: Window) -> Program:
    """The program of a core of the result for a raster of that shape.

    Raises:
        UsageError: a core that is empty or outside the output.
    """
    if core.pixels == 0 or not Window.whole(network.output_shape(shape_yx)).contains(core):
        height, width = network.output_shape(shape_yx)
        raise UsageError(f"a core must be non-empty and inside the output of {height} x {width}, got {core}")
    axes = network.on_image(shape_yx)
    return Program(network, compute_geometry(axes[0], core.rows), compute_geometry(axes[1], core.columns))
