"""A segmentation model: the network, with all that its numbers mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ....tiler.base.errors import UsageError
from ....tiler.base.html import render_table
from ....tiler.output.store import LEVELS, OutputDescription
from .finite import require_finite_weights
from .meaning import Activation, Meaning, Statement, Task
from .norm import fold_norms
from .palette import default_colour
from .probe import find_meaning, network_dtype, with_channel
from .scaling import Scaling
from .trust import ModelFileError

Output = Literal["class", "probability", "logits", "values"]
OUTPUTS: tuple[Output, ...] = ("class", "probability", "logits", "values")
MOST_CLASSES = 65535
"""As many as a class map can have: its nodata value is none."""
_BYTE_CLASSES = 255
_MOST_LISTED = 8
"""Names of bands or classes that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationClass:
    """One class of the output."""

    name: str
    colour: tuple[int, int, int]
    """RGB, 0..255."""


@dataclass(frozen=True, slots=True, init=False, repr=False)
class SegmentationModel:
    """A network with its bands, scaling, fill value and classes. `outsize.Model` is its short name.

    Raises:
        UsageError: values that do not fit each other.
        ModelFileError: where classes are not named, a network that fails on images of that many bands.
    """

    network: nn.Module
    """(1, bands, h, w) scaled floats -> (1, channels, h, w), or (1, h, w) of one channel."""
    name: str
    bands: tuple[str, ...]
    scaling: Scaling
    fill: tuple[float, ...]
    """Raw value of each band that stands in for nodata pixels."""
    classes: tuple[SegmentationClass, ...]
    """A channel each; of a binary task no and yes; of a regression its channels; of an argmax its numbers, or none."""
    task: Task | None = None
    """What the channels answer; None: as the network's number of channels and last operation tell."""
    activation: Activation | None = None
    """What the network has applied to them already; None as before."""
    threshold: float | None = None
    """Of a binary task: yes where the probability is greater; None: 0.5."""
    meaning: Meaning | None = field(default=None, compare=False)
    """What was found of the three, by a small run of the network; None: it was not run."""
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What its user should know of how it was loaded."""
    sha256: str = ""
    """Of the weights file; empty for a model that was never saved."""
    architecture: str = ""
    """What builds the network, "package.module:factory"; empty for a UNet, whose files say it by themselves."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keyword arguments of the factory; plain JSON values."""

    def __init__(
        self,
        network: nn.Module,
        *,
        bands: int | Sequence[str],
        scaling: Scaling | None = None,
        scale: float | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        fill: float | Sequence[float] = 0.0,
        classes: Sequence[str | SegmentationClass] | None = None,
        name: str | None = None,
        task: Task | None = None,
        activation: Activation | None = None,
        threshold: float | None = None,
        meaning: Meaning | None = None,
        remarks: tuple[str, ...] = (),
        sha256: str = "",
        architecture: str = "",
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        """A model of a network.

        Args:
            network: (1, bands, h, w) scaled floats -> (1, channels, h, w), or (1, h, w) of one channel.
            bands: names, which a raster's own are matched with, or how many.
            scaling: from raw pixels to what the network was trained on; None: as the next three say.
            scale: pixels are multiplied by it first, such as 1 / 255; None: 1.
            mean: subtracted then, one number or one a band; None: 0.
            std: divided by then, one number or one a band; None: 1.
            fill: raw value that stands in for nodata pixels, one or one a band.
            classes: names, in the order of the channels; None: "class 0", "class 1", ..., as many as a small run of
                the network shows.
            name: None: that of the network's class.
            task: "multiclass", "binary", "multilabel" or "regression"; None: as number of channels and last operation
                tell.
            activation: what the network has applied to its result: "none", "sigmoid", "softmax" or "argmax"; None:
                as before.
            threshold: of a binary task: yes where the probability is greater; None: 0.5.
        """
        name = type(network).__name__ if name is None else name
        names = _band_names(bands)
        stated = Statement(task=task, activation=activation, threshold=threshold)
        if scaling is None:
            scaling = _affine_scaling(len(names), scale, mean, std)
        elif (scale, mean, std) != (None, None, None):
            raise UsageError("a model has a scaling, or scale, mean and std; got both, leave one out")
        if len(scaling.subtract) != len(names):
            raise UsageError(
                f"a model of {len(names)} bands needs as many scaling constants, got {len(scaling.subtract)}"
            )
        if classes is None:
            meaning = meaning or find_meaning(network, len(names), name, stated)
            known = name_classes(meaning)
        else:
            if isinstance(classes, str):
                raise UsageError(f"classes are a list of names, got {classes!r}")
            known = tuple(
                SegmentationClass(name=entry, colour=default_colour(value)) if isinstance(entry, str) else entry
                for value, entry in enumerate(classes)
            )
        values: dict[str, Any] = {
            "network": network,
            "name": name,
            "bands": names,
            "scaling": scaling,
            "fill": _per_band("fill values", fill, len(names)),
            "classes": known,
            "task": task,
            "activation": activation,
            "threshold": threshold,
            "meaning": meaning,
            "remarks": remarks,
            "sha256": sha256,
            "architecture": architecture,
            "hyperparameters": {} if hyperparameters is None else hyperparameters,
        }
        for field_name, value in values.items():
            object.__setattr__(self, field_name, value)
        least = 0 if activation == "argmax" else 1
        if not least <= len(known) <= MOST_CLASSES:
            raise UsageError(f"a model has {least}..{MOST_CLASSES} classes, got {len(known)}")

    def __repr__(self) -> str:
        return (
            f"<Model {self.name}: {len(self.bands)} bands ({_listed(self.bands)}), {len(self.classes)} classes "
            f"({_listed([entry.name for entry in self.classes])}), {self.parameters:,} parameters>"
        )

    def _repr_html_(self) -> str:
        said = self.meaning.sentence() if self.meaning is not None else self.task or "told by a small run"
        rows = {
            "network": f"{type(self.network).__name__}, {self.parameters:,} parameters",
            "bands": _listed(self.bands),
            "scaling": ", ".join(dict.fromkeys(self.scaling.kinds)),
            "fill": ", ".join(f"{value:g}" for value in dict.fromkeys(self.fill)),
            "classes": _listed([entry.name for entry in self.classes]),
            "task": said,
        }
        return render_table(f"Model {self.name}", rows)

    @property
    def parameters(self) -> int:
        """Numbers that were learnt."""
        # A network that was TorchScript keeps its own as buffers.
        learnt = list(self.network.parameters()) or list(self.network.buffers())
        return sum(tensor.numel() for tensor in learnt)


Model = SegmentationModel


def default_bands(count: int) -> tuple[str, ...]:
    """Names of bands that nobody named."""
    return tuple(f"band {number}" for number in range(1, count + 1))


def default_classes(count: int, kind: str = "class") -> tuple[SegmentationClass, ...]:
    """Classes that nobody named."""
    return tuple(SegmentationClass(name=f"{kind} {value}", colour=default_colour(value)) for value in range(count))


def name_classes(meaning: Meaning) -> tuple[SegmentationClass, ...]:
    """Classes that nobody named: as many as there are; of class numbers of which nobody knows how many, none."""
    return default_classes(meaning.class_count or 0, "channel" if meaning.task == "regression" else "class")


def _band_names(bands: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(bands, Integral) and not isinstance(bands, bool):
        if bands < 1:
            raise UsageError(f"a model has at least one band, got {bands}")
        return default_bands(int(bands))
    names = tuple(bands) if isinstance(bands, Iterable) and not isinstance(bands, str) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"bands are a number or a list of names, got {bands!r}")
    return names


def _per_band(what: str, values: float | Sequence[float], bands: int) -> tuple[float, ...]:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{what} are a number, or one number a band, got {values!r:.60}") from None
    if found.ndim == 0:
        return (found.item(),) * bands
    if found.shape != (bands,):
        raise UsageError(f"a model of {bands} bands needs as many {what}, got {found.size}")
    return tuple(float(value) for value in found)


def _affine_scaling(
    bands: int, scale: float | None, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> Scaling:
    """y = (x * scale - mean) / std."""
    factor = 1.0 if scale is None else float(scale)
    if not isfinite(factor) or factor == 0:
        raise UsageError(f"scale multiplies pixels, and is a number other than 0, got {scale}")
    means = _per_band("means", 0.0 if mean is None else mean, bands)
    deviations = _per_band("standard deviations", 1.0 if std is None else std, bands)
    return Scaling.offset_scale(
        offset=[value / factor for value in means], scale=[value / factor for value in deviations]
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")


def meaning_of(model: SegmentationModel) -> Meaning:
    """What the network's values mean; found by a small run where that was not done yet.

    Raises:
        ModelFileError: the network cannot mean what the model says.
    """
    if model.meaning is not None:
        return model.meaning
    stated = Statement(task=model.task, activation=model.activation, threshold=model.threshold)
    meaning = find_meaning(model.network, len(model.bands), model.name, stated)
    fit_classes(model.classes, meaning, model.name)
    return meaning


def fit_classes(classes: tuple[SegmentationClass, ...], meaning: Meaning, name: str) -> tuple[SegmentationClass, ...]:
    """The classes that somebody named, as many as the network has; of a binary task the yes alone may be named.

    Raises:
        ModelFileError: another number of them.
    """
    count = meaning.class_count
    if meaning.task == "binary" and len(classes) == 1:
        (yes,) = classes
        other = default_colour(1 if yes.colour == default_colour(0) else 0)
        return (SegmentationClass(name=f"not {yes.name}", colour=other), yes)
    if count is not None and len(classes) != count:
        channels = "1 channel" if meaning.channels == 1 else f"{meaning.channels} channels"
        raise ModelFileError(
            f"{name} names {len(classes)} classes, its network gives {channels}, which are {count} classes"
            if meaning.task == "binary" or meaning.activation == "argmax"
            else f"{name} names {len(classes)} classes, its network gives {channels}"
        )
    return classes


def default_output(model: SegmentationModel) -> Output:
    """What is written where nobody says: classes, or the values of a regression."""
    return "values" if meaning_of(model).task == "regression" else "class"


def describe_output(model: SegmentationModel, output: Output | None = None) -> OutputDescription:
    """What an output of this model means: for `predict(..., description=...)`, so that names and colours are kept.

    Args:
        output: None: `default_output`.
    """
    output = output or default_output(model)
    meaning = meaning_of(model)
    classes = fit_classes(model.classes, meaning, model.name)
    return OutputDescription(
        kind=output,
        model=model.name,
        model_sha256=model.sha256,
        classes=tuple(entry.name for entry in classes),
        colours=tuple(entry.colour for entry in classes),
        task=meaning.task or "",
        activation=meaning.activation or "",
        threshold=meaning.threshold if meaning.task == "binary" else None,
    )


class TileNetwork(nn.Module):
    """Scaling, network and finishing step as one module: raw pixels in, finished pixels out.

    Shapes: (1, bands, h, w) in the raster's own dtype -> class (1, 1, h, w) uint8, or int32 where there are more than
    255 (int16 and int32 of class numbers that the network gives itself, -1 where one is no class); probability
    (1, channels, h, w) uint8, round(254 p); logits and values (1, channels, h, w) float.

    Args:
        meaning: of the network's values; None: logits of classes that exclude each other.
        classes: how many there are, of a network that gives their numbers; 0: nobody knows.
    """

    subtract: Tensor
    divide: Tensor

    def __init__(
        self,
        network: nn.Module,
        scaling: Scaling,
        output: Output,
        band_names: tuple[str, ...] = (),
        meaning: Meaning | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.output: Output = output
        self.band_names = band_names
        """Of the model: a raster that names its own is read in this order."""
        self.meaning = meaning or Meaning(channels=0, task="multiclass", activation="none")
        self.classes = classes
        # Numbers, which torch.compile takes as they are.
        self._bounds = (self.meaning.bound(torch.float32), self.meaning.bound(torch.float64))
        dtype = network_dtype(network)
        self.register_buffer("subtract", torch.tensor(scaling.subtract, dtype=dtype)[None, :, None, None])
        self.register_buffer("divide", torch.tensor(scaling.divide, dtype=dtype)[None, :, None, None])

    def extra_repr(self) -> str:
        # Part of the fingerprint of a network that cannot be traced; empty as it was before there was any other.
        meaning = self.meaning
        if (meaning.task, meaning.activation) == ("multiclass", "none"):
            return ""
        return f"{meaning.task}, {meaning.activation}, {meaning.threshold}, {self.classes}"

    @property
    def bound(self) -> float | None:
        """Of a binary task: what its channel must be above for a yes."""
        return self._bounds[0] if self.meaning.task == "binary" else None

    def logits(self, x: Tensor) -> Tensor:
        return with_channel(self.network((x.to(self.subtract.dtype) - self.subtract) / self.divide))

    def finish(self, logits: Tensor) -> Tensor:
        if self.output == "class":
            return self._classes(logits)
        if self.output == "probability":
            return self._levels(logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.logits(x))

    def _classes(self, values: Tensor) -> Tensor:
        meaning = self.meaning
        if meaning.activation == "argmax":
            return self._numbers(values)
        if meaning.task == "binary":
            return (_full(values) > self._bounds[values.dtype == torch.float64]).to(torch.uint8)
        return values.argmax(dim=1, keepdim=True).to(torch.uint8 if values.shape[1] <= _BYTE_CLASSES else torch.int32)

    def _numbers(self, values: Tensor) -> Tensor:
        """Class numbers; whoever writes them refuses what is none, -1 here."""
        most = self.classes or (_BYTE_CLASSES if self.meaning.is_narrow else MOST_CLASSES)
        held = values.to(torch.int16) if values.dtype == torch.bool else values
        is_class = torch.logical_and(held >= 0, held < most)
        if held.is_floating_point():
            is_class = torch.logical_and(is_class, held == held.floor())
        numbers = torch.where(is_class, held, -1)
        return numbers.to(torch.int16 if most <= _BYTE_CLASSES else torch.int32)

    def _levels(self, values: Tensor) -> Tensor:
        meaning, values = self.meaning, _full(values)
        if meaning.activation == "none":
            share = values.sigmoid() if meaning.task in ("binary", "multilabel") else values.softmax(dim=1)
            return (share * LEVELS).round().to(torch.uint8)
        # Said to be probabilities, by the network's last operation or by its user: what is none must not wrap around.
        is_share = torch.logical_and(values >= -_ROUNDING, values <= 1 + _ROUNDING)
        return torch.where(is_share, (values.clamp(0, 1) * LEVELS).round(), -1.0).to(torch.int16)


_ROUNDING = 1e-3
"""That a probability may lie beyond 0 and 1."""


def _full(values: Tensor) -> Tensor:
    """Half precision as float32, which holds all of it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def as_tile_network(model: SegmentationModel, output: Output | None = None) -> TileNetwork:
    """The model as one module in eval mode, its norms folded into the convolutions (same function to rounding).

    Args:
        output: None: `default_output`.

    Raises:
        UsageError: an output that there is not, or that the network's values do not give; weights that are not finite.
    """
    require_finite_weights(model.network, model.name)
    output = output or default_output(model)
    if output not in OUTPUTS:
        raise UsageError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    meaning = meaning_of(model)
    require_output(meaning, output, model.name)
    classes = len(fit_classes(model.classes, meaning, model.name)) if meaning.activation == "argmax" else 0
    return TileNetwork(fold_norms(model.network), model.scaling, output, model.bands, meaning, classes).eval()


def require_output(meaning: Meaning, output: Output, name: str) -> None:
    """
    Raises:
        UsageError: the network's values do not give that output; says why, and what does.
    """
    if output == "values":
        if meaning.activation == "argmax":
            raise UsageError(f"model {name} gives class numbers, which are no values; --output class writes them")
        return
    if meaning.task == "regression":
        raise UsageError(f"model {name} is a regression, which has no {output}; --output values writes its values")
    if meaning.activation == "argmax" and output != "class":
        raise UsageError(
            f"model {name} gives class numbers, of which there is no {output}; leave the argmax out of the network, or "
            "write --output class"
        )
    if meaning.activation is None and output != "logits":
        raise UsageError(f"model {name}: what its values mean is not known: {meaning.doubt}")
    if output == "class":
        if meaning.task is None:
            raise UsageError(f"model {name}: what its values mean is not known: {meaning.doubt}")
        if meaning.task == "multilabel":
            raise UsageError(
                f"model {name} answers {meaning.channels} questions of their own (task multilabel), which are no one "
                "class; write --output probability"
            )
    if output == "logits" and meaning.activation in ("sigmoid", "softmax"):
        raise UsageError(
            f"model {name} gives probabilities, {meaning.activation} is in the network; --output probability writes "
            "them in 254 steps, --output values as they are"
        )
