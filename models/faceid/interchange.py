"""Rows from and to other systems: InsightFace's files of each rank, safetensors shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...tiler.files import use_default_mode
from .errors import HeadError
from .head import ShardedMarginHead

INDEX = "head.safetensors.index.json"
_WEIGHT, _MOMENTUM = ("weight", "module.weight"), ("weight_mom", "weight_momentum")


def import_insightface(head: ShardedMarginHead, folder: str | Path) -> int:
    """Read the rows of InsightFace's arcface_torch from `checkpoint_gpu_0.pt` ... of any number of its ranks, into a
    layer of any number of ranks; returns its global step. Momentum goes with them where the layer's rule has it.

    Its rank r of n has classes // n rows, and one more where r < classes % n, in the order of ranks. Files are read
    with weights_only=True, so that nothing in them runs.

    Raises:
        HeadError: files are missing, or hold another number of classes or numbers a row than the layer.
    """
    paths = _rank_files(Path(folder))
    parts = [_read_part(path) for path in paths]
    counts = [len(weight) for weight, _, _ in parts]
    expected = [head.classes // len(paths) + (rank < head.classes % len(paths)) for rank in range(len(paths))]
    dims = {weight.shape[1] for weight, _, _ in parts}
    if counts != expected or dims != {head.dim}:
        raise HeadError(
            f"{folder} must hold {head.classes} rows of {head.dim} numbers, {expected} a rank, got {counts} of "
            f"{sorted(dims)}"
        )
    has_momentum = head.state.shape[1] == head.dim and all(momentum is not None for _, momentum, _ in parts)
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    with torch.no_grad():
        for (tablet, rows), (_, state) in zip(head.own_rows(), head.own_state(), strict=True):
            for start, (weight, momentum, _) in zip(starts, parts, strict=True):
                first, stop = max(tablet.first, start), min(tablet.stop, start + len(weight))
                if first < stop:
                    there, here = slice(first - start, stop - start), slice(first - tablet.first, stop - tablet.first)
                    rows[here].copy_(weight[there])
                    if has_momentum and momentum is not None:
                        state[here].copy_(momentum[there])
    return max(step for _, _, step in parts)


def _rank_files(folder: Path) -> list[Path]:
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint_gpu_*.pt"):
        if match := re.fullmatch(r"checkpoint_gpu_(\d+)\.pt", path.name):
            found[int(match[1])] = path
    missing = set(range(max(found, default=0) + 1)) - set(found)
    if missing:
        raise HeadError(f"{folder} must hold checkpoint_gpu_0.pt and so on without a gap, {sorted(missing)} missing")
    return [found[rank] for rank in sorted(found)]


def _read_part(path: Path) -> tuple[Tensor, Tensor | None, int]:
    try:
        values: dict[str, Any] = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        layer: dict[str, Tensor] = values["state_dict_softmax_fc"]
        weight = next(layer[name] for name in _WEIGHT if name in layer)
        momentum = next((layer[name] for name in _MOMENTUM if name in layer), None)
        return weight, momentum, int(values.get("global_step", 0))
    except (OSError, RuntimeError, KeyError, TypeError, StopIteration, ValueError) as error:
        raise HeadError(
            f"{path} must be a checkpoint of InsightFace's arcface_torch with state_dict_softmax_fc, got "
            f"{type(error).__name__}: {error}"
        ) from error


def export_safetensors(head: ShardedMarginHead, folder: str | Path) -> Path:
    """Write the rows as safetensors, a shard for each tablet, with an index as Hugging Face's libraries read it; called
    by all ranks. Returns the index.

    Tensors are `head.weight.000000` ... in the order of classes, (rows, dim) in the layer's type.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    count = head.layout.count
    names = [f"head-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    for tablet, rows in head.own_rows():
        partial = root / f".{names[tablet.index]}.partial"
        tensors = {f"head.weight.{tablet.index:06d}": rows[: tablet.rows].contiguous()}
        save_file(tensors, partial, metadata={"first_class": str(tablet.first), "rows": str(tablet.rows)})
        use_default_mode(partial)
        partial.replace(root / names[tablet.index])
    head.ranks.add(torch.zeros(1))  # all shards are there
    index_file = root / INDEX
    if head.ranks.rank == 0:
        size = head.classes * head.dim * head.storage.itemsize
        index = {
            "metadata": {"total_size": size, "classes": head.classes, "dim": head.dim},
            "weight_map": {f"head.weight.{index:06d}": name for index, name in enumerate(names)},
        }
        partial = root / f".{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=1))
        partial.replace(index_file)
    head.ranks.add(torch.zeros(1))
    return index_file
