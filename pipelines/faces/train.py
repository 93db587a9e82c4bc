"""`outsize face train`: an embedder and its giant layer, planned, started on its ranks, safe to kill."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.faceid.base.collectives import Ranks
from ...models.faceid.layer.checkpoint import list_generations
from ...models.faceid.layer.head_plan import plan_head
from ...models.faceid.layer.margin_registry import MARGINS
from ...models.faceid.layer.margins import margin_from
from ...models.faceid.layer.row_rules import RULES
from ...models.faceid.pictures.augmentation import FaceAugmentation
from ...models.faceid.pictures.batch_loader import BatchLoader
from ...tiler.base.errors import BudgetError, TilerError, UsageError
from ...tiler.base.text import format_bytes
from ...tiler.system.machine import cpu_count, map_large_blocks
from ..base.console import Console, count_of
from ..base.training_folder import describe_training, owning_folder, read_training
from .benchmark import available_bytes, require_cores
from .init import InitialWeights, open_initial, require_fit
from .options import FaceTraining, write_spec
from .ranks import INTERRUPTED, RankError, RankRefusedError, joined_torchrun, leave_ranks, run_ranks
from .roll import describe_growth, find_changes, note_change, read_roll, write_roll
from .sources import SYNTHETIC, OpenedFaces
from .torchrun import is_started_by_torchrun, require_torchrun_ranks
from .trainer import train_rank
from .validation import describe_scores

_STRANGE = "must be a new or empty folder, or hold this training, got {name} there"
_NOT_THE_TRAJECTORY = ("out", "threads", "save_every", "evaluate_every", "source", "init", "grow")
"""Of `FaceTraining`: what may differ from call to call."""


def run_face_train(
    console: Console, training: FaceTraining, *, ranks: int, threads: int | None, memory: str | None
) -> bool:
    """Train, or go on; False where some pictures could not be used.

    Started by torchrun, this process is one of its ranks.

    Args:
        training: its `threads` are set here.
        threads: of each rank; None: the cores divided among them.

    Raises:
        UsageError, HeadError: a choice that breaks a rule, a source that cannot be trained on; other ranks than
            torchrun's.
        OutputError: OUT holds something else, or another training runs there.
        BudgetError: it does not fit.
        RankError: a rank ended early, or refused any of these.
        KeyboardInterrupt: stopped, and saved.
    """
    if is_started_by_torchrun():
        require_torchrun_ranks(ranks)
        return _run_as_rank(console, training, threads, memory)
    require_cores(ranks)
    training = replace(training, threads=threads or max(1, cpu_count() // ranks))
    out = Path(training.out)
    with owning_folder(out, _STRANGE):
        faces = _prepare(console, training, ranks, memory)
        try:
            if ranks == 1:
                result = train_rank(console, training, faces)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    write_spec(training, ranks, Path(folder))
                    places = [MARGINS.place(training.margin)] if isinstance(training.margin, str) else []
                    result = run_ranks(
                        "outsize.pipelines.faces.trainer", ranks, training.threads, Path(folder), places=places
                    )
        except RankRefusedError:
            raise
        except RankError as error:
            raise RankError(f"{error}; {_how_to_go_on(out)}") from error
        except KeyboardInterrupt:
            console.remark(f"{out}: stopped; {_how_to_go_on(out)}")
            raise
    assert result is not None
    return _show(console, result)


def _run_as_rank(console: Console, training: FaceTraining, threads: int | None, memory: str | None) -> bool:
    """One rank of torchrun; the first prepares the folder and shows the result, or says alone what went wrong."""
    with joined_torchrun() as local:
        ranks = Ranks.of(None)
        training = replace(training, threads=threads or max(1, cpu_count() // local))
        with _prepared(console, training, ranks, memory) as faces:
            if faces is None:
                return True
            try:
                result = train_rank(console, training, faces)
            except (TilerError, KeyboardInterrupt) as error:
                if ranks.rank == 0:
                    raise
                raise SystemExit(error.exit_code if isinstance(error, TilerError) else INTERRUPTED) from None
    return _show(console, result) if result is not None else True


@contextmanager
def _prepared(
    console: Console, training: FaceTraining, ranks: Ranks, memory: str | None
) -> Iterator[OpenedFaces | None]:
    """What a rank trains on, opened by the others when the first has prepared the folder, which it owns meanwhile; None
    where the first has refused."""
    with ExitStack() as owned:
        if ranks.rank == 0:
            try:
                owned.enter_context(owning_folder(Path(training.out), _STRANGE))
                faces = _prepare(console, training, ranks.size, memory)
            except TilerError:
                ranks.add(torch.tensor([1]))
                leave_ranks()
                raise
            ranks.add(torch.tensor([0]))
            yield faces
        else:
            yield None if int(ranks.add(torch.tensor([0]))) else training.open()


def _prepare(console: Console, training: FaceTraining, ranks: int, memory: str | None) -> OpenedFaces:
    """Everything that can be refused before the first step; leaves training.json."""
    map_large_blocks()
    _require_choices(training)
    faces = training.open()
    for line in faces.remarks:
        console.remark(line)
    loader = BatchLoader(
        source=faces.training,
        augmentation=FaceAugmentation(),
        batch=training.batch,
        micro_batch=training.micro_batch,
        seed=training.seed,
        ranks=ranks,
    )
    description, out = training.describe_embedder(faces.training.size), Path(training.out)
    model = description.build(recompute=training.recompute)
    generations = list_generations(out)
    initial = None
    if training.init is not None and not generations:
        initial = open_initial(Path(training.init))
        require_fit(initial, model, description)
    fingerprint = _fingerprint(training, faces)
    began_with = _settle_init(out, training, initial)
    if began_with is not None:
        fingerprint["init"] = began_with
    step = generations[0].step if generations else None
    said, change = find_changes(out, fingerprint, step, grow=training.grow)
    before = read_training(out)
    if before is not None and "faces" in change:
        said.append(describe_growth(read_roll(out), before["data"], faces.training))
    for line in said:
        console.remark(f"{out}: {line}")
    data = {
        "source": training.source,
        "identities": faces.training.identities,
        "samples": len(faces.training),
        "parameters": sum(p.numel() for p in model.parameters()),
        "predicted_bytes": _plan_memory(console, training, loader, model, memory),
    }
    describe_training(out, fingerprint, data)
    if change:
        note_change(out, fingerprint, change, data)
    if not training.source.startswith(SYNTHETIC):
        write_roll(out, faces.training, faces.held_out)
    return faces


def _require_choices(training: FaceTraining) -> None:
    """What can be refused before a source is opened.

    Raises:
        UsageError, HeadError: a choice that breaks a rule.
    """
    _ = training.rates, FaceAugmentation.parse(training.augment), margin_from(training.margin, training.margin_value)
    if training.batch < 2:
        raise UsageError(f"--batch must be 2 or more, since features are normalised over a step, got {training.batch}")


def _plan_memory(
    console: Console, training: FaceTraining, loader: BatchLoader, model: nn.Module, memory: str | None
) -> int:
    """Bytes of layer and embedder on all ranks, which are within the budget; shows the plan.

    Args:
        loader: of the ranks that there are.

    Raises:
        BudgetError: they are not.
    """
    source, ranks = loader.source, loader.ranks
    plan = plan_head(
        source.identities,
        training.dim,
        batch=training.batch,
        ranks=ranks,
        threads=training.threads,
        storage=getattr(torch, training.storage),
        rule=RULES[training.rule](lr=training.head_lr),
        sample=training.sample,
    )
    console.remark_lines(plan.explain().split("\n"))
    size, budget = source.size, available_bytes(memory)
    held = -(-loader.micro_batches // ranks) * training.micro_batch
    embedder = ranks * plan_embedder_bytes(model, size, held, training.micro_batch * training.threads)
    total = plan.machine_bytes + embedder
    console.remark(
        f"embedder  {training.network}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, images "
        f"{size[0]} x {size[1]}: {format_bytes(embedder)}, with the layer {format_bytes(total)}"
    )
    if embedder >= budget:
        raise BudgetError(
            f"layer and embedder need {format_bytes(total)}, there are {format_bytes(budget)}; make --batch smaller, "
            "or give --recompute"
        )
    plan.require(budget - embedder)  # says how many classes would fit
    return total


def _settle_init(out: Path, training: FaceTraining, initial: InitialWeights | None) -> dict[str, str] | None:
    """What the training begins, or has begun, with, for its fingerprint.

    Args:
        initial: read, where nothing is saved yet.
    """
    if initial is not None:
        return initial.to_fingerprint()
    found = read_training(out)
    began_with = found["fingerprint"].get("init") if found is not None else None
    if training.init is None:
        # What is saved goes on without it; what is not has to begin with it again.
        return began_with if list_generations(out) else None
    if began_with is not None and began_with["source"] == training.init:
        return began_with
    return {"source": training.init, "sha256": "not read"}


def plan_embedder_bytes(model: nn.Module, size: tuple[int, int], held: int, computed: int) -> int:
    """Of one rank: weights, gradient and its exact sum, moments; what the backward pass needs of `held` images,
    measured with one; what is computed at once with `computed` of them."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    largest = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            largest = max(largest, storage.nbytes())
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(torch.zeros((1, 3, *size)))
    del result
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # float32: weights, gradient, two moments, and one micro-batch's gradient; float64 and int64: the exact sum.
    return parameters * (5 * 4 + 3 * 8) + held * sum(kept.values()) + 4 * computed * largest


def _fingerprint(training: FaceTraining, faces: OpenedFaces) -> dict[str, Any]:
    """What the trajectory depends on, as plain values; neither ranks nor threads."""
    values = {key: value for key, value in asdict(training).items() if key not in _NOT_THE_TRAJECTORY}
    if not training.source.startswith(SYNTHETIC):
        del values["synthetic"]
    if not training.resize:
        del values["resize"]  # as trainings have it that are older than the option
    values["size"] = faces.training.size
    return json.loads(json.dumps({"faces": faces.training.describe(), **values}))


def _how_to_go_on(out: Path) -> str:
    generations = list_generations(out)
    step = f"from step {generations[0].step}" if generations else "from the start, nothing was saved yet"
    return f"the same command goes on {step}, with any number of ranks"


def _show(console: Console, result: dict[str, Any]) -> bool:
    begun = f"went on from step {result['first_step']}, " if result["first_step"] else ""
    loss = f"loss {result['loss']:.3f}, " if result["loss"] is not None else "nothing was left to do, "
    lines = [
        f"{result['out']}: {begun}{loss}{describe_scores(result)}, peak memory {format_bytes(result['peak_bytes'])}; "
        "train.jsonl and report.html lie beside it"
    ]
    if result["unusable"]:
        lines.append(f"{count_of(result['unusable'], 'picture')} could not be used: unreadable.jsonl names them")
    console.result("\n".join(lines), result)
    return not result["unusable"]
