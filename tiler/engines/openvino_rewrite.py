"""Rewrites of OpenVINO graphs of fixed shapes: the same results up to rounding, in fewer operations and less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset1 as first_ops
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager

Pair = tuple[int, int]
MOST_CLASSES = 64
"""An argmax over more channels is left to the engine."""


def rewrite_model(model: ov.Model, *, quantised: bool = False) -> int:
    """Rewrite what can be, in place; returns how many operations were replaced.

    The model's shapes must be fixed, since what lies at an image's edge is told from them.

    Args:
        quantised: its weights are int8. They stay so, where folding would make floats of them; and no weights are
            summed: sums need more bits, and where an edge forbids the rewrite a window would be of another network.
    """
    if not quantised:
        passes = Manager()
        passes.register_pass(ConstantFolding())  # crops to another tensor's size become crops by numbers
        passes.run_passes(model)
    rewrites = {kind: made for kind, made in _REWRITES.items() if not quantised or kind != "Convolution"}
    replaced = 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        made = rewrites[kind](node) if kind in rewrites else None
        if made is not None:
            _replace(*made)
            replaced += 1
    if replaced:
        model.validate_nodes_and_infer_types()
    return replaced


def _replace(old: Any, new: Any) -> None:
    for reader in list(old.get_target_inputs()):
        reader.replace_source_output(new)


def _source(node: Any, index: int = 0) -> tuple[Any, Any]:
    """(output, its node) that an input of a node reads."""
    output = node.input_value(index)
    return output, output.get_node()


def _constant(node: Any, index: int) -> npt.NDArray[Any] | None:
    _, source = _source(node, index)
    return source.data if source.get_type_name() == "Constant" else None


def _only_reader(node: Any) -> Any | None:
    readers = [reader for output in node.outputs() for reader in output.get_target_inputs()]
    return readers[0].get_node() if len(readers) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Upsampled:
    """A tensor that repeats each pixel of a smaller one, with some rows and columns cut off."""

    small: Any
    """The output that is repeated."""
    factor: Pair
    before: Pair
    after: Pair
    """Rows and columns cut off the repeated tensor."""


def _find_upsampled(output: Any) -> _Upsampled | None:
    """What a tensor repeats, through crops; None where it is something else."""
    node, before, after = output.get_node(), [0, 0], [0, 0]
    while node.get_type_name() == "Slice":
        extents, cut = list(node.input(0).get_shape()), list(node.output(0).get_shape())
        parts = [_constant(node, index) for index in range(1, len(node.inputs()))]
        if len(extents) != 4 or any(part is None for part in parts) or len(parts) < 4:
            return None
        starts, _, steps, axes = (list(np.atleast_1d(part).ravel()) for part in parts[:4] if part is not None)
        for start, step, axis in zip(starts, steps, axes, strict=True):
            axis = int(axis) % 4
            start = int(start) + extents[axis] if start < 0 else min(int(start), extents[axis])
            if step != 1 or (axis < 2 and (start or cut[axis] != extents[axis])):
                return None
            if axis >= 2:
                before[axis - 2] += start
                after[axis - 2] += extents[axis] - start - cut[axis]
        node = _source(node)[1]
    if node.get_type_name() != "Interpolate":
        return None
    attributes = node.get_attributes()
    small, large = (list(shape) for shape in (node.input(0).get_shape(), node.output(0).get_shape()))
    usual = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if any(attributes.get(name) != value for name, value in usual.items()) or len(small) != 4:
        return None
    if any(attributes.get("pads_begin", ())) or any(attributes.get("pads_end", ())) or small[:2] != large[:2]:
        return None
    factor = (large[2] // small[2], large[3] // small[3])
    if (small[2] * factor[0], small[3] * factor[1]) != (large[2], large[3]) or max(factor) < 2:
        return None
    return _Upsampled(
        small=node.input_value(0), factor=factor, before=(before[0], before[1]), after=(after[0], after[1])
    )


def spread_weights(weights: npt.NDArray[Any], factor: Pair) -> npt.NDArray[Any]:
    """Of the transposed convolution by stride `factor` that equals a convolution of a tensor whose pixels are repeated.

    A small pixel j is repeated at f*j ... f*j + f - 1, and the tap k of result y reads the repeated pixel y + k: so j
    reaches y where f*j - y <= k < f*j - y + f, and the weights of those k add up.

    Args:
        weights: (out, in, height, width) of the convolution.

    Returns:
        (in, out, height + factor - 1, width + factor - 1); sums in float64.
    """
    summed = weights.astype(np.float64)
    for axis, f in zip((2, 3), factor, strict=True):
        taps = summed.shape[axis]
        parts = [
            summed.take(range(max(0, taps - 1 - d), min(taps, taps - 1 - d + f)), axis=axis).sum(axis, keepdims=True)
            for d in range(taps + f - 1)
        ]
        summed = np.concatenate(parts, axis=axis)
    return np.ascontiguousarray(summed.transpose(1, 0, 2, 3)).astype(weights.dtype)


def _spread(part: _Upsampled, weights: npt.NDArray[Any], pads: tuple[Pair, Pair]) -> Any | None:
    """The convolution's share of an upsampled operand, from the small tensor; None where an edge forbids it."""
    cuts: list[list[int]] = [[], []]
    for axis in (0, 1):
        for side, (cut, pad) in enumerate(((part.before[axis], pads[0][axis]), (part.after[axis], pads[1][axis]))):
            # Beyond a true edge there are zeros, not the rows that were cut off there.
            if cut and pad:
                return None
            cuts[side].append(cut - pad + weights.shape[2 + axis] - 1)
    if min(map(min, cuts)) < 0:
        return None
    kernel = ops.constant(spread_weights(weights, part.factor))
    return ops.convolution_backprop_data(
        part.small,
        kernel,
        strides=list(part.factor),
        pads_begin=cuts[0],
        pads_end=cuts[1],
        dilations=[1, 1],
    ).output(0)


def _parts(output: Any) -> Iterator[Any]:
    """The tensors that are joined along the channels."""
    node = output.get_node()
    if node.get_type_name() == "Concat" and node.get_attributes()["axis"] in (1, -3):
        for index in range(len(node.inputs())):
            yield node.input_value(index)
    else:
        yield output


def _spread_upsampled(node: Any) -> tuple[Any, Any] | None:
    """A convolution of channels some of which are repeated pixels: those are convolved where they are still few.

    Nearest upsampling by f and a k x k convolution become one transposed convolution of (k + f - 1)^2 / f^2 products a
    pixel in place of k^2: 4 in place of 9 for k = 3, f = 2. The other channels are convolved by themselves, so that
    the joined tensor is never made.
    """
    attributes, weights = node.get_attributes(), _constant(node, 1)
    if weights is None or weights.dtype != np.float32 or min(weights.shape[2:]) < 2:
        return None
    if attributes["strides"] != [1, 1] or attributes["dilations"] != [1, 1] or attributes["auto_pad"] != "explicit":
        return None
    pads = (tuple(attributes["pads_begin"]), tuple(attributes["pads_end"]))
    plain: list[tuple[Any, npt.NDArray[Any]]] = []
    spread: list[Any] = []
    first = 0
    for part in _parts(node.input_value(0)):
        channels = part.get_shape()[1]
        own = weights[:, first : first + channels]
        first += channels
        upsampled = _find_upsampled(part)
        made = _spread(upsampled, own, pads) if upsampled is not None else None
        if made is None:
            plain.append((part, own))
        else:
            spread.append(made)
    if not spread:
        return None
    old, total = node.output(0), None
    if plain:
        joined = plain[0][0] if len(plain) == 1 else ops.concat([part for part, _ in plain], axis=1).output(0)
        kernel = ops.constant(np.ascontiguousarray(np.concatenate([own for _, own in plain], axis=1)))
        total = ops.convolution(
            joined, kernel, strides=[1, 1], pads_begin=list(pads[0]), pads_end=list(pads[1]), dilations=[1, 1]
        ).output(0)
        # The bias goes to the convolution, so that the engine makes one operation of it, the sum and the activation.
        bias = _only_reader(node)
        if bias is not None and bias.get_type_name() == "Add":
            other = 1 - next(i for i in (0, 1) if _source(bias, i)[1].get_friendly_name() == node.get_friendly_name())
            if _constant(bias, other) is not None:
                old, total = bias.output(0), ops.add(total, bias.input_value(other)).output(0)
    for part in spread:
        total = part if total is None else ops.add(total, part).output(0)
    return old, total


def _compare_classes(node: Any) -> tuple[Any, Any] | None:
    """The position of the largest of a few channels, first of equals, by comparing them one after the other."""
    largest, positions = node.output(0), node.output(1)
    count = _constant(node, 1)
    if largest.get_target_inputs() or count is None or int(count) != 1:
        return None
    attributes, shape = node.get_attributes(), list(node.input(0).get_shape())
    if attributes["mode"] != "max" or attributes["axis"] not in (1, -3) or len(shape) != 4 or shape[1] > MOST_CLASSES:
        return None
    if shape[1] < 2 or node.input(0).get_element_type() != ov.Type.f32:
        return None
    # Flat, so that the engine keeps each channel by itself and splits them without copying.
    flat = ops.reshape(node.input_value(0), ops.constant([1, shape[1], shape[2] * shape[3]]), False)
    channels = ops.split(flat, ops.constant(1), shape[1]).outputs()
    best, index = channels[0], ops.constant(np.zeros((1, 1, 1), np.float32)).output(0)
    for number, channel in enumerate(channels[1:], start=1):
        index = ops.select(
            ops.greater(channel, best), ops.constant(np.full((1, 1, 1), number, np.float32)), index
        ).output(0)
        best = ops.maximum(best, channel).output(0)
    found = ops.reshape(index, ops.constant([1, 1, shape[2], shape[3]]), False)
    return positions, ops.convert(found, positions.get_element_type()).output(0)


def _forget_indices(node: Any) -> tuple[Any, Any] | None:
    """Max pooling without the positions that nobody reads: the engine would put them in order all the same."""
    outputs = node.outputs()
    if len(outputs) < 2 or outputs[1].get_target_inputs():
        return None
    attributes = node.get_attributes()
    if any(step != 1 for step in attributes["dilations"]):
        return None
    pool = first_ops.max_pool(
        node.input_value(0),
        strides=attributes["strides"],
        pads_begin=attributes["pads_begin"],
        pads_end=attributes["pads_end"],
        kernel_shape=attributes["kernel"],
        rounding_type="floor" if attributes["rounding_type"] == "floor" else "ceil",
        auto_pad=attributes["auto_pad"],
    ).output(0)
    return (outputs[0], pool) if pool.get_shape() == outputs[0].get_shape() else None


_REWRITES = {"Convolution": _spread_upsampled, "TopK": _compare_classes, "MaxPool": _forget_indices}
