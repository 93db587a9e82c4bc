"""Weights: state dicts from files, fitted to a network."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...tiler.graph import first_line
from .factory import importing_from_here
from .trust import ModelFileError, Trust, content_of, open_trusted

PICKLE_REASON = "it holds pickled Python objects"

_NESTED = ("state_dict", "model_state_dict", "model")
"""Where training programs keep the weights in a checkpoint."""
_PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DistributedDataParallel, trainers and torch.compile put before every name."""


def read_pickle(path: Path, trust: Trust) -> Any:
    """What torch.save wrote: tensors and plain containers always, other objects only with leave.

    Raises:
        ModelFileError: a damaged file, or one that could run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} is damaged: {first_line(error)}") from error
    with open_trusted(path, trust, PICKLE_REASON) as file, importing_from_here(), warnings.catch_warnings():
        # torch warns of sources that have changed since; the weights decide.
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=False)
        except Exception as error:
            raise ModelFileError(
                f"{path} cannot be unpickled ({type(error).__name__}: {first_line(error)}); its classes must be "
                "installed, or stand in the current folder"
            ) from error


def is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


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


def read_state(path: Path, trust: Trust) -> Mapping[str, Tensor]:
    """The state dict of a .safetensors file or of what torch.save wrote.

    Raises:
        ModelFileError: a file without one, a damaged one, or one that could run code.
    """
    content = content_of(path)
    if content == "safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelFileError(f"{path} is damaged: {first_line(error)}") from error
    if content != "pickle":
        raise ModelFileError(f"{path} holds a whole network ({content}), not weights; give it as the model itself")
    state = find_state(read_pickle(path, trust))
    if state is None:
        raise ModelFileError(
            f"{path} holds no state dict; write one: torch.save(network.state_dict(), {str(path.name)!r})"
        )
    return state


def _without_prefixes(state: Mapping[str, Tensor], wanted: set[str]) -> Mapping[str, Tensor]:
    """The state dict, its keys without a common prefix if only so they are the wanted ones."""
    bare = state
    while set(bare) != wanted:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in bare)), None)
        if prefix is None:
            return state
        bare = {key.removeprefix(prefix): value for key, value in bare.items()}
    return bare


def fit_state(network: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load a state dict into a network, key for key.

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
    if not complaints:
        try:
            network.load_state_dict(state)
        except Exception as error:  # noqa: BLE001 - hooks of the user's module
            complaints = [first_line(error)]
    if complaints:
        raise ModelFileError(f"{path} does not hold the weights that {what} describes: {'; '.join(complaints)}")
