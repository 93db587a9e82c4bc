"""The method: windows, which run the module as it is, or programs, each of which computes one tile's part."""

from __future__ import annotations

from ..analysis.network import Network
from ..base.choices import Method, Precision
from ..base.errors import UntileableError, UsageError


def find_window_refusal(network: Network, shape_yx: tuple[int, int]) -> str:
    """Why windows of a raster of that shape cannot be run through the module; empty: they can."""
    refusal = network.window_refusal
    if not refusal and network.largest_extent is not None and max(shape_yx) > network.largest_extent:
        refusal = (
            f"bilinear upsampling by a factor other than 2, 4, 8, ... in float32 is exact up to "
            f"{network.largest_extent} pixels a side (torch rounds its source coordinates), the raster has "
            f"{max(shape_yx)}; run programs"
        )
    return refusal


def choose_method(
    network: Network, method: str | None, shape_yx: tuple[int, int], *, prefer: Method = "window"
) -> Method:
    """The method that is asked for, else the preferred one, else the one that is exact.

    Raises:
        UsageError: no such method.
        UntileableError: windows were asked for, but they cannot be exact.
    """
    if method not in (None, "auto", "window", "program"):
        raise UsageError(f"method must be auto, window or program, got {method!r}")
    refusal = find_window_refusal(network, shape_yx)
    if method == "window" and refusal:
        raise UntileableError(refusal)
    if method == "program" and network.program_refusal:
        raise UsageError(network.program_refusal)
    if method in ("window", "program"):
        return "program" if method == "program" else "window"
    if refusal:
        return "program"
    return "window" if network.program_refusal else prefer


def choose_fewer_bits_method(
    network: Network, method: str | None, shape_yx: tuple[int, int], precision: Precision
) -> Method:
    """Windows: one network of fixed ranges runs all of them, where each program would be quantised anew; and the start
    check has the same network for larger windows.

    Raises:
        UsageError: programs were asked for.
        UntileableError: windows cannot be exact.
    """
    if method == "program":
        raise UsageError(
            f"precision {precision} runs windows, got --method program; leave it out, or use --precision float32"
        )
    if not network.is_known:
        raise UsageError(
            f"a halo that is only stated is checked in float32, got --precision {precision}; use --precision float32"
        )
    refusal = find_window_refusal(network, shape_yx)
    if refusal:
        raise UntileableError(f"precision {precision} runs windows, use --precision float32: {refusal}")
    return choose_method(network, "window", shape_yx)
