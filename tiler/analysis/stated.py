"""Modules that cannot be traced, run on windows whose halo their user states; the start check decides."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..base.errors import UntileableError, UntraceableError, UsageError
from ..base.geometry import Halo, Interval, align_up
from ..base.text import first_line
from ..system.process_locks import TRACING
from .graph import LARGEST_MULTIPLE, find_accepted_sizes, shows_logits
from .network import Network, analyze_network, torch_dtype
from .receptive import footprint

STRIDE = 64
"""Windows start on multiples of this unless told otherwise: all networks that halve up to six times keep it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedNetwork(Network):
    """A module of unknown inside. Its only guarantee is the start check's: sampled tiles agree with larger windows."""

    stated_halo: int
    stated_stride: int
    stated_scale: tuple[Fraction, Fraction]
    stated_multiple: int
    stated_logits: bool
    _outputs: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        stated = partial(state_network, halo=self.stated_halo, stride=self.stated_stride)
        return stated, (self.module, self.bands, self.dtype)

    @property
    def has_logits(self) -> bool:
        return self.stated_logits

    @property
    def stride(self) -> tuple[int, int]:
        return (self.stated_stride, self.stated_stride)

    @property
    def scale(self) -> tuple[Fraction, Fraction]:
        return self.stated_scale

    @property
    def size_multiple(self) -> int:
        return self.stated_multiple

    @property
    def smallest(self) -> tuple[int, int]:
        return (1, 1)

    @property
    def halo(self) -> Halo:
        return Halo(top=self.stated_halo, bottom=self.stated_halo, left=self.stated_halo, right=self.stated_halo)

    @property
    def program_refusal(self) -> str:
        return "programs need a traced network, and this one's halo is only stated; leave --method out"

    def output_shape(self, shape_yx: tuple[int, int]) -> tuple[int, int]:
        """From a small image whose size leaves the same rest: beyond it the output grows by the scale."""
        padded = self.padded_shape(shape_yx)
        small = tuple(min(extent, 2 * self.stated_stride + extent % self.stated_stride) for extent in padded)
        key = (small[0], small[1])
        if key not in self._outputs:
            result = _run(self.module, self.bands, key, self.dtype)
            self._outputs[key] = (int(result.shape[2]), int(result.shape[3]))
        sides: list[int] = []
        for axis, (extent, known) in enumerate(zip(padded, small, strict=True)):
            given = self._outputs[key][axis] + int((extent - known) * self.scale[axis])
            sides.append(min(given, int(-(-shape_yx[axis] * self.scale[axis] // 1))))
        return (sides[0], sides[1])

    def needed_interval(self, axis: int, wanted: Interval) -> Interval:
        under = footprint(wanted, self.scale[axis])
        return Interval(start=under.start - self.stated_halo, stop=under.stop + self.stated_halo)

    def count_flops(self, shape_yx: tuple[int, int]) -> int:
        """As many for each pixel as on a small image."""
        return round(_flops_per_pixel(self.module, self.bands, self.stated_stride, self.dtype) * np.prod(shape_yx))

    def count_live_bytes(self, shape_yx: tuple[int, int]) -> int:
        """Four bytes for each pixel and band: the unit in which the probe measures what the module really takes."""
        return 4 * self.bands * shape_yx[0] * shape_yx[1]

    @property
    def weight_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.module.state_dict().values())

    @property
    def is_known(self) -> bool:
        return False


def state_network(
    module: nn.Module,
    bands: int,
    dtype: torch.dtype | np.dtype[Any] | str | None,
    *,
    halo: int,
    stride: int | None = None,
) -> StatedNetwork:
    """A module that cannot be traced as a network, with the halo that its user states.

    Args:
        module: as for `analyze_network`.
        halo: pixels around a core that its result depends on.
        stride: windows start on multiples of it, and it must be a multiple of the module's own stride; None: 64.

    Raises:
        UsageError: the module can be traced, so that its halo is known; a negative halo; a stride below 1.
        UntileableError: it is known that no halo makes the module exact, or it does not map images to images.
    """
    if halo < 0 or (stride is not None and stride < 1):
        raise UsageError(f"halo must be >= 0 and its stride >= 1, got {halo} and {stride}")
    try:
        known = analyze_network(module, bands, dtype)
    except UntraceableError:
        pass
    else:
        raise UsageError(f"this network can be traced, and its halo is {known.halo}; leave --halo out")
    found = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype is not None:
        found = dtype if isinstance(dtype, torch.dtype) else torch_dtype(np.dtype(dtype))
    with TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        multiple, accepted = find_accepted_sizes(module, bands, found)
        step = lcm(stride or STRIDE, multiple)
        small, large = (_run(module, bands, (side, side), found) for side in (2 * step, 3 * step))
        logits = shows_logits(module, torch.zeros((1, bands, *accepted), dtype=found))
        scale = (Fraction(large.shape[2] - small.shape[2], step), Fraction(large.shape[3] - small.shape[3], step))
    if small.shape[0] != 1 or min(scale) <= 0 or any((step * s).denominator != 1 for s in scale):
        raise UntileableError(
            f"the network must map (1, {bands}, height, width) to (1, channels, height * scale, width * scale), got "
            f"{tuple(small.shape)} for {2 * step} and {tuple(large.shape)} for {3 * step} pixels a side"
        )
    multiple = _find_whole_multiple(module, bands, found, scale, multiple, 2 * step)
    return StatedNetwork(
        module=module,
        graph=None,  # pyright: ignore[reportArgumentType] - there is none; what needs one is overridden above
        axes=(),  # pyright: ignore[reportArgumentType]
        pixels={},
        bands=bands,
        dtype=found,
        channels=int(small.shape[1]),
        output_dtype=small.dtype,
        stated_halo=halo,
        stated_stride=lcm(step, multiple),
        stated_scale=scale,
        stated_multiple=multiple,
        stated_logits=logits,
    )


def _find_whole_multiple(
    module: nn.Module,
    bands: int,
    dtype: torch.dtype,
    scale: tuple[Fraction, Fraction],
    multiple: int,
    first: int,
) -> int:
    """As `sizes.find_whole_multiple`, by running the module on images a little larger than `first`, a multiple of its
    stride; `multiple` itself where none gives whole results."""

    def fits(k: int) -> bool:
        start = align_up(first, k)
        for down, across in ((1, 2), (2, 3), (3, 5), (5, 7), (7, 1)):
            size = (start + k * down, start + k * across)
            try:
                given = _run(module, bands, size, dtype).shape[2:]
            except UntileableError:
                return False
            if any(abs(g - n * s) >= 1 for g, n, s in zip(given, size, scale, strict=True)):
                return False
        return True

    return next((k for k in range(multiple, LARGEST_MULTIPLE + 1, multiple) if fits(k)), multiple)


def _run(module: nn.Module, bands: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    try:
        with torch.no_grad():
            result = module(torch.zeros((1, bands, *size), dtype=dtype))
    except Exception as error:
        raise UntileableError(
            f"the network fails on an image of {size[0]} x {size[1]} pixels ({first_line(error)}); "
            "give a module that takes every size, or sizes divisible by some k up to 64"
        ) from error
    if not isinstance(result, Tensor) or result.ndim != 4:
        raise UntileableError(
            "the network must return one tensor (1, channels, height, width); wrap it so that it does"
        )
    return result


@cache
def _flops_per_pixel(module: nn.Module, bands: int, stride: int, dtype: torch.dtype) -> float:
    side = align_up(256, stride)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(torch.zeros((1, bands, side, side), dtype=dtype))
    return counter.get_total_flops() / side**2
