"""Checkpoints of a training: tensors as safetensors, the rest as JSON, found whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ....tiler.base.errors import OutputError
from ....tiler.system.files import MOST_TEXT, read_regular, use_default_mode, write_durably

NAME = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """All that a training needs to go on."""

    step: int
    """Steps that were made."""
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    """Plain JSON values."""


def save_state(folder: Path, state: TrainingState) -> None:
    """Write FOLDER/state-STEP.safetensors, then FOLDER/state.json, which names it with its hash; then the older go.

    Whatever moment the process dies at, state.json names tensors that are whole.
    """
    name = f"state-{state.step:08d}.safetensors"
    fresh = folder / f".{name}.new"
    try:
        save_file({key: tensor.detach().contiguous().clone() for key, tensor in state.tensors.items()}, fresh)
        use_default_mode(fresh)
        with fresh.open("rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        fresh.replace(folder / name)
        described = {"step": state.step, "tensors": name, "sha256": digest, "values": dict(state.values)}
        write_durably(folder / NAME, json.dumps(described, indent=1).encode() + b"\n")
        for other in [*folder.glob("state-*.safetensors"), *folder.glob(".state-*.new")]:
            if other.name != name:
                with suppress(OSError):
                    other.unlink()
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} cannot be written: {error}; when it can, the same command goes on") from error


def load_state(folder: Path) -> TrainingState | None:
    """The last state that was saved; None where there is none.

    Raises:
        OutputError: damaged files.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        described = json.loads(read_regular(path, MOST_TEXT))
        tensors = folder / str(described["tensors"])
        data = read_regular(tensors)
        digest = hashlib.sha256(data).hexdigest()
        if digest != described["sha256"]:
            raise OutputError(
                f"{tensors} is damaged: its sha256 is {digest}, not {described['sha256']}; --overwrite begins anew"
            )
        return TrainingState(step=int(described["step"]), tensors=load(data), values=dict(described["values"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise OutputError(f"the state in {folder} cannot be read: {error}; --overwrite begins anew") from error
