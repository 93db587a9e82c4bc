"""Weights that are numbers: of NaN and infinity engines make different classes, and none of them means anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .trust import ModelFileError

_STATISTICS = ("running_mean", "running_var")


def require_finite_weights(network: nn.Module, name: str) -> None:
    """
    Args:
        name: of the model.

    Raises:
        ModelFileError: names the first tensor that holds NaN or infinity. Buffers may hold infinity, as masks do.
    """
    for key, value in network.named_parameters():
        if not _is_sound(value, takes_infinity=False):
            raise _refuse(name, key)
    for key, value in network.named_buffers():
        if not _is_sound(value, takes_infinity=not key.endswith(_STATISTICS)):
            raise _refuse(name, key)


def _is_sound(value: Tensor, *, takes_infinity: bool) -> bool:
    if is_lazy(value) or value.is_meta or value.layout != torch.strided or not value.numel():
        return True
    found = torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach()
    if not found.is_floating_point() or found.dtype.itemsize == 1:
        return True
    # Of any NaN both are NaN; no mask of a large tensor lies in memory.
    ends = torch.stack(torch.aminmax(found))
    return not bool(ends.isnan().any()) if takes_infinity else bool(ends.isfinite().all())


def _refuse(name: str, key: str) -> ModelFileError:
    return ModelFileError(
        f"the weights of {name} must be finite, {key} holds NaN or infinity; give those of an earlier step"
    )
