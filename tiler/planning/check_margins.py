"""How much further than it must the start check looks, and what that takes of memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..analysis.axis_geometry import compute_geometry
from ..analysis.network import Network
from ..base.choices import Method
from ..base.geometry import Window
from .check_windows import PATCH, larger_core, larger_window
from .work import count_program_bytes

CHECK_FACTOR = 2
"""Of the live bytes of the start check's windows, which torch runs there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckMargin:
    """How much further than it must the start check looks, in input pixels, and the live bytes of that."""

    margin: int
    live_bytes: int


def check_margins(network: Network, method: Method, shape_yx: tuple[int, int]) -> tuple[CheckMargin, CheckMargin]:
    """The least, a stride, and what is wanted, a halo more."""
    height, width = network.output_shape(shape_yx)
    side = min(PATCH, height), min(PATCH, width)
    patch = Window(y=(height - side[0]) // 2, x=(width - side[1]) // 2, height=side[0], width=side[1])
    if method == "window":
        halo = max(network.halo.top, network.halo.bottom, network.halo.left, network.halo.right)
        step = max(network.stride)
    else:
        halo, step = 0, 1
        for axis, core, scale in zip(
            network.on_image(shape_yx), (patch.rows, patch.columns), network.scale, strict=True
        ):
            read = compute_geometry(axis, core).window
            halo = max(halo, int(core.start / scale) - read.start, read.stop - int(core.stop / scale))

    def reach(margin: int) -> CheckMargin:
        if method == "program":
            live = count_program_bytes(network, shape_yx, larger_core(network, patch, shape_yx, margin))
        else:
            # Every other patch is looked at from one stride further.
            live = network.count_live_bytes(larger_window(network, patch, shape_yx, margin + step).shape)
        return CheckMargin(margin=margin, live_bytes=live)

    return reach(step), reach(halo + step)
