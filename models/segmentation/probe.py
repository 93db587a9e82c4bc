"""Probes: what a network shows when it runs on a small image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...tiler.graph import first_line
from .exported import ExportedNetwork
from .trust import ModelFileError

_PROBE_SIZES = ((64, 64), (256, 256), (331, 293))
"""Multiples of every stride there is, larger ones for deep networks, and odd ones."""


def guess_bands(network: nn.Module) -> int | None:
    """Bands of an exported program, or of the first convolution whose number of bands the network runs on; else None.

    The convolution that was made first need not be the one that runs first.
    """
    if isinstance(network, ExportedNetwork):
        return network.bands
    counts = dict.fromkeys(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    return next((count for count in counts if not isinstance(run_small(network, count), Exception)), None)


def run_small(network: nn.Module, bands: int) -> Tensor | Exception:
    """What the network gives for a small image of that many bands, or why it gives nothing."""
    failure: Exception | None = None
    for size in _PROBE_SIZES:
        try:
            with torch.no_grad():
                return network(torch.rand((1, bands, *size), generator=torch.Generator().manual_seed(0)))
        except Exception as error:  # noqa: BLE001 - any failure of the user's module is the answer
            failure = failure or error
    assert failure is not None
    return failure


def count_channels(network: nn.Module, bands: int, name: str) -> int:
    """Channels of the network's output.

    Raises:
        ModelFileError: a network that fails on images of that many bands, or gives anything but one image.
    """
    result = run_small(network, bands)
    if isinstance(result, Exception):
        raise ModelFileError(
            f"the network of {name} fails on images of {bands} bands ({type(result).__name__}: {first_line(result)}); "
            "name as many bands as it takes"
        ) from result
    if not isinstance(result, Tensor) or result.dim() != 4:
        found = f"a tensor of {result.dim()} dimensions" if isinstance(result, Tensor) else type(result).__name__
        raise ModelFileError(
            f"the network of {name} must give one tensor (1, classes, height, width), it gives {found}; "
            "wrap it in a module that picks the tensor"
        )
    return int(result.shape[1])


def same_result(expected: Tensor, found: Tensor) -> bool:
    """Whether two results are equal to rounding."""
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-4, atol=1e-5, equal_nan=True)
