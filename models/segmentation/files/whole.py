"""Files that hold a whole network: what stands in them says how they are read, not their suffix."""

from __future__ import annotations

from torch import nn

from ..networks.exported import load_exported, load_script
from ..networks.trust import ModelFile, ModelFileError, Trust
from .state import find_network, find_states, read_pickle


def load_network(file: ModelFile, trust: Trust, key: str | None = None) -> nn.Module:
    """A network from a file that holds all of it.

    Args:
        key: of one of several in a checkpoint.
    """
    if file.content == "torch.export":
        return load_exported(file, trust)
    if file.content == "TorchScript":
        return load_script(file, trust)
    value = read_pickle(file, trust) if file.content == "pickle" else None
    network = find_network(value, file.path, key)
    if network is not None:
        return network.eval()
    if file.content == "pickle" and not find_states(value):
        raise ModelFileError(f"{file} holds no network, but {type(value).__name__}; save one with torch.save")
    raise ModelFileError(
        f"{file} holds weights only; name what builds the network too: --model package.module:factory --weights {file}"
    )


class WholeNetwork:
    """The kind of the files that torch writes."""

    runs_code = ""
    """Some do and some do not: `load` asks for each content by itself."""

    @staticmethod
    def load(file: ModelFile, trust: Trust, key: str | None) -> nn.Module:
        """`load_network`."""
        return load_network(file, trust, key)
