"""`face train --init`: the weights that a training starts from, of another training or of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.faceid.base.errors import HeadError
from ...models.faceid.embedder.file import EmbedderDescription, load_embedder
from ...models.faceid.layer.checkpoint import Generation, list_generations
from ...models.faceid.layer.head import ShardedMarginHead
from ...models.faceid.layer.tablet_file import FileSum, file_name, read_tablet
from ...models.faceid.layer.tablets import TabletLayout
from ...models.segmentation.files.state import States, fit_state, read_states
from ...models.segmentation.networks.trust import Trust, read_model_file
from ...tiler.base.errors import UsageError
from ...tiler.base.text import one_line
from ..base.console import count_of
from ..base.training_folder import read_training
from .roll import read_roll
from .sources import SYNTHETIC


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """Of an embedder, and the rows of identities."""

    path: Path
    source: str
    """Where they were found."""
    sha256: str
    """Of the embedder's weights, as they are saved."""
    states: States
    description: EmbedderDescription | None
    """None: of a file, which does not say."""
    generation: Generation | None
    names: list[str] | None
    """Whose the generation's rows are, by number; None: it does not say, or there are none."""

    def to_fingerprint(self) -> dict[str, str]:
        return {"source": str(self.path), "sha256": self.sha256}


def open_initial(path: Path) -> InitialWeights:
    """Read what a training starts from: the newest generation of a training's folder, one of its generations, or a file
    with the embedder's weights (.safetensors, or a state dict by torch.save).

    Raises:
        UsageError: there is nothing.
        GalleryError, ModelFileError: it is damaged, or something else.
    """
    if path.is_dir():
        embedder = load_embedder(path)
        folder = Path(embedder.source)
        generation = next(g for g in list_generations(folder.parent) if g.folder.name == folder.name)
        return InitialWeights(
            path=path,
            source=embedder.source,
            sha256=embedder.sha256,
            states={"": embedder.model.state_dict()},
            description=embedder.description,
            generation=generation,
            names=_names_of(folder.parent, int(generation.manifest["classes"])),
        )
    if not path.is_file():
        raise UsageError(
            f"--init must be the folder of a training of faces, or a file of weights, got {path}: "
            f"{'no file' if path.exists() else 'no such file or folder'}"
        )
    file = read_model_file(path)
    return InitialWeights(
        path=path,
        source=str(path),
        sha256=file.sha256,
        states=read_states(file, Trust()),
        description=None,
        generation=None,
        names=None,
    )


def _names_of(training: Path, classes: int) -> list[str] | None:
    """Whose the rows of a generation are, which may have fewer than the training has by now."""
    found = read_training(training)
    if found is None:
        return None
    fingerprint, source = found["fingerprint"], str(found["data"]["source"])
    if source.startswith(SYNTHETIC):
        return [f"synthetic {fingerprint['seed']} {number}" for number in range(classes)]
    roll = read_roll(training)
    return list(roll.classes[:classes]) if roll is not None else None


def require_fit(initial: InitialWeights, model: nn.Module, description: EmbedderDescription) -> None:
    """Refuse weights of another network.

    Raises:
        UsageError: names what differs; weights that are not finite.
        ModelFileError: tensors that lack, are too many, or have another shape.
    """
    theirs = initial.description
    if theirs is not None:
        for name, option in (("architecture", "--network"), ("dim", "--dim")):
            if getattr(theirs, name) != getattr(description, name):
                raise UsageError(
                    f"--init {initial.path} has {name} {getattr(theirs, name)}, this training "
                    f"{getattr(description, name)}; give {option} {getattr(theirs, name)}"
                )
    tensors = {name: value for state in initial.states.values() for name, value in state.items()}
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise UsageError(f"--init {initial.path} must hold finite weights, {bad[0]} has others")
    place = Path(initial.source)
    fit_state(model, initial.states, place, f"--network {description.architecture}", exact=True)


def load_rows(head: ShardedMarginHead, initial: InitialWeights, names: list[str], source: str) -> list[str]:
    """Give identities the rows that they have in a training, on the rank that owns them; the names of those that have
    none there, which keep their first rows.

    Args:
        names: of the layer's classes.
        source: of this training. Labels that are numbers mean the same persons in the same source alone.

    Raises:
        HeadError: rows are damaged, or have another length.
    """
    generation = initial.generation
    if generation is None or initial.names is None:
        return names
    there = {name: number for number, name in enumerate(initial.names)}
    training = read_training(generation.folder.parent)
    if training is not None and training["data"]["source"] != source:
        there = {name: number for name, number in there.items() if not name.isdecimal()}
    wanted = torch.tensor([there.get(name, -1) for name in names], dtype=torch.int64)
    if bool((wanted >= 0).any()):
        _copy_rows(head, generation, wanted)
    return [name for name in names if name not in there]


def _copy_rows(head: ShardedMarginHead, generation: Generation, wanted: Tensor) -> None:
    manifest: dict[str, Any] = generation.manifest
    if manifest["dim"] != head.dim:
        raise HeadError(f"{generation.folder} has rows of {manifest['dim']} numbers, the layer of {head.dim}")
    layout = TabletLayout(
        classes=int(manifest["classes"]), tablet_rows=int(manifest["tablet_rows"]), block_rows=head.layout.block_rows
    )
    storage = getattr(torch, manifest["storage"])
    state_dtype = getattr(torch, manifest.get("state_dtype", manifest["storage"]))
    for index in range(layout.count):
        tablet = layout.tablet(index)
        targets = [(own, rows, wanted[own.first : own.stop] - tablet.first) for own, rows in head.own_rows()]
        targets = [
            (own, rows, places) for own, rows, places in targets if bool(((places >= 0) & (places < tablet.rows)).any())
        ]
        if not targets:
            continue
        there = torch.empty((tablet.rows, head.dim), dtype=storage)
        state = torch.empty((tablet.rows, int(manifest["state_width"])), dtype=state_dtype)
        read_tablet(generation.folder, tablet, there, state, FileSum(**manifest["files"][file_name(tablet)]))
        for own, rows, places in targets:
            mine = ((places >= 0) & (places < tablet.rows)).nonzero()[:, 0]
            rows[mine] = there[places[mine]].to(rows.dtype)
            if not bool(rows[: own.rows].isfinite().all()):
                raise HeadError(f"{generation.folder} has rows that {head.storage} cannot hold; give another --storage")
    head.count_move()


def describe_start(initial: InitialWeights, names: list[str], new: list[str]) -> str:
    """What is taken and what is new, in words."""
    taken = len(names) - len(new)
    if not taken:
        rows = f"all {len(names):,} identities are new to it, and begin with random rows"
    elif not new:
        rows = f"with the rows of all {len(names):,} identities"
    else:
        shown = one_line(", ".join(new[:5])) + (" and others" if len(new) > 5 else "")
        rows = f"with the rows of {taken:,} of {len(names):,} identities; {count_of(len(new), 'row')} new: {shown}"
    return f"starts from {initial.source}, embedder {initial.sha256[:16]}, {rows}"
