"""Weights: state dicts from files, fitted to a network."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ...tiler.graph import first_line
from .factory import importing_from_here
from .trust import ModelFile, ModelFileError, Trust

PICKLE_REASON = "it holds pickled Python objects"

_NESTED = ("state_dict", "model_state_dict", "model")
"""Where training programs keep the weights in a checkpoint."""
_PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DistributedDataParallel, trainers and torch.compile put before every name."""


def read_pickle(file: ModelFile, trust: Trust) -> Any:
    """What torch.save wrote: tensors and plain containers always, other objects only with leave.

    Raises:
        ModelFileError: a damaged file, or one that could run code.
    """
    try:
        return torch.load(file.open(), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass
    except Exception as error:  # what a damaged pickle makes torch stumble over
        raise ModelFileError(f"{file} is damaged: {first_line(error)}") from error
    trust.require_file(file, PICKLE_REASON)
    with importing_from_here(), warnings.catch_warnings():
        # torch warns of sources that have changed since; the weights decide.
        warnings.simplefilter("ignore")
        try:
            return torch.load(file.open(), map_location="cpu", weights_only=False)
        except Exception as error:
            raise ModelFileError(
                f"{file} cannot be unpickled ({type(error).__name__}: {first_line(error)}); its classes must be "
                "installed, or stand in the current folder"
            ) from error


def is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in value.items())
    )


def find_network(value: object) -> nn.Module | None:
    """A network that was saved whole, by itself or in a checkpoint."""
    if isinstance(value, Mapping):
        value = value.get("model")
    return value if isinstance(value, nn.Module) else None


def find_state(value: object) -> Mapping[str, Tensor] | None:
    """The state dict in what a file held: by itself, in a checkpoint, or of a network that was saved whole."""
    network = find_network(value)
    if network is not None:
        return network.state_dict()
    candidates = [value, *(value.get(key) for key in _NESTED)] if isinstance(value, Mapping) else []
    return next((candidate for candidate in candidates if is_state_dict(candidate)), None)


def read_state(file: ModelFile, trust: Trust) -> Mapping[str, Tensor]:
    """The state dict of a .safetensors file or of what torch.save wrote; it holds one tensor at least.

    Raises:
        ModelFileError: a file without one, a damaged one, or one that could run code.
    """
    if file.content == "safetensors":
        try:
            state = load_safetensors(file.data)
        except Exception as error:  # of its reader in Rust, and of torch for kinds of numbers that it lacks
            raise ModelFileError(f"{file} is damaged: {first_line(error)}") from error
        if not state:
            raise ModelFileError(f"{file} holds no tensors; give the weights of a network")
        return state
    if file.content != "pickle":
        raise ModelFileError(f"{file} holds a whole network ({file.content}), not weights; give it as the model itself")
    state = find_state(read_pickle(file, trust))
    if state is None:
        raise ModelFileError(
            f"{file} holds no state dict; write one: torch.save(network.state_dict(), {file.path.name!r})"
        )
    return state


def _without_prefixes(state: Mapping[str, Tensor], wanted: set[str]) -> Mapping[str, Tensor]:
    """The state dict, its keys without a common prefix if only so they are the wanted ones."""
    bare = state
    while bare and set(bare) != wanted:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in bare)), None)
        if prefix is None:
            return state
        bare = {key.removeprefix(prefix): value for key, value in bare.items()}
    return bare


def require_fit(network: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> Mapping[str, Tensor]:
    """The state dict under the network's own names; of a network on torch's meta device nothing is allocated.

    Args:
        path: where it comes from.
        what: what the network comes from, for the message.

    Raises:
        ModelFileError: keys or shapes that do not fit.
    """
    own = network.state_dict()
    state = _without_prefixes(state, set(own))
    complaints = [
        f"{verb} {len(names)} tensor{'s' * (len(names) > 1)} such as {min(names)}"
        for verb, names in (("it lacks", set(own) - set(state)), ("the network lacks", set(state) - set(own)))
        if names
    ]
    complaints += [
        f"{name} is {' x '.join(map(str, state[name].shape)) or 'a number'} there and "
        f"{' x '.join(map(str, value.shape)) or 'a number'} in the network"
        for name, value in own.items()
        if name in state and isinstance(value, Tensor) and value.shape != state[name].shape
    ][:1]
    if complaints:
        raise _misfit(path, what, "; ".join(complaints))
    return state


def _misfit(path: Path, what: str, complaint: str) -> ModelFileError:
    return ModelFileError(f"{path} does not hold the weights that {what} describes: {complaint}")


def fit_state(network: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load a state dict into a network, key for key, as `require_fit` has it."""
    state = require_fit(network, state, path, what)
    try:
        network.load_state_dict(state)
    except Exception as error:  # hooks of the user's module
        raise _misfit(path, what, first_line(error)) from error
