"""Rows from InsightFace's files of each rank, with their momentum; to safetensors shards."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ....tiler.base.dtypes import dtype_name
from ....tiler.base.text import first_line
from ....tiler.system.files import use_default_mode
from ....tiler.system.plain_file import open_plain
from ..base.errors import HeadError
from .head import ShardedMarginHead

INDEX = "head.safetensors.index.json"
_WEIGHT = ("weight", "module.weight", "weight_activated", "module.weight_activated")
"""The last two of a layer that sees all rows, by partial_fc_v2.py."""
_MOMENTUM = ("weight_mom", "weight_momentum")
_KINDS = {
    "checkpoint_gpu_0.pt": re.compile(r"checkpoint_gpu_(\d+)\.pt"),  # from 2022 on
    "rank_0_softmax_weight.pt": re.compile(r"rank[_:](\d+)_softmax_weight\.pt"),  # until 2021
}
LEAST_LENGTH_KEPT = 1 - 2.0**-9
"""Cosine of a row with what its storage makes of it, below which digits are missing that other rows have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one of its ranks left."""

    path: Path
    weight: Tensor
    momentum: Tensor | None
    others: tuple[str, ...]
    """Other moments of the rows, by the names of torch's optimisers."""
    moment: tuple[int, int] | None
    """(epoch, global step); None where the file does not say."""


def import_insightface(head: ShardedMarginHead, folder: str | Path) -> int:
    """Read the rows of InsightFace's arcface_torch from `checkpoint_gpu_0.pt` ..., or from `rank_0_softmax_weight.pt`
    ... of 2021, of any number of its ranks, into a layer of any number of ranks; returns its global step, 0 where the
    files have none.

    Momentum goes with them where the layer's rule is `Momentum`, from the optimiser's state or from the files that 2021
    had for it. What the optimiser knew of the rows beside that is left out, with a warning that names it.

    Its rank r of n has classes // n rows, and one more where r < classes % n, in the order of ranks. Files are read
    with weights_only=True, so that nothing in them runs.

    Raises:
        HeadError: files are missing, of different epochs or steps, or hold another number of classes or numbers a row
            than the layer; rows or momentum that are not finite, have no direction, or do not fit the layer's storage.
    """
    parts = [_read_part(path) for path in _rank_files(Path(folder))]
    counts = [len(part.weight) for part in parts]
    expected = [head.classes // len(parts) + (rank < head.classes % len(parts)) for rank in range(len(parts))]
    dims = {part.weight.shape[1] for part in parts}
    if counts != expected or dims != {head.dim}:
        raise HeadError(
            f"{folder} must hold {head.classes} rows of {head.dim} numbers, {expected} a rank, got {counts} of "
            f"{sorted(dims)}"
        )
    if len({part.moment for part in parts}) > 1:
        said = ", ".join(f"{part.path.name} {_say_moment(part.moment)}" for part in parts[:4])
        raise HeadError(f"{folder} must hold files of one moment of one training, got {said}")
    with_momentum = _choose_momentum(head, parts)
    for part, first in zip(parts, _starts(counts), strict=True):
        for what, values in (("row", part.weight), ("momentum of row", part.momentum if with_momentum else None)):
            if values is not None:
                _check(head, part.path, what, values, first)
    head.is_torn = True  # until all are there
    head.count_move()
    with torch.no_grad():
        for (tablet, rows), (_, state) in zip(head.own_rows(), head.own_state(), strict=True):
            state.zero_()
            for start, part in zip(_starts(counts), parts, strict=True):
                first, stop = max(tablet.first, start), min(tablet.stop, start + len(part.weight))
                if first < stop:
                    there, here = slice(first - start, stop - start), slice(first - tablet.first, stop - tablet.first)
                    rows[here].copy_(part.weight[there])
                    if with_momentum and part.momentum is not None:
                        state[here].copy_(part.momentum[there])
    head.is_torn = False
    return parts[0].moment[1] if parts[0].moment else 0


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:rank]) for rank in range(len(counts))]


def _say_moment(moment: tuple[int, int] | None) -> str:
    return f"of epoch {moment[0]} and step {moment[1]}" if moment else "without a step"


def _choose_momentum(head: ShardedMarginHead, parts: list[_Part]) -> bool:
    """Whether momentum is taken; warns of what is left out."""
    having = [part.path.name for part in parts if part.momentum is not None]
    if having and len(having) < len(parts):
        lacking = next(part.path.name for part in parts if part.momentum is None)
        raise HeadError(f"files must all have momentum or none, {having[0]} has, {lacking} has none")
    # Of the rules Momentum alone keeps a number for each of a row.
    takes = bool(having) and head.state.shape[1] == head.dim
    left = {name for part in parts for name in part.others} | ({"momentum"} if having and not takes else set())
    if left:
        rule = type(head.rule).__name__ if head.rule is not None else "an optimiser of its own"
        warnings.warn(
            f"{parts[0].path.parent} has {', '.join(sorted(left))} of the rows, which {rule} does not take: rows go on "
            "without",
            stacklevel=3,
        )
    return takes


def _check(head: ShardedMarginHead, path: Path, what: str, values: Tensor, first: int) -> None:
    """Refuse rows that the layer cannot hold.

    Raises:
        HeadError: names the first of them.
    """
    for start in range(0, len(values), head.layout.block_rows):
        wide = values[start : start + head.layout.block_rows].double()
        stored = wide.to(head.storage).double()

        def require(good: Tensor, reason: str, start: int = start) -> None:
            if not bool(good.all()):
                place = start + int((~good).nonzero()[0, 0])
                raise HeadError(f"{what} {place} of {path}, of class {first + place}, {reason}")

        require(wide.isfinite().all(dim=1), "is not finite; that training has gone wrong, take an earlier one")
        reach = torch.finfo(head.storage).max
        kind = dtype_name(head.storage)
        require(
            stored.isfinite().all(dim=1),
            f"goes beyond {reach:.3g}, the largest {kind}; give the layer storage=torch.float32",
        )
        if what == "row":
            length = wide.norm(dim=1)
            require(length > 0, "is zeros, which have no direction; that class was never trained")
            cosine = (wide * stored).sum(dim=1) / (length * stored.norm(dim=1).clamp_min(1e-300))
            require(cosine > LEAST_LENGTH_KEPT, f"is so short that {kind} loses its digits; give storage=torch.float32")


def _rank_files(folder: Path) -> list[Path]:
    kinds = {
        name: {int(match[1]): path for path in folder.glob("*.pt") if (match := pattern.fullmatch(path.name))}
        for name, pattern in _KINDS.items()
    }
    there = {name: found for name, found in kinds.items() if found}
    if len(there) > 1:
        raise HeadError(f"{folder} must hold one kind of files, got both {' and '.join(there)}")
    name, found = next(iter(there.items()), (next(iter(kinds)), dict[int, Path]()))
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise HeadError(f"{folder} must hold {name} and so on without a gap, {missing} missing")
    return [found[rank] for rank in sorted(found)]


def _read_part(path: Path) -> _Part:
    values = _load(path)
    try:
        if isinstance(values, Tensor):
            beside = path.with_name(path.name.replace("softmax_weight.pt", "softmax_weight_mom.pt"))
            momentum = _load(beside) if beside.exists() else None
            return _made(path, values, momentum, (), None)
        layer: dict[str, Tensor] = values["state_dict_softmax_fc"]
        names = [name for name in _WEIGHT if name in layer]
        if not names:
            raise KeyError(f"{' or '.join(_WEIGHT[::2])} in state_dict_softmax_fc, which has {', '.join(layer)}")
        weight = layer[names[0]]
        momentum = next((layer[name] for name in _MOMENTUM if name in layer), None)
        others: list[str] = []
        for name, moment in _moments_of_rows(values.get("state_optimizer"), weight):
            if name == "momentum_buffer" and momentum is None and moment.shape == weight.shape:
                momentum = moment
            elif name != "momentum_buffer" or momentum is None:
                others.append(name)
        step = values.get("global_step")
        when = (int(values.get("epoch", 0)), int(step)) if step is not None else None
        return _made(path, weight, momentum, tuple(others), when)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise HeadError(
            f"{path} must be a checkpoint of InsightFace's arcface_torch with state_dict_softmax_fc, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _made(
    path: Path, weight: Tensor, momentum: Tensor | None, others: tuple[str, ...], moment: tuple[int, int] | None
) -> _Part:
    for what, values in (("rows", weight), ("momentum", momentum)):
        if values is None:
            continue
        if not isinstance(values, Tensor) or values.ndim != 2 or not values.is_floating_point():
            kind = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise HeadError(f"{path} must hold {what} as (classes, dim) real numbers, got {kind}")
        if values.shape != weight.shape:
            raise HeadError(f"{path} must hold {what} for each row, got {tuple(values.shape)}, {tuple(weight.shape)}")
    return _Part(path=path, weight=weight, momentum=momentum, others=others, moment=moment)


def _moments_of_rows(state: Any, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What torch's optimiser keeps of the layer, whose weight is the last parameter that it was given."""
    if not isinstance(state, dict):
        return
    places = [place for group in state.get("param_groups", []) for place in group.get("params", [])]
    kept = state.get("state", {}).get(places[-1], {}) if places else {}
    for name, value in kept.items():
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1:] == weight.shape[1:]:
            yield name, value


def _load(path: Path) -> Any:
    try:
        with open_plain(path):  # a pipe in its place would be waited for
            pass
        # Before torch 1.6 files were no archives, which alone can be mapped.
        return torch.load(path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain values, which may run code"
        raise HeadError(
            f"{path} must be a checkpoint of InsightFace's arcface_torch with state_dict_softmax_fc, got "
            f"{type(error).__name__}: {reason}"
        ) from error


def export_safetensors(head: ShardedMarginHead, folder: str | Path) -> Path:
    """Write the rows as safetensors, a shard for each tablet, with an index as Hugging Face's libraries read it; called
    by all ranks. Returns the index.

    Tensors are `head.weight.000000` ... in the order of classes, (rows, dim) in the layer's type.
    """
    head.require_whole()
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
