"""Probes: what a network shows when it runs on a small image."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ....tiler.base.text import first_line
from .ending import Ending, watch
from .exported import ExportedNetwork
from .meaning import Meaning, Statement, decide_meaning
from .trust import ModelFileError

_PROBE_SIZES = ((64, 64), (256, 256), (331, 293))
"""Multiples of every stride there is, larger ones for deep networks, and odd ones."""
_BRIGHTNESS = (-1e6, -1e3, -30.0, 30.0, 1e3, 1e6)
"""Largest values of further images: what is bounded for all of them is bounded by the network."""
_HALF = (torch.float16, torch.bfloat16)


def network_dtype(network: nn.Module) -> torch.dtype:
    """Type of the numbers that a network computes in, which its input must have: float32 where it has no weights."""
    if isinstance(network, ExportedNetwork):
        return network.dtype
    tensors = [*network.parameters(), *network.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def require_full_precision(network: nn.Module, name: str) -> None:
    """
    Raises:
        ModelFileError: a network in half precision, with what helps.
    """
    dtype = network_dtype(network)
    if dtype in _HALF:
        raise ModelFileError(
            f"the network of {name} holds {str(dtype).removeprefix('torch.')} weights, and scaled pixels are float32; "
            "call .float() on it before it is saved (--precision then chooses what it computes in)"
        )


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
    found = _watch_small(network, bands)
    return found if isinstance(found, Exception) else found[0]


def _watch_small(network: nn.Module, bands: int) -> tuple[Any, Ending, Tensor] | Exception:
    """(result, what it ends in, the image)."""
    failure: Exception | None = None
    for size in _PROBE_SIZES:
        image = torch.rand((1, bands, *size), generator=torch.Generator().manual_seed(0)).to(network_dtype(network))
        try:
            return (*watch(network, image.clone()), image)
        except Exception:  # noqa: BLE001 - what cannot be watched may still run
            pass
        try:
            with torch.no_grad():
                return network(image.clone()), Ending(kind="other"), image
        except Exception as error:  # noqa: BLE001 - any failure of the user's module is the answer
            failure = failure or error
    assert failure is not None
    return failure


def with_channel(result: Tensor) -> Tensor:
    """(1, 1, height, width) of a result (1, height, width), whose only channel was left out, as an argmax does."""
    return result[:, None] if result.dim() == 3 else result


def find_meaning(network: nn.Module, bands: int, name: str, stated: Statement) -> Meaning:
    """What the network's values mean: as it is said, else as a small run of it tells.

    Raises:
        ModelFileError: a network that fails on images of that many bands, gives anything but one image, or cannot mean
            what is said.
    """
    require_full_precision(network, name)
    if any(module.training for module in network.modules()):
        # A look must not move the statistics of a network that is being trained.
        network = copy.deepcopy(network).eval()
    found = _watch_small(network, bands)
    if isinstance(found, Exception):
        raise ModelFileError(
            f"the network of {name} fails on images of {bands} bands ({type(found).__name__}: {first_line(found)}); "
            "name as many bands as it takes"
        ) from found
    result, ending, image = found
    if not isinstance(result, Tensor) or result.dim() not in (3, 4) or result.shape[0] != 1:
        what = f"a tensor of {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ModelFileError(
            f"the network of {name} must give one tensor (1, classes, height, width), it gives {what}; "
            "wrap it in a module that picks the tensor"
        )
    if result.dtype.is_complex:
        raise ModelFileError(f"the network of {name} gives complex numbers; end it with .abs() or .real")
    samples = [with_channel(result)]
    if ending.kind in ("other", "softmax") and stated.activation is None and stated.task != "regression":
        samples += [with_channel(sample) for sample in _run_bright(network, image)]
    return decide_meaning(ending, samples, stated, name)


def _run_bright(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Results for images of very different brightness, those left out that the network refuses."""
    results: list[Tensor] = []
    for most in _BRIGHTNESS:
        with torch.no_grad(), suppress(Exception):
            results.append(network((image - 0.5 * (most < 0)) * abs(most)))
    return results


def same_result(expected: Tensor, found: Tensor) -> bool:
    """Whether two results are equal to rounding."""
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-4, atol=1e-5, equal_nan=True)
