"""Checkpoints of the layer: generations of tablet files with a manifest, whole or not there, for any ranks.

FOLDER/step-000000012/tablet-000000.rows ..., other files, then manifest.json; then FOLDER/LATEST. A generation exists
once its manifest does, and the manifest is written when everything that it names is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....tiler.base.dtypes import dtype_name
from ....tiler.system.files import sync_folder
from ..base.errors import HeadError
from .head import ShardedMarginHead
from .tablet_file import FileSum, file_name, read_tablet, write_file, write_tablet

FORMAT = 1
MANIFEST, LATEST = "manifest.json", "LATEST"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A complete checkpoint."""

    folder: Path
    step: int
    manifest: dict[str, Any]

    def read_extra(self, name: str) -> bytes:
        """One of the other files that were saved with the layer.

        Raises:
            HeadError: it is damaged or was not saved.
        """
        if name not in self.manifest["extra"]:
            raise HeadError(f"{self.folder} has no {name}, it has: {', '.join(self.manifest['extra']) or 'nothing'}")
        value = (self.folder / name).read_bytes()
        if hashlib.sha256(value).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise HeadError(f"{self.folder / name} is damaged: its checksum is not the manifest's")
        return value


def save_checkpoint(
    head: ShardedMarginHead, folder: str | Path, step: int, *, extra: Mapping[str, bytes] | None = None, keep: int = 2
) -> Path:
    """Save the layer as a new generation; called by all ranks.

    Killed at any moment it leaves what was complete before. The last `keep` generations stay.

    Args:
        step: of the training run; the generation's name.
        extra: other files by name (backbone, optimiser, cursor), from rank 0; no pickle is made of anything.

    Raises:
        HeadError: a complete generation of that step is there already; names that would leave the folder.
        OSError: the disk is full or gone; the generation is incomplete and is ignored.
    """
    extra = dict(extra or {})
    for name in extra:
        if Path(name).name != name or name.startswith((".", "tablet-")) or name == MANIFEST:
            raise HeadError(f"a file saved with the layer needs a plain name, got {name!r}")
    if step < 0 or keep < 1:
        raise HeadError(f"step must be >= 0 and keep >= 1, got {step} and {keep}")
    head.require_whole()
    root = Path(folder)
    generation = root / f"step-{step:09d}"
    exists = torch.tensor([int((generation / MANIFEST).exists())])
    if int(head.ranks.add(exists)):
        raise HeadError(f"{generation} is complete already; save another step, or delete it")
    generation.mkdir(parents=True, exist_ok=True)
    files = _write_tablets(head, generation, step)
    if head.ranks.rank == 0:
        for name, value in extra.items():
            written = write_file(generation / name, [value])
            files[name] = {"sha256": written.sha256, "size": written.size}
        sync_folder(generation)
        _write_manifest(head, generation, step, sorted(extra), files)
        sync_folder(root)
        write_file(root / LATEST, [generation.name.encode()])
        sync_folder(root)
        _remove_old(root, keep)
    head.ranks.add(torch.zeros(1))  # nobody goes on before the generation is complete
    return generation


def _write_tablets(head: ShardedMarginHead, generation: Path, step: int) -> dict[str, dict[str, Any]]:
    """Before: each rank has its tablets. After: they are all written, and all ranks know every file's sum and size."""
    sums = [
        write_tablet(generation, tablet, rows, state, step)
        for (tablet, rows), (_, state) in zip(head.own_rows(), head.own_state(), strict=True)
    ]
    mine = torch.tensor([[*bytes.fromhex(s.sha256), *s.size.to_bytes(8, "little")] for s in sums], dtype=torch.uint8)
    counts = [len(head.layout.owned(rank)) for rank in range(head.ranks.size)]
    everyone = head.ranks.gather_tablets(mine.reshape(-1, 40), counts)
    return {
        file_name(head.layout.tablet(index)): {
            "sha256": bytes(row[:32].tolist()).hex(),
            "size": int.from_bytes(bytes(row[32:].tolist()), "little"),
        }
        for index, row in enumerate(everyone)
    }


def _write_manifest(
    head: ShardedMarginHead, generation: Path, step: int, extra: list[str], files: dict[str, dict[str, Any]]
) -> None:
    """Make a generation complete, whose files are on the disk."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "classes": head.classes,
        "dim": head.dim,
        "storage": dtype_name(head.storage),
        "tablet_rows": head.layout.tablet_rows,
        "state_width": head.state.shape[1],
        "state_dtype": dtype_name(head.state.dtype),
        "seed": head.seed,
        "updates": head.step,
        "extra": extra,
        "files": files,
    }
    write_file(generation / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    sync_folder(generation)


def list_generations(folder: str | Path) -> list[Generation]:
    """The complete generations, newest first; without looking into their files."""
    found: list[Generation] = []
    for path in Path(folder).glob(f"step-*/{MANIFEST}"):
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] == FORMAT:
                found.append(Generation(folder=path.parent, step=int(manifest["step"]), manifest=manifest))
        except (ValueError, KeyError, TypeError):
            continue  # damaged: as good as incomplete
    return sorted(found, key=lambda generation: -generation.step)


def load_checkpoint(
    head: ShardedMarginHead, folder: str | Path, *, step: int | None = None, grow: bool = False
) -> Generation:
    """Load the newest generation whose files verify, or that of a step; called by all ranks, of any number.

    Args:
        grow: the layer may have more classes than were saved; the new ones keep their first rows.

    Raises:
        HeadError: none is complete and whole, or it is another layer's; says what was wrong with each.
    """
    candidates = [g for g in list_generations(folder) if step is None or g.step == step]
    reasons: list[str] = []
    for generation in candidates:
        reason = _check_layer(head, generation.manifest, grow=grow)
        if not reason:
            head.is_torn = True  # what is read is checked when it is there
            head.count_move()
            reason = _read_all(head, generation)
        bad = head.ranks.add(torch.tensor([int(bool(reason))]))
        if not int(bad):
            head.is_torn = False
            head.seed, head.step = int(generation.manifest["seed"]), int(generation.manifest["updates"])
            return generation
        reasons.append(reason or f"{generation.folder}: another rank could not read its tablets")
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    raise HeadError(f"{folder} has no whole {wanted} for this layer: {'; '.join(reasons) or 'none is complete'}")


def _check_layer(head: ShardedMarginHead, manifest: dict[str, Any], *, grow: bool) -> str:
    for name, ours in (
        ("dim", head.dim),
        ("storage", dtype_name(head.storage)),
        ("tablet_rows", head.layout.tablet_rows),
        ("state_width", head.state.shape[1]),
    ):
        if manifest[name] != ours:
            return f"step {manifest['step']} has {name} {manifest[name]}, the layer {ours}"
    saved = manifest["classes"]
    if saved > head.classes or (saved < head.classes and not grow):
        return f"step {manifest['step']} has {saved} classes, the layer {head.classes}"
    return ""


def _read_all(head: ShardedMarginHead, generation: Generation) -> str:
    """Read this rank's tablets; the reason where one is not whole."""
    files, saved = generation.manifest["files"], int(generation.manifest["classes"])
    layout = type(head.layout)(classes=saved, tablet_rows=head.layout.tablet_rows, block_rows=head.layout.block_rows)
    try:
        for (tablet, rows), (_, state) in zip(head.own_rows(), head.own_state(), strict=True):
            if tablet.index < layout.count:
                there = layout.tablet(tablet.index)
                read_tablet(generation.folder, there, rows, state, FileSum(**files[file_name(there)]))
    except (OSError, HeadError, KeyError, TypeError, ValueError) as error:
        return f"step {generation.step}: {error}"
    return ""


def _remove_old(root: Path, keep: int) -> None:
    """Older complete generations, and incomplete ones that are older than what is kept."""
    complete = list_generations(root)
    if len(complete) <= keep:
        return
    oldest = complete[keep - 1].step
    for path in root.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and int(number) < oldest:
            # The manifest first: what is half deleted must not look complete.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
