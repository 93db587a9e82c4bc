"""Meaning: what a network's values say: which task they answer, and whether an activation has been applied to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ....tiler.base.errors import UsageError
from .ending import Ending
from .trust import ModelFileError

Task = Literal["multiclass", "binary", "multilabel", "regression"]
Activation = Literal["none", "sigmoid", "softmax", "argmax"]
TASKS: tuple[Task, ...] = ("multiclass", "binary", "multilabel", "regression")
ACTIVATIONS: tuple[Activation, ...] = ("none", "sigmoid", "softmax", "argmax")
DEFAULT_THRESHOLD = 0.5

_NEAR_ONE = 1e-3
_LIKE_PROBABILITIES = (-0.5, 1.5)
"""What interpolation makes of values in 0..1 at most, nearly: weights of bicubic kernels are below 0, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What somebody says of a network's values; None where nothing is said."""

    task: Task | None = None
    activation: Activation | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("task", self.task, TASKS), ("activation", self.activation, ACTIVATIONS)):
            if value is not None and value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UsageError(f"threshold must lie between 0 and 1, got {self.threshold}")

    def over(self, other: Statement) -> Statement:
        """This one, and what it leaves open as the other says."""
        return Statement(
            task=self.task or other.task,
            activation=self.activation or other.activation,
            threshold=self.threshold if self.threshold is not None else other.threshold,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a network's values mean."""

    channels: int
    task: Task | None
    """None: nobody knows, for the reason in `doubt`."""
    activation: Activation | None
    """What the network has applied already; "none": it gives logits; None as for the task."""
    threshold: float = DEFAULT_THRESHOLD
    """Of a binary task: yes where p is greater."""
    count: int | None = None
    """Of an argmax: how many classes there are, where that is known."""
    is_narrow: bool = False
    """Of an argmax: whether the network gives bytes."""
    assumed: str = ""
    """Why this was taken for granted; empty: it was said."""
    doubt: str = ""
    """What must be said before values can become classes or probabilities."""

    @property
    def class_count(self) -> int | None:
        """How many classes there are; None: any number."""
        if self.activation == "argmax":
            return self.count
        return 2 if self.task == "binary" else self.channels

    def sentence(self) -> str:
        """For people: the rule by which values become an output, and where it comes from."""
        doubt = f"not known: {self.doubt}" if self.doubt else ""
        if self.task is None:
            return doubt
        channels = f"{self.channels} channels"
        match self.task, self.activation:
            case "binary", "sigmoid":
                rule = f"one channel of probabilities, yes where it is above {self.threshold:g}"
            case "binary", _:
                rule = f"one channel of logits, yes where its sigmoid is above {self.threshold:g}"
            case "multiclass", "argmax":
                rule = f"{self.count} classes by their numbers" if self.count else "classes by their numbers"
            case "multiclass", "none":
                rule = f"{channels} of logits, the class of the largest"
            case "multiclass", _:
                rule = f"{channels} of probabilities ({self.activation} is in the network), the class of the largest"
            case "multilabel", _:
                what = "probabilities" if self.activation == "sigmoid" else "logits"
                rule = f"{channels} of {what}, each a question of its own"
            case _:
                rule = f"{'one channel' if self.channels == 1 else channels} of values, as they are"
        assumed = f" (assumed: {self.assumed}; --task and --activation say otherwise)" if self.assumed else ""
        return f"{self.task}: {rule}{assumed}"

    def bound(self, dtype: torch.dtype) -> float:
        """Of a binary task: a value of that type means yes exactly where it is greater than this.

        p > threshold is sigmoid(z) > threshold, which is z > log(threshold / (1 - threshold)); rounded down to what the
        type holds, since values between the two are none of it.
        """
        exact = self.threshold
        if self.activation != "sigmoid":
            exact = math.log(self.threshold) - math.log1p(-self.threshold)
        if dtype == torch.float64:
            return exact
        nearest = np.float32(exact)
        # As Python's numbers: numpy would compare in float32, where the two are always equal.
        return float(nearest if float(nearest) <= exact else np.nextafter(nearest, np.float32(-np.inf)))


def looks_bounded(samples: list[Tensor]) -> str:
    """Whether values look as if something had bounded them, whatever the image; empty: they do not.

    Args:
        samples: results for images of very different brightness.
    """
    finite = [sample[torch.isfinite(sample)] for sample in samples]
    values = torch.cat([entry.double() for entry in finite]) if finite else torch.zeros(0)
    if not values.numel():
        return ""
    if values.min() != values.max() and torch.equal(values, values.round()):
        return "its values are whole numbers, whatever the image"
    if all(_sums_to_one(sample) for sample in samples):
        return "its channels sum to 1 in every pixel, whatever the image"
    low, high = _LIKE_PROBABILITIES
    return "its values lie in 0..1, whatever the image" if values.min() >= low and values.max() <= high else ""


def _sums_to_one(sample: Tensor) -> bool:
    if sample.shape[1] < 2:
        return False
    total = sample.double().sum(dim=1)
    total = total[torch.isfinite(total)]
    return bool(((total - 1).abs() <= _NEAR_ONE).all())


def decide_meaning(ending: Ending, samples: list[Tensor], stated: Statement, name: str) -> Meaning:
    """What a network's values mean: as it is said, else as its last operation tells.

    Args:
        samples: results (1, channels, h, w) for images of very different brightness.
        name: of the model, for messages.

    Raises:
        ModelFileError: what is said cannot be.
    """
    channels = int(samples[0].shape[1])
    found, fault = _recognise(ending, samples, channels)
    is_whole = ending.kind == "classes"
    if stated.task == "regression":
        if stated.activation not in (None, "none") or stated.threshold is not None:
            raise ModelFileError(f"{name}: values of a regression are written as they are; leave activation and "
                                 "threshold out")  # fmt: skip
        if is_whole:
            raise ModelFileError(
                f"{name} gives whole numbers, and a regression's values are floats; end it with .float()"
            )
        return Meaning(channels=channels, task="regression", activation="none")
    _require_possible(ending, channels, stated.activation, name)
    activation = stated.activation or found
    task = stated.task or _usual_task(activation, channels)
    doubt = fault if activation is None else ""
    if not doubt and task is None:
        doubt = (
            f"it ends in a sigmoid over {channels} channels: say --task multiclass where they exclude each other, "
            "--task multilabel where each is a question of its own"
        )
    if task is not None and not doubt:
        _require_fitting(task, activation, channels, name)
    if stated.threshold is not None and task != "binary":
        raise ModelFileError(f"{name}: a threshold is for one channel (--task binary), it has {channels}")
    said = stated.task is not None and stated.activation is not None
    return Meaning(
        channels=channels,
        task=task,
        activation=activation,
        threshold=stated.threshold if stated.threshold is not None else DEFAULT_THRESHOLD,
        count=ending.count if is_whole else None,
        is_narrow=is_whole and samples[0].dtype in (torch.uint8, torch.int8, torch.bool),
        assumed="" if said else _explain(ending, channels),
        doubt=doubt,
    )


def _recognise(ending: Ending, samples: list[Tensor], channels: int) -> tuple[Activation | None, str]:
    """(what the network has applied, "") or (None, why nobody knows)."""
    remedy = "say --activation none where it gives logits, sigmoid or softmax where it gives probabilities"
    match ending.kind:
        case "classes":
            return "argmax", ""
        case "softmax" | "log-softmax" if ending.count == 1:
            return (
                None,
                "its softmax is over one channel, which gives the same everywhere; leave it out of the network",
            )
        case "softmax" if channels == 1:
            # One channel picked of a softmax: the probability of that one.
            return "sigmoid", ""
        case "softmax" if all(map(_sums_to_one, samples)):
            return "softmax", ""
        case "softmax":
            return None, f"it ends in a softmax, but its channels do not sum to 1; {remedy}"
        case "log-softmax" if channels > 1:
            # Logits as good as others: a constant in every pixel away from those before it.
            return "none", ""
        case "log-softmax" | "log-sigmoid":
            return None, "it ends in the logarithm of a probability, which is no logit; leave that out of the network"
        case "sigmoid":
            return "sigmoid", ""
        case "affine":
            return "none", ""
        case _:
            bounded = looks_bounded(samples)
            remedy += ", argmax where it gives class numbers"
            return (None, f"{bounded}; {remedy}") if bounded else ("none", "")


def _usual_task(activation: Activation | None, channels: int) -> Task | None:
    if activation == "argmax":
        return "multiclass"
    if channels == 1:
        return "binary"
    return None if activation == "sigmoid" else "multiclass"


def _explain(ending: Ending, channels: int) -> str:
    what = "one channel" if channels == 1 else f"{channels} channels"
    match ending.kind:
        case "affine" | "other":
            return what
        case "classes":
            return f"it gives whole numbers{f', made by {ending.operation}' if ending.operation else ''}"
        case kind:
            return f"{what}, and it ends in a {kind}"


def _require_possible(ending: Ending, channels: int, activation: Activation | None, name: str) -> None:
    """
    Raises:
        ModelFileError: an activation is said that the network cannot have.
    """
    if ending.kind == "classes":
        if channels != 1:
            raise ModelFileError(f"{name} gives whole numbers in {channels} channels; class numbers have one channel")
        if activation not in (None, "argmax"):
            raise ModelFileError(f"{name} gives whole numbers, which are classes; activation {activation} cannot be")
    elif activation in ("sigmoid", "softmax", "argmax") and ending.kind in ("affine", "log-softmax", "log-sigmoid"):
        raise ModelFileError(f"{name} ends in {ending.operation}; it has not applied {activation}, as it is said to")
    elif activation == "argmax" and ending.kind != "other":
        raise ModelFileError(f"{name} ends in {ending.operation}; it gives no class numbers, as it is said to")


def _require_fitting(task: Task, activation: Activation | None, channels: int, name: str) -> None:
    """
    Raises:
        ModelFileError: a task that these channels cannot answer.
    """
    if activation == "argmax":
        if task != "multiclass":
            raise ModelFileError(f"{name} gives class numbers, whose task is multiclass, got {task}")
        if channels != 1:
            raise ModelFileError(f"{name} gives {channels} channels; class numbers have one channel")
        return
    if task == "binary" and channels != 1:
        raise ModelFileError(
            f"task binary is a question of yes and no in one channel, {name} gives {channels}; channels that exclude "
            "each other are multiclass, questions of their own multilabel"
        )
    if task in ("multiclass", "multilabel") and channels == 1:
        raise ModelFileError(f"task {task} needs two channels or more, {name} gives one; one channel is binary")
    if (task, activation) in (("binary", "softmax"), ("multilabel", "softmax")):
        raise ModelFileError(f"{name}: a softmax makes classes that exclude each other, which task {task} has not")
