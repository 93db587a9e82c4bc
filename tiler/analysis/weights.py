"""Whether a network's weights are still those that its graph was traced with, and which of their states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..base.errors import UsageError

if TYPE_CHECKING:
    from .network import Network

_OTHER_IN_TRAINING = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
"""Modules that compute something else in training mode."""


def weights_version(module: nn.Module) -> tuple[Any, ...]:
    """Another value after any of the module's weights was written to in place, by an optimiser or `load_state_dict`.

    torch counts writes, except those through `tensor.data`.
    """
    return tuple((id(tensor), tensor.data_ptr(), _writes(tensor)) for tensor in _tensors(module))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _writes(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def require_current(network: Network) -> None:
    """Refuse a module that is no longer what was analysed; weights that were written to in place are.

    Raises:
        UsageError: the module is in training mode, or weights were put in place of those of its graph.
    """
    for name, part in network.module.named_modules():
        if part.training and isinstance(part, _OTHER_IN_TRAINING):
            raise UsageError(
                f"the network must be in eval mode, as it was analysed, got its part {name!r} in training mode; "
                "call .eval() after training"
            )
    if not network.is_known:
        return
    own = {id(tensor) for tensor in _tensors(network.module)}
    for name, value in network.graph.program.state_dict.items():
        if isinstance(value, Tensor) and id(value) not in own:
            raise UsageError(
                f"the network's weights must be those that it was analysed with, but {name.removeprefix('module.')!r} "
                "was replaced since; call analyze_network again"
            )
