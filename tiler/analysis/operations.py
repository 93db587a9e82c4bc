"""Operations: for each ATen operation, what a pixel of its result needs of its operands, or why it cannot be tiled."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from .graph import operation_name
from .receptive import (
    AxisRule,
    Cut,
    EnlargeBicubic,
    EnlargeBilinear,
    EnlargeNearest,
    Mirror,
    Resample,
    ResampleMode,
    Same,
    Shift,
    Slide,
    Spread,
)
from .rules import AXES, WHOLE_IMAGE, Call, Outcome, Pixels, register_refusal, register_rule
from .sizes import PERIOD, evaluate, expression_of


def _aten(names: str) -> list[str]:
    return [f"aten.{name}" for name in names.split()]


register_refusal(
    _aten(
        """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d group_norm native_group_norm
        instance_norm
        """
    ),
    WHOLE_IMAGE,
    "use batch norm in eval mode, layer norm over channels, or no norm; pool over fixed windows",
)
register_refusal(
    _aten(
        """
        grid_sampler grid_sampler_2d fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_rfftn _fft_r2c _fft_c2c
        sort topk median scaled_dot_product_attention bmm mm einsum rot90 nonzero
        """
    ),
    "a pixel may need any pixel of the image",
    "replace it by convolutions, or run this network on the whole image",
)


# Pointwise operations and joins ------------------------------------------------------------------------------------

_POINTWISE = _aten(
    """__and__ __or__ __xor__
    abs acos acosh add addcdiv addcmul alias asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil celu clamp clamp_max clamp_min clip clone contiguous copysign cos cosh deg2rad detach div
    elu eq erf erfc exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac full_like ge gelu gt
    hardshrink hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf isnan le leaky_relu lerp
    lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor
    logit lt masked_fill maximum minimum mish mul nan_to_num ne neg ones_like pow prelu rad2deg reciprocal relu
    relu6 remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt
    square sub tan tanh tanhshrink threshold to _to_copy trunc type_as where xlogy zeros_like"""
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
            f"{WHOLE_IMAGE} in training mode",
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


@register_rule("aten.stack")
def stack_rule(call: Call) -> Outcome:
    if set(call.operands) != set(call.arguments["tensors"]):
        call.refuse("it joins the image with a constant of the image's size", "broadcast the constant instead")
    dims = {pixels.dims for pixels in call.operands.values()}
    if len(dims) != 1:
        call.refuse("its operands have height and width in different dimensions", "permute them alike")
    new = int(call.arguments.get("dim", 0)) % len(call.node.meta["val"].shape)
    y, x = (d + (new <= d) for d in dims.pop())
    return _same_for_all(call, (y, x))


@register_rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm")
def layer_norm_rule(call: Call) -> Outcome:
    """A norm over the last dimensions, which must be channels: permuted behind height and width."""
    operand, pixels = call.pixels("input")
    rank = len(operand.meta["val"].shape)
    if max(pixels.dims) >= rank - len(call.arguments["normalized_shape"]):  # over height or width
        call.refuse(WHOLE_IMAGE, "normalise over channels only: permute them to the end before it")
    return Outcome(pixels.dims, ((operand, Same(), Same()),))


_OVER_CHANNELS = _aten("cumsum cumprod cummax cummin logcumsumexp flip roll glu index_select gather channel_shuffle")


@register_rule(*_OVER_CHANNELS)
def along_channels_rule(call: Call) -> Outcome:
    """What moves or sums along named dimensions, other than height and width."""
    if call.name == "aten.channel_shuffle":
        return _same_for_all(call, call.pixels()[1].dims)
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    given = call.arguments.get("dims", call.arguments.get("dim"))
    along = [
        int(d) % rank for d in (given if isinstance(given, (list, tuple)) else [given if given is not None else 0])
    ]
    if not along or any(d in pixels.dims for d in along):
        call.refuse("a pixel may need any pixel of the image along it", "do it along channels only")
    return Outcome(pixels.dims, ((operand, Same(), Same()),))


@register_rule(
    *_aten(
        """softmax log_softmax _softmax _log_softmax argmax argmin amax amin sum mean max min prod var std var_mean
        std_mean norm linalg_vector_norm logsumexp any all count_nonzero"""
    )
)
def channel_reduction_rule(call: Call) -> Outcome:
    """A reduction over dimensions other than height and width; also the larger or smaller of two tensors."""
    if "other" in call.arguments:
        return pointwise_rule(call)
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    given = call.arguments.get("dim")
    over = [] if given is None else [int(d) % rank for d in (given if isinstance(given, (list, tuple)) else [given])]
    if not over or any(d in pixels.dims for d in over):
        call.refuse(WHOLE_IMAGE, "reduce over channels only")
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


@register_rule("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.tensor_split", "aten.unbind")
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


@register_rule("aten.narrow")
def narrow_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    rank = len(operand.meta["val"].shape)
    if int(call.arguments["dim"]) % rank in pixels.dims:
        call.refuse("it narrows the image", "slice it by constants")
    return Outcome(pixels.dims, ((operand, Same(), Same()),))


@register_rule("aten.expand", "aten.expand_as", "aten.repeat", "aten.tile")
def expand_rule(call: Call) -> Outcome:
    """Copies along channels and new dimensions; height and width stay as they are."""
    if call.name == "aten.expand_as":
        return pointwise_rule(call)
    operand, pixels = call.pixels()
    before, after = (node.meta["val"].shape for node in (operand, call.node))
    moved = len(after) - len(before)
    for dim in pixels.dims:
        if expression_of(before[dim]) != expression_of(after[dim + moved]):
            call.refuse("it repeats rows or columns of the image", "repeat along channels, or upsample")
    return Outcome((pixels.dims[0] + moved, pixels.dims[1] + moved), ((operand, Same(), Same()),))


@register_rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten")
def reshape_rule(call: Call) -> Outcome:
    """Dimensions split and merged while height and width stay apart.

    Height or width may be merged with a constant that follows it (depth to space), or be split into whole windows of a
    constant size (space to depth).
    """
    operand, pixels = call.pixels()
    before = [expression_of(extent) for extent in operand.meta["val"].shape]
    after = [expression_of(extent) for extent in call.node.meta["val"].shape]
    y, x = pixels.dims
    if y > x:
        call.refuse("width stands before height in it", "permute before it")
    # What stands before height, between height and width, and behind width must come out as such.
    groups = _regroup(before, after, pixels.dims, call.symbols)
    if groups is None:
        call.refuse(
            "it joins height and width to one dimension or with others, so that what follows may need any pixel of the "
            "image or whole-image statistics",
            "keep height and width as dimensions of their own",
        )
    dims, rules = groups
    return Outcome(dims, ((operand, rules[0], rules[1]),))


def _regroup(
    before: list[Any], after: list[Any], dims: tuple[int, int], symbols: tuple[Any, Any]
) -> tuple[tuple[int, int], tuple[AxisRule, AxisRule]] | None:
    """Where height and width are after a reshape, and what a pixel needs; None where they do not stay apart."""
    places = [[d for d, extent in enumerate(after) if extent.free_symbols & {symbol}] for symbol in symbols]
    if any(len(place) != 1 for place in places) or places[0][0] >= places[1][0]:
        return None
    new = (places[0][0], places[1][0])
    rules: list[AxisRule] = []
    left = (_product(before[: dims[0]]), _product(after[: new[0]]))
    if left[0] != left[1]:
        return None
    for axis, symbol in enumerate(symbols):
        old_end = dims[1] if axis == 0 else len(before)
        new_end = new[1] if axis == 0 else len(after)
        rest_before, rest_after = before[dims[axis] + 1 : old_end], after[new[axis] + 1 : new_end]
        own_before, own_after = before[dims[axis]], after[new[axis]]
        if own_before == own_after:
            if _product(rest_before) != _product(rest_after):
                return None
            rules.append(Same())
            continue
        # H merged with a constant r that follows it, whatever else follows.
        if rest_before and own_after == own_before * rest_before[0]:
            if _product(rest_before[1:]) != _product(rest_after) or rest_before[0].free_symbols:
                return None
            rules.append(EnlargeNearest(factor=int(rest_before[0])))
            continue
        # H split into windows of r.
        if (
            rest_after
            and not rest_after[0].free_symbols
            and _is_split(own_before, own_after, int(rest_after[0]), symbol)
        ):
            if _product(rest_before) != _product(rest_after[1:]):
                return None
            size = int(rest_after[0])
            rules.append(Slide(extent=size, stride=size, padding=0))
            continue
        return None
    return new, (rules[0], rules[1])


def _product(extents: list[Any]) -> Any:
    product: Any = 1
    for extent in extents:
        product = product * extent
    return product


def _is_split(whole: Any, parts: Any, size: int, symbol: Any) -> bool:
    """Whether `parts` windows of `size` make up `whole`, at every size where torch would allow it."""
    seen = False
    for extent in range(size, 40 * size + 1):
        total = evaluate(whole, symbol, extent)
        if total % size == 0:
            seen = True
            if evaluate(parts, symbol, extent) * size != total:
                return False
    return seen


@register_rule("aten.linear", "aten.matmul")
def linear_rule(call: Call) -> Outcome:
    """A matrix of constants applied to channels that stand last."""
    operand, pixels = call.pixels("input" if "input" in call.arguments else "self")
    rank = len(operand.meta["val"].shape)
    if rank - 1 in pixels.dims:
        call.refuse("it multiplies along the image's width", "permute channels to the end before it")
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
        return transposed_convolution_rule(call)
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


@register_rule("aten.conv_transpose2d")
def transposed_convolution_rule(call: Call) -> Outcome:
    operand = _image_dims(call, "input")
    arguments = call.arguments
    kernel = arguments["weight"].meta["val"].shape[2:]
    stride, dilation = _pair(arguments.get("stride", 1)), _pair(arguments.get("dilation", 1))
    padding = _pair(arguments.get("padding", 0))
    given = arguments.get("output_padding", 0)
    # One that depends on the image's size only adds pixels behind the last.
    more = _pair([v if isinstance(v, int) else 0 for v in (given if isinstance(given, (list, tuple)) else [given])])
    rules: list[Spread] = []
    for axis in (0, 1):
        extent = dilation[axis] * (int(kernel[axis]) - 1) + 1
        # A window with the last input of a pixel has the pixel, unless padding cuts more off than the kernel adds.
        missing = stride[axis] + padding[axis] - extent - more[axis]
        beyond = max(0, -(-missing // stride[axis]))
        rules.append(Spread(extent=extent, stride=stride[axis], padding=padding[axis], beyond=beyond))
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


@register_rule("aten.pixel_shuffle")
def pixel_shuffle_rule(call: Call) -> Outcome:
    operand = _image_dims(call, "self")
    rule = EnlargeNearest(factor=int(call.arguments["upscale_factor"]))
    return Outcome((2, 3), ((operand, rule, rule),))


@register_rule("aten.pixel_unshuffle")
def pixel_unshuffle_rule(call: Call) -> Outcome:
    operand = _image_dims(call, "self")
    factor = int(call.arguments["downscale_factor"])
    rule = Slide(extent=factor, stride=factor, padding=0)
    return Outcome((2, 3), ((operand, rule, rule),))


# Resampling --------------------------------------------------------------------------------------------------------


@cache
def nearest_is_exact(factor: int) -> bool:
    """Whether torch's float32 index floor(i * (1 / factor)) is i // factor for every position below 2^20."""
    position = np.arange(1 << 20)
    index = np.floor(position.astype(np.float32) * (np.float32(1) / np.float32(factor))).astype(np.int64)
    return bool((index == position // factor).all())


_RESAMPLING: dict[str, ResampleMode] = {
    "aten.upsample_nearest2d": "nearest",
    "aten._upsample_nearest_exact2d": "nearest-exact",
    "aten.upsample_bilinear2d": "bilinear",
    "aten.upsample_bicubic2d": "bicubic",
}
LARGEST_ROUNDED = 1024
"""Pixels up to which weights of factors such as 3 differ by less than 1e-4 between a window and the image."""


@register_rule(*_RESAMPLING)
def resampling_rule(call: Call) -> Outcome:
    """Interpolation to a size or by a factor."""
    operand = _image_dims(call, "input" if "input" in call.arguments else "self")
    value = operand.meta["val"]
    if not value.dtype.is_floating_point:
        call.refuse(f"torch interpolates {value.dtype} in another arithmetic", "convert to float before it")
    mode, corners = _RESAMPLING[call.name], bool(call.arguments.get("align_corners", False))
    factors = call.arguments.get("scale_factors")
    double = value.dtype == torch.float64
    rules: list[Resample] = []
    refusals: list[str] = []
    for axis in (0, 1):
        factor = float(factors[axis]) if factors else None
        growth, whole = _growth(call, axis, operand)
        window, refusal = None, ""
        if corners:
            refusal = call.sentence("align_corners=True makes weights depend on the image's size", "run programs")
        elif whole is None or (factor is not None and factor != whole):
            refusal = call.sentence(
                f"its factor is no whole number for every {AXES[axis]} of the image",
                "run programs, or use a scale_factor",
            )
        elif mode.startswith("nearest") and not nearest_is_exact(whole):
            refusal = call.sentence(f"float32 index arithmetic for factor {whole} depends on position", "run programs")
        else:
            kinds = {"bilinear": EnlargeBilinear, "bicubic": EnlargeBicubic}
            window = kinds.get(mode, EnlargeNearest)(factor=whole)
        refusals.append(refusal)
        rules.append(
            Resample(
                mode=mode,
                align_corners=corners,
                factor=factor,
                double=double,
                growth=growth,
                window=window,
                direct=_is_channels_last(operand),
            )
        )
    # torch computes source coordinates in float32: exact for powers of two, else rounded by up to 6e-8 of the position.
    factors_known = [rule.window.ratio for rule in rules if rule.window is not None]
    rounded = not double and mode in ("bilinear", "bicubic") and any(int(f) & (int(f) - 1) for f in factors_known)
    return Outcome(
        (2, 3),
        ((operand, rules[0], rules[1]),),
        largest_extent=LARGEST_ROUNDED if rounded else None,
        window_refusal=refusals[0] or refusals[1],
    )


def _is_channels_last(operand: Node) -> bool:
    """As torch chooses its kernel: few channels go by the other one."""
    value = operand.meta["val"]
    return value.ndim == 4 and expression_of(value.stride(1)) == 1 and int(value.shape[1]) > 3


def _growth(call: Call, axis: int, operand: Node) -> tuple[Fraction, int | None]:
    """Result's pixels for each of the operand in the limit, and the whole factor of every size, if there is one."""
    before = expression_of(operand.meta["val"].shape[2 + axis])
    after = expression_of(call.node.meta["val"].shape[2 + axis])
    giant = call.extents(axis)[-1]
    period = PERIOD * call.size_multiple
    steps = [call.size_at(axis, e, giant + period) - call.size_at(axis, e, giant) for e in (after, before)]
    if steps[0] < 1 or steps[1] < 1:
        call.refuse(
            f"its {AXES[axis]} does not follow the image's", "resample by a factor, or to another tensor's size"
        )
    ratios: set[Fraction] = set()
    for extent in call.extents(axis):
        small, large = call.size_at(axis, before, extent), call.size_at(axis, after, extent)
        if small > 0:  # below the network's smallest image there is nothing to enlarge
            ratios.add(Fraction(large, small))
    ratio = ratios.pop() if len(ratios) == 1 else None
    return Fraction(steps[0], steps[1]), int(ratio) if ratio is not None and ratio.denominator == 1 else None


# Cropping and padding ----------------------------------------------------------------------------------------------


def _size_growth(call: Call, axis: int, operand: Node, pixels: Pixels) -> Fraction:
    """Result's size for each pixel of the operand's, in the limit of large images; dimensions stay where they are."""
    giant, period = call.extents(axis)[-1], PERIOD * call.size_multiple
    after, before = (expression_of(node.meta["val"].shape[pixels.dims[axis]]) for node in (call.node, operand))
    steps = [call.size_at(axis, e, giant + period) - call.size_at(axis, e, giant) for e in (after, before)]
    if min(steps) < 1:
        call.refuse(f"its {AXES[axis]} does not follow the image's", "cut and pad by constants")
    return Fraction(*steps)


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
        step = int(call.arguments.get("step", 1) or 1)
        offset = 0 if start is None else call.constant_or_none(axis, start)
        if offset is None or offset < 0:
            place = expression_of(0 if start is None else start)
            if offset is not None:
                place = expression_of(operand.meta["val"].shape[pixels.dims[axis]]) + offset
            rules[axis] = Cut(
                start=place, symbol=call.symbols[axis], growth=_size_growth(call, axis, operand, pixels), step=step
            )
            refusal = call.sentence("its start depends on the image's size", "run programs, or crop by a constant")
            return Outcome(pixels.dims, ((operand, rules[0], rules[1]),), window_refusal=refusal)
        beyond = _cut_off(call, axis, operand, pixels, offset, step)
        rules[axis] = (
            Shift(offset=offset, beyond=beyond)
            if step == 1
            else Slide(extent=1, stride=step, padding=-offset, beyond=beyond)
        )
    return Outcome(pixels.dims, ((operand, rules[0], rules[1]),))


LARGEST_MIRRORED = 64
_MODES = {
    "aten.constant_pad_nd": "constant",
    "aten.reflection_pad2d": "reflect",
    "aten.replication_pad2d": "replicate",
    "aten._pad_circular": "circular",
}


@register_rule("aten.pad", *_MODES)
def pad_rule(call: Call) -> Outcome:
    operand, pixels = call.pixels()
    mode: Any = _MODES.get(call.name) or call.arguments.get("mode", "constant")
    if mode == "circular":
        call.refuse("circular padding brings pixels from the image's other side", "pad with zeros or by reflection")
    rank = len(operand.meta["val"].shape)
    amounts = list(call.arguments["pad" if "pad" in call.arguments else "padding"])
    rules: list[AxisRule] = [Same(), Same()]
    refusal = ""
    for pair, dim in enumerate(range(rank - 1, rank - 1 - len(amounts) // 2, -1)):
        axis = call.spatial_dim(dim, pixels.dims, rank)
        before, after = amounts[2 * pair : 2 * pair + 2]
        if axis is not None:
            first = call.constant_or_none(axis, before)
            if first is None:
                if mode != "constant":
                    call.refuse(f"its {mode} padding before the first pixel depends on the image's size", "pad behind")
                rules[axis] = Cut(
                    start=-expression_of(before),
                    symbol=call.symbols[axis],
                    growth=_size_growth(call, axis, operand, pixels),
                )
                refusal = call.sentence(
                    "its padding before the first pixel depends on the image's size", "run programs"
                )
                continue
            offset = -first
            beyond = _cut_off(call, axis, operand, pixels, offset)
            if mode == "constant":
                rules[axis] = Shift(offset=offset, beyond=beyond)
            else:
                behind = max(call.size_at(axis, expression_of(after), extent) for extent in call.extents(axis))
                if behind > LARGEST_MIRRORED:
                    call.refuse(f"its {mode} padding grows with the image", "pad by a constant")
                # Reflection takes pixel p from -p, and so far from the other edge too; repetition the edge itself.
                reach = max(-offset, behind, 0) * (2 if mode == "reflect" else 1)
                rules[axis] = Mirror(offset=offset, mode=mode, reach=reach, beyond=beyond)
        elif isinstance(before, Node) or isinstance(after, Node):
            call.refuse("it pads channels by the image's size", "use constants")
    return Outcome(pixels.dims, ((operand, rules[0], rules[1]),), window_refusal=refusal)
