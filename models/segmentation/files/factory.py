"""Factories: "package.module:name", what builds a network."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
from torch import nn

from ....tiler.base.text import first_line
from ..networks.model import SegmentationModel
from ..networks.trust import ModelFileError

_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


def is_factory(text: str) -> bool:
    """Whether a text has the form package.module:name."""
    return re.fullmatch(f"{_NAME}:{_NAME}", text) is not None


@contextmanager
def importing_from_here() -> Iterator[None]:
    """While open, modules of the current folder can be imported, as with `python -m`.

    Workers run elsewhere and cannot import them, so that what is sent there carries their code along.
    """
    here = str(Path.cwd())
    before = set(sys.modules)
    sys.path.insert(0, here)
    # A module written a moment ago is not in the finders' caches.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(here)
        # Not this package, which workers have, though a clone of it may lie in the current folder.
        ours = __name__.partition(".")[0]
        for name in sorted({loaded.partition(".")[0] for loaded in set(sys.modules) - before} - {ours}):
            module = sys.modules.get(name)
            places = [*getattr(module, "__path__", []), getattr(module, "__file__", None) or ""]
            if module is not None and here in {str(Path(place).parent) for place in places if place}:
                cloudpickle.register_pickle_by_value(module)


def build_network(factory: str, hyperparameters: Mapping[str, Any]) -> nn.Module | SegmentationModel:
    """What the factory returns for these keyword arguments. Runs its code: ask `Trust` first, or be named by the user.

    Raises:
        ModelFileError: a factory that cannot be imported or called, or that returns something else.
    """
    module_name, _, name = factory.partition(":")
    with importing_from_here():
        try:
            found: Any = importlib.import_module(module_name)
            for part in name.split("."):
                found = getattr(found, part)
        except Exception as error:
            raise ModelFileError(
                f"{factory} cannot be imported ({type(error).__name__}: {first_line(error)}); "
                "name an installed module, or one of the current folder"
            ) from error
        try:
            built = found(**hyperparameters)
        except Exception as error:
            given = ", ".join(f"{key}={value!r}" for key, value in hyperparameters.items())
            raise ModelFileError(
                f"{factory}({given}) failed ({type(error).__name__}: {first_line(error)}); "
                "it must build the network from these arguments"
            ) from error
    if not isinstance(built, nn.Module | SegmentationModel):
        raise ModelFileError(
            f"{factory} must return a torch.nn.Module or a SegmentationModel, got {type(built).__name__}"
        )
    return built
