"""identities.json of a training of faces: which class is whose, and what has changed since it was begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...models.faceid.base.errors import HeadError
from ...models.faceid.pictures.source import FaceSource, Roll
from ...tiler.base.errors import OutputError
from ...tiler.base.text import one_line, reason_of
from ...tiler.system.files import write_durably
from ...tiler.system.plain_file import open_plain
from ..base.console import count_of
from ..base.training_folder import TRAINING, read_training, require_same_training

ROLL = "identities.json"
_SHOWN = 10
"""New identities that are named."""


def read_roll(folder: Path) -> Roll | None:
    """Whose each class of a training is; None: no training, one of synthetic faces, or one that is older.

    Raises:
        HeadError: it is damaged.
    """
    path = folder / ROLL
    if not path.exists():
        return None
    try:
        with open_plain(path) as file:
            value = json.loads(file.read())
        lists = value["classes"], value["held_out"]
        if not all(isinstance(name, str) for names in lists for name in names):
            raise TypeError("a name is no text")
        return Roll(classes=lists[0], held_out=lists[1])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadError(f"{path} is damaged: {reason_of(error)}") from error


def write_roll(folder: Path, training: FaceSource, held_out: FaceSource | None) -> None:
    """Keep whose each class is; nothing is written where it stands there already."""
    roll = Roll(classes=list(training.names), held_out=list(held_out.names) if held_out is not None else [])
    if read_roll(folder) != roll:
        value = {"classes": roll.classes, "held_out": roll.held_out}
        write_durably(folder / ROLL, json.dumps(value, ensure_ascii=False, indent=0).encode() + b"\n")


def find_changes(out: Path, ours: dict[str, Any], step: int | None, *, grow: bool) -> tuple[list[str], dict[str, Any]]:
    """(what a training that goes on does otherwise than before, in words; the same as a note for training.json, empty
    where it does nothing otherwise). `steps` may be raised, and with `grow` identities and pictures may be added.

    Args:
        ours: the fingerprint of this call.
        step: of the newest generation; None: there is none.

    Raises:
        OutputError: the folder holds another training, or there is nothing to be grown.
    """
    found = read_training(out)
    if found is None:
        if grow:
            raise OutputError(f"--grow is of a training that is there, {out} holds none; leave it out")
        return [], {}
    theirs: dict[str, Any] = found.get("fingerprint", {})
    allowed = dict[str, Any]()
    said: list[str] = []
    if isinstance(before := theirs.get("steps"), int) and ours["steps"] > before:
        allowed |= {key: theirs.get(key) for key in ("steps", "warm_up")}
        said.append(
            f"{count_of(ours['steps'] - before, 'step')} more than before: learning rates go on as those of a training "
            f"of {ours['steps']} steps"
        )
    if grow and theirs.get("faces") != ours["faces"]:
        allowed["faces"] = theirs.get("faces")
    remedy = "choose another folder" if grow else "choose another folder, or add identities and pictures with --grow"
    same = {**ours, **allowed}
    require_same_training(out, same, remedy if theirs.get("faces") != ours["faces"] else "choose another folder")
    change = {key: [theirs.get(key), ours[key]] for key in allowed}
    return said, {"step": step or 0, **change} if change else {}


def note_change(out: Path, ours: dict[str, Any], change: dict[str, Any], data: dict[str, Any]) -> None:
    """Let training.json say what the training is from now on, and since when."""
    found = read_training(out)
    assert found is not None
    described = {**found, "fingerprint": ours, "data": data, "changes": [*found.get("changes", []), change]}
    write_durably(out / TRAINING, json.dumps(described, indent=1).encode() + b"\n")


def describe_growth(before: Roll | None, data: dict[str, Any], training: FaceSource) -> str:
    """What is new, in words.

    Args:
        before: the roll until now; None: of synthetic faces.
        data: what training.json says of the source until now.
    """
    known = len(before.classes) if before is not None else int(data["identities"])
    fresh = list(training.names[known:])
    shown = (
        f" ({one_line(', '.join(fresh[:_SHOWN]))}{' and others' if len(fresh) > _SHOWN else ''})"
        if before and fresh
        else ""
    )
    pictures = len(training) - int(data["samples"])
    changed = f"{count_of(pictures, 'picture')} more" if pictures >= 0 else f"{count_of(-pictures, 'picture')} fewer"
    new = f"{len(fresh)} new {'identity' if len(fresh) == 1 else 'identities'}{shown}"
    return (
        f"{new}, {changed}: {training.identities:,} identities, {len(training):,} pictures; rows of new ones are random"
    )
