"""Operations: for each ATen operation, what a pixel of its result needs of its operands, or why it cannot be tiled."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from .graph import operation_name
from .receptive import AxisRule, EnlargeBilinear, EnlargeNearest, Same, Shift, Slide
from .rules import AXES, Call, Outcome, Pixels, register_refusal, register_rule
from .sizes import expression_of


def _aten(names: str) -> list[str]:
    return [f"aten.{name}" for name in names.split()]


_WHOLE_IMAGE = "it needs whole-image statistics"
register_refusal(
    _aten(
        """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d group_norm native_group_norm instance_norm
        layer_norm native_layer_norm var std var_mean std_mean norm linalg_vector_norm cumsum cumprod
        """
    ),
    _WHOLE_IMAGE,
    "use batch norm in eval mode, or no norm; pool over fixed windows",
)
register_refusal(
    _aten(
        """
        grid_sampler grid_sampler_2d fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_rfftn _fft_r2c _fft_c2c
        sort topk median scaled_dot_product_attention matmul bmm mm einsum flip roll rot90 nonzero
        """
    ),
    "a pixel may need any pixel of the image",
    "replace it by convolutions, or run this network on the whole image",
)
register_refusal(
    _aten("conv_transpose2d upsample_bicubic2d reflection_pad2d replication_pad2d pixel_shuffle pixel_unshuffle"),
    "this version has no rule for it",
    "use convolution, nearest or bilinear upsampling and zero padding",
)


# Pointwise operations and joins ------------------------------------------------------------------------------------

_POINTWISE = _aten(
    """abs add alias atan ceil celu clamp clamp_max clamp_min clone contiguous cos detach div elu eq erf exp expm1 floor
    ge gelu gt hardsigmoid hardswish hardtanh isnan le leaky_relu lift_fresh_copy log log1p log_sigmoid logical_and
    logical_not logical_or lt masked_fill maximum minimum mish mul nan_to_num ne neg pow prelu reciprocal relu relu6
    remainder round rsqrt rsub selu sigmoid sign silu sin softplus softsign sqrt square sub tanh threshold to _to_copy
    trunc type_as where"""
)


def _same_for_all(call: Call, dims: tuple[int, int]) -> Outcome:
    return Outcome(dims, tuple((operand, Same(), Same()) for operand in call.operands))


@register_rule(*_POINTWISE, *(f"{name}_" for name in _POINTWISE))
def pointwise_rule(call: Call) -> Outcome:
    """Every operand's pixels line up with the result's from the last dimension, as broadcasting does."""
    rank = len(call.node.meta["val"].shape)
    from_end: set[tuple[int, int]] = set()
    for operand, pixels in call.operands.items():
        operand_rank = len(operand.meta["val"].shape)
        from_end.add((pixels.dims[0] - operand_rank, pixels.dims[1] - operand_rank))
    if len(from_end) != 1:
        call.refuse("its operands have height and width in different dimensions", "permute them alike")
    dims = from_end.pop()
    return _same_for_all(call, (dims[0] + rank, dims[1] + rank))


@register_rule("aten.dropout", "aten.dropout_", "aten.feature_dropout", "aten.alpha_dropout")
def dropout_rule(call: Call) -> Outcome:
    if call.arguments.get("train"):
        call.refuse("dropout is random in training mode", "call module.eval() first")
    return _same_for_all(call, next(iter(call.operands.values())).dims)


@register_rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.cudnn_batch_norm")
def batch_norm_rule(call: Call) -> Outcome:
    if call.arguments.get("training"):
        call.refuse(
            f"{_WHOLE_IMAGE} in training mode",
            "call module.eval() first; a norm without running statistics cannot be used",
        )
    return _same_for_all(call, call.pixels("input")[1].dims)


@register_rule("aten.cat", "aten.concat")
def cat_rule(call: Call) -> Outcome:
    rank = len(call.node.meta["val"].shape)
    if set(call.operands) != set(call.arguments["tensors"]):
        call.refuse("it joins the image with a constant of the image's size", "broadcast the constant instead")
    dims = {pixels.dims for pixels in call.operands.values()}
    if len(dims) != 1:
        call.refuse("its operands have height and width in different dimensions", "permute them alike")
    both = dims.pop()
    if call.spatial_dim(int(call.arguments.get("dim", 0)), both, rank) is not None:
        call.refuse("it joins images side by side", "join along channels")
    return _same_for_all(call, both)


@register_rule(*_aten("softmax log_softmax _softmax _log_softmax argmax argmin amax amin sum mean max min prod"))
def channel_reduction_rule(call: Call) -> Outcome:
    """A reduction over dimensions other than height and width; also the larger or smaller of two tensors."""
    if "other" in call.arguments:
        return pointwise_rule(call)
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    given = call.arguments.get("dim")
    over = [] if given is None else [int(d) % rank for d in (given if isinstance(given, (list, tuple)) else [given])]
    if not over or any(d in pixels.dims for d in over):
        call.refuse(_WHOLE_IMAGE, "reduce over channels only")
    keeps = "keepdim" not in call.arguments or bool(call.arguments["keepdim"])
    removed = [] if keeps else over
    y, x = (d - sum(r < d for r in removed) for d in pixels.dims)
    return Outcome((y, x), ((operand, Same(), Same()),))


# Dimensions --------------------------------------------------------------------------------------------------------


@register_rule("aten.unsqueeze")
def unsqueeze_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    dim = int(call.arguments["dim"]) % (rank + 1)
    y, x = (d + (dim <= d) for d in pixels.dims)
    return Outcome((y, x), ((operand, Same(), Same()),))


@register_rule("aten.squeeze")
def squeeze_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    given = call.arguments.get("dim")
    if given is None:
        call.refuse("it would drop a height or width of one pixel", "name the dimension to squeeze")
    dims = [int(d) % rank for d in (given if isinstance(given, (list, tuple)) else [given])]
    if any(d in pixels.dims for d in dims):
        call.refuse("it would drop a height or width of one pixel", "squeeze another dimension")
    removed = [d for d in dims if operand.meta["val"].shape[d] == 1]
    y, x = (d - sum(r < d for r in removed) for d in pixels.dims)
    return Outcome((y, x), ((operand, Same(), Same()),))


@register_rule("aten.permute")
def permute_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    order = [int(d) % rank for d in call.arguments["dims"]]
    return Outcome((order.index(pixels.dims[0]), order.index(pixels.dims[1])), ((operand, Same(), Same()),))


@register_rule("aten.transpose")
def transpose_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    first, second = int(call.arguments["dim0"]) % rank, int(call.arguments["dim1"]) % rank
    swap = {first: second, second: first}
    y, x = (swap.get(d, d) for d in pixels.dims)
    return Outcome((y, x), ((operand, Same(), Same()),))


@register_rule("aten.select")
def select_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    dim = int(call.arguments["dim"]) % rank
    if dim in pixels.dims:
        call.refuse("it picks one row or column of the image", "select along channels")
    y, x = (d - (dim < d) for d in pixels.dims)
    return Outcome((y, x), ((operand, Same(), Same()),))


@register_rule("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.unbind")
def channel_split_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    dim = int(call.arguments.get("dim", 0)) % rank
    if dim in pixels.dims:
        call.refuse("it cuts the image into parts", "split along channels")
    removed = 1 if call.name == "aten.unbind" else 0
    y, x = (d - (removed if dim < d else 0) for d in pixels.dims)
    return Outcome((y, x), ((operand, Same(), Same()),))


@register_rule("getitem")
def getitem_rule(call: Call) -> Outcome:
    ((operand, pixels),) = call.operands.items()
    if operation_name(operand) == "aten.max_pool2d_with_indices" and call.node.args[1] != 0:
        call.refuse("pooling indices count the image's pixels", "use the pooled values only")
    return Outcome(pixels.dims, ((operand, Same(), Same()),))


# Sliding windows ---------------------------------------------------------------------------------------------------


def _pair(value: Any) -> tuple[int, int]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return (values[0], values[-1])


def _image_dims(call: Call, argument: str) -> Node:
    """The operand, which must be laid out as (batch, channel, height, width)."""
    operand, pixels = call.pixels(argument)
    if pixels.dims != (2, 3) or len(operand.meta["val"].shape) != 4:
        call.refuse("height and width must be its last two dimensions of four", "permute before it")
    return operand


@register_rule("aten.conv2d", "aten.convolution")
def convolution_rule(call: Call) -> Outcome:
    operand = _image_dims(call, "input")
    arguments = call.arguments
    if arguments.get("transposed"):
        call.refuse("this version has no rule for transposed convolution", "upsample and convolve instead")
    kernel = arguments["weight"].meta["val"].shape[2:]
    stride, dilation = _pair(arguments.get("stride", 1)), _pair(arguments.get("dilation", 1))
    padding = arguments.get("padding", 0)
    rules: list[Slide] = []
    for axis in (0, 1):
        extent = dilation[axis] * (int(kernel[axis]) - 1) + 1
        if padding == "same":
            # torch pads the odd pixel of an even kernel at the end.
            before = (extent - 1) // 2
        elif padding == "valid":
            before = 0
        else:
            before = _pair(padding)[axis]
        rules.append(Slide(extent=extent, stride=stride[axis], padding=before))
    return Outcome((2, 3), ((operand, rules[0], rules[1]),))


@register_rule("aten.max_pool2d", "aten.avg_pool2d", "aten.max_pool2d_with_indices")
def pooling_rule(call: Call) -> Outcome:
    operand = _image_dims(call, "self")
    arguments = call.arguments
    kernel = _pair(arguments["kernel_size"])
    stride = _pair(arguments["stride"]) if arguments.get("stride") else kernel
    padding, dilation = _pair(arguments.get("padding", 0)), _pair(arguments.get("dilation", 1))
    rules = [
        Slide(extent=dilation[axis] * (kernel[axis] - 1) + 1, stride=stride[axis], padding=padding[axis])
        for axis in (0, 1)
    ]
    return Outcome((2, 3), ((operand, rules[0], rules[1]),))


# Upsampling --------------------------------------------------------------------------------------------------------


def _integer_factor(call: Call, axis: int, operand: Node, factors: Any) -> int:
    """The factor by which an upsampling enlarges every image along one axis."""
    before = expression_of(operand.meta["val"].shape[2 + axis])
    after = expression_of(call.node.meta["val"].shape[2 + axis])
    if factors is not None:
        factor = float(factors[axis])
        if factor != int(factor) or factor < 1:
            call.refuse(f"the factor must be a whole number, got {factor}", "use an integer scale_factor")
        return int(factor)
    ratios = set()
    for extent in call.extents(axis):
        small, large = call.size_at(axis, before, extent), call.size_at(axis, after, extent)
        if small > 0:  # below the network's smallest image there is nothing to enlarge
            ratios.add(Fraction(large, small))
    if len(ratios) != 1 or (ratio := ratios.pop()).denominator != 1:
        call.refuse(
            f"its size argument makes the factor depend on the image's {AXES[axis]}",
            "pool with ceil_mode=True, upsample with scale_factor=2 and crop to the wanted size",
        )
    return int(ratio)


@cache
def nearest_is_exact(factor: int) -> bool:
    """Whether torch's float32 index floor(i * (1 / factor)) is i // factor for every position below 2^20."""
    position = np.arange(1 << 20)
    index = np.floor(position.astype(np.float32) * (np.float32(1) / np.float32(factor))).astype(np.int64)
    return bool((index == position // factor).all())


@register_rule("aten.upsample_nearest2d")
def nearest_rule(call: Call) -> Outcome:
    operand = _image_dims(call, "input" if "input" in call.arguments else "self")
    factors = call.arguments.get("scale_factors")
    rules: list[EnlargeNearest] = []
    for axis in (0, 1):
        factor = _integer_factor(call, axis, operand, factors)
        if not nearest_is_exact(factor):
            call.refuse(
                f"torch's float32 index arithmetic picks other pixels at some positions for factor {factor}",
                "use factors 2, 4 or 8",
            )
        rules.append(EnlargeNearest(factor=factor))
    return Outcome((2, 3), ((operand, rules[0], rules[1]),))


@register_rule("aten.upsample_bilinear2d")
def bilinear_rule(call: Call) -> Outcome:
    operand = _image_dims(call, "input" if "input" in call.arguments else "self")
    if call.arguments.get("align_corners"):
        call.refuse("align_corners=True makes every weight depend on the image's size", "use align_corners=False")
    factors = [_integer_factor(call, axis, operand, call.arguments.get("scale_factors")) for axis in (0, 1)]
    # torch computes source coordinates in float32: exact for powers of two, else rounded by up to 6e-8 of the position.
    rounded = any(factor & (factor - 1) for factor in factors) and call.node.meta["val"].dtype != torch.float64
    return Outcome(
        (2, 3),
        ((operand, EnlargeBilinear(factor=factors[0]), EnlargeBilinear(factor=factors[1])),),
        largest_extent=LARGEST_ROUNDED if rounded else None,
    )


LARGEST_ROUNDED = 1024
"""Pixels up to which bilinear weights of factors such as 3 differ by less than 1e-4 between a window and the image."""


# Cropping and padding ----------------------------------------------------------------------------------------------


def _cut_off(call: Call, axis: int, operand: Node, pixels: Pixels, offset: int, step: int = 1) -> int:
    """Source pixels after the last wanted one that must exist, for an operation that cuts or pads the end.

    0 where the result always reaches to the end of the nominal extent (floor of size x scale): then a window that
    holds the pixel's footprint has the pixel. Otherwise the largest number of source pixels cut off.
    """
    before = expression_of(operand.meta["val"].shape[pixels.dims[axis]])
    after = expression_of(call.node.meta["val"].shape[pixels.dims[axis]])
    cut, falls_short = 0, False
    for extent in call.extents(axis):
        source, result = call.size_at(axis, before, extent), call.size_at(axis, after, extent)
        cut = max(cut, source - offset - result * step)
        falls_short |= result < int(extent * pixels.scale[axis] / step)
    if falls_short and cut > 64:
        call.refuse(
            f"it cuts {cut} or more pixels off the end", "crop by a small constant, or to another tensor's size"
        )
    return cut if falls_short else 0


@register_rule("aten.slice")
def slice_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    axis = call.spatial_dim(int(call.arguments.get("dim", 0)), pixels.dims, rank)
    start, end = call.arguments.get("start"), call.arguments.get("end")
    rules: list[AxisRule] = [Same(), Same()]
    if axis is None:
        if isinstance(start, Node) or isinstance(end, Node):
            call.refuse("it picks channels by the image's size", "use constants")
    else:
        offset = 0 if start is None else call.constant(axis, start, "its start")
        if offset < 0:
            call.refuse(f"it counts from the image's end ({offset})", "crop from the start by a constant")
        step = int(call.arguments.get("step", 1) or 1)
        beyond = _cut_off(call, axis, operand, pixels, offset, step)
        rules[axis] = (
            Shift(offset=offset, beyond=beyond)
            if step == 1
            else Slide(extent=1, stride=step, padding=-offset, beyond=beyond)
        )
    return Outcome(pixels.dims, ((operand, rules[0], rules[1]),))


@register_rule("aten.pad", "aten.constant_pad_nd")
def pad_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    mode = call.arguments.get("mode", "constant")
    if mode != "constant":
        call.refuse(f"this version has no rule for {mode} padding", "pad with zeros")
    rank = len(operand.meta["val"].shape)
    amounts = list(call.arguments["pad"])
    rules: list[AxisRule] = [Same(), Same()]
    for pair, dim in enumerate(range(rank - 1, rank - 1 - len(amounts) // 2, -1)):
        axis = call.spatial_dim(dim, pixels.dims, rank)
        before, after = amounts[2 * pair : 2 * pair + 2]
        if axis is not None:
            offset = -call.constant(axis, before, "its padding before the first pixel")
            rules[axis] = Shift(offset=offset, beyond=_cut_off(call, axis, operand, pixels, offset))
        elif isinstance(before, Node) or isinstance(after, Node):
            call.refuse("it pads channels by the image's size", "use constants")
    return Outcome(pixels.dims, ((operand, rules[0], rules[1]),))
