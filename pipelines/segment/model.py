"""`outsize model pack` and `outsize model show`: model files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...models.segmentation.files.factory import is_factory
from ...models.segmentation.files.mlm import (
    Description,
    parse_colour,
    read_description,
    scaling_objects,
)
from ...models.segmentation.files.sources import (
    EXPORTED_ARCHITECTURE,
    UNET_ARCHITECTURE,
    description_path,
    find_description,
    load_model,
    save_model,
)
from ...models.segmentation.networks.exported import ExportedNetwork, export_network
from ...models.segmentation.networks.meaning import Meaning, Statement
from ...models.segmentation.networks.model import (
    SegmentationClass,
    SegmentationModel,
    default_classes,
    fit_classes,
    meaning_of,
)
from ...models.segmentation.networks.palette import default_colour
from ...models.segmentation.networks.scaling import Scaling
from ...models.segmentation.networks.trust import hash_file
from ...models.segmentation.networks.unet import UNet
from ...tiler.base.errors import OutputError, UsageError
from ..base.console import Console, count_of, format_table

_SCALINGS: Mapping[str, tuple[Callable[..., Scaling], tuple[str, str]]] = {
    "z-score": (Scaling.z_score, ("mean", "stddev")),
    "min-max": (Scaling.min_max, ("minimum", "maximum")),
    "offset-scale": (Scaling.offset_scale, ("offset", "scale")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """Where a model comes from, and leave to run code; as `load_model`."""

    source: str | None
    weights: str | None = None
    weights_key: str | None = None
    hyperparameters: Mapping[str, Any] | None = None
    trust_model: bool = False
    sha256: str | None = None

    def load(self, bands: int | Sequence[str] | None = None, stated: Statement | None = None) -> SegmentationModel:
        """The model.

        Args:
            stated: what its values mean, before what it says itself.
        """
        stated = stated or Statement()
        return load_model(
            self.source,
            weights=self.weights,
            hyperparameters=self.hyperparameters,
            bands=bands,
            trust=self.trust_model,
            sha256=self.sha256,
            weights_key=self.weights_key,
            task=stated.task,
            activation=stated.activation,
            threshold=stated.threshold,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What the user says of a model; None where the source is to say it."""

    name: str | None
    bands: tuple[str, ...]
    scaling: str | None
    constants: Mapping[str, str | None]
    """Of the scaling, by their option's name: numbers with commas between them."""
    fill: str | None
    classes: tuple[str, ...]
    """NAME or NAME=#RRGGBB."""
    stated: Statement = field(default_factory=Statement)
    """What the network's values mean."""


def parse_hyperparameters(pairs: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from KEY=JSON; what is no JSON is a text.

    Raises:
        UsageError: a pair without an equals sign.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not (sign and key.isidentifier()):
            raise UsageError(f"a hyperparameter must look like widths=[16,32], got {pair!r}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def _parse_numbers(text: str, bands: int, what: str) -> tuple[float, ...]:
    """One number a band; one alone is for all bands."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{what} must be numbers with commas between them, got {text!r}") from None
    if len(values) == 1:
        values *= bands
    if len(values) != bands:
        raise UsageError(f"{what} needs one number or one for each of {count_of(bands, 'band')}, got {len(values)}")
    return values


def _parse_class(text: str, index: int) -> SegmentationClass:
    name, sign, colour = text.rpartition("=") if "=#" in text else (text, "", "")
    if not name:
        raise UsageError(f"a class must look like water or water=#1F78B4, got {text!r}")
    try:
        return SegmentationClass(name=name, colour=parse_colour(colour) if sign else default_colour(index))
    except ValueError:
        raise UsageError(f"a class's colour must be six hexadecimal digits, #RRGGBB, got {colour!r}") from None


def _parse_scaling(options: PackOptions, bands: int) -> Scaling | None:
    given = {name: text for name, text in options.constants.items() if text is not None}
    build, names = _SCALINGS.get(options.scaling or "none", (None, ()))
    if set(given) != set(names):
        wanted = " and ".join(f"--{name}" for name in names) or "no constants"
        got = ", ".join(f"--{name}" for name in given) or "none"
        raise UsageError(f"--scaling {options.scaling or '(not given)'} takes {wanted}, got {got}")
    if build is None:
        return None if options.scaling is None else Scaling.none(bands)
    return build(**{name: _parse_numbers(text, bands, f"--{name}") for name, text in given.items()})


def run_pack(console: Console, source: SourceOptions, out: Path, options: PackOptions, *, overwrite: bool) -> None:
    """Write OUT.json and its weights from any source that `load_model` takes."""
    target = description_path(out)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another path, or --overwrite")
    model = source.load(options.bands or None, options.stated)
    if options.bands and len(options.bands) != len(model.bands):
        raise UsageError(
            f"model {model.name} takes {count_of(len(model.bands), 'band')}, got {len(options.bands)}: "
            f"{', '.join(options.bands)}"
        )
    meaning = meaning_of(model)
    if options.classes and meaning.class_count is not None and len(options.classes) not in _class_counts(meaning):
        raise UsageError(
            f"the network of {model.name} gives {count_of(len(model.classes), 'channel')}, one for each class; "
            f"got {len(options.classes)}: {', '.join(options.classes)}"
        )
    bands = len(model.bands)
    model = replace(
        model,
        name=options.name or (model.name if find_description(source.source) else target.stem),
        bands=options.bands or model.bands,
        scaling=_parse_scaling(options, bands) or model.scaling,
        fill=model.fill if options.fill is None else _parse_numbers(options.fill, bands, "--fill"),
        classes=fit_classes(
            tuple(_parse_class(text, index) for index, text in enumerate(options.classes)) or model.classes,
            meaning,
            model.name,
        ),
    )
    if not (isinstance(model.network, UNet | ExportedNetwork) or is_factory(model.architecture)):
        model = replace(model, network=export_network(model.network, bands, model.name))
    save_model(model, target)
    said = read_description(target)
    runs_code = said.architecture != UNET_ARCHITECTURE
    trusted = target if is_factory(said.architecture) else said.artifact
    note = f"\nto load it: --trust-model, or --sha256 {hash_file(trusted)} (of {trusted.name})" if runs_code else ""
    console.result(
        f"{target} and {said.artifact.name}: {count_of(bands, 'band')}, "
        f"{count_of(len(model.classes), 'class')}, {model.parameters:,} parameters\n"
        + "\n".join([*model.remarks, f"task      {meaning.sentence()}"])
        + note,
        {"out": str(target), "weights": str(said.artifact), **_values(said, target)},
    )


def _class_counts(meaning: Meaning) -> set[int | None]:
    """How many classes may be named: of a question of yes and no the yes will do."""
    return {meaning.class_count, *([1] if meaning.task == "binary" else [])}


def _values(said: Description, path: Path) -> dict[str, Any]:
    """What a description says, as JSON."""
    return {
        "model": said.name,
        "architecture": said.architecture,
        "hyperparameters": said.hyperparameters,
        "parameters": said.parameters,
        "bands": list(said.bands),
        "scaling": scaling_objects(said.scaling),
        "fill": list(said.fill),
        "classes": [asdict(entry) for entry in said.classes or default_classes(said.channels)],
        **asdict(said.stated),
        "runs_code": said.architecture != UNET_ARCHITECTURE,
        "sha256": {file.name: hash_file(file) for file in (path, said.artifact) if file.is_file()},
    }


def run_show(console: Console, source: SourceOptions) -> None:
    """Print what a model says of itself. Of a description nothing is loaded, so that it can be looked at untrusted."""
    path = find_description(source.source)
    values = _values(read_description(path), path) if path else _loaded_values(source.load(), source)
    console.result(_explain(values), values)


def _loaded_values(model: SegmentationModel, source: SourceOptions) -> dict[str, Any]:
    file = source.weights or source.source
    return {
        "model": model.name,
        "architecture": model.architecture or _class_of(model.network),
        "hyperparameters": dict(model.hyperparameters),
        "parameters": model.parameters,
        "bands": list(model.bands),
        "scaling": scaling_objects(model.scaling),
        "fill": list(model.fill),
        "classes": [asdict(entry) for entry in model.classes],
        "task": model.task,
        "activation": model.activation,
        "threshold": model.threshold,
        "runs_code": True,
        "sha256": {Path(str(file)).name: model.sha256} if model.sha256 else {},
    }


def _class_of(network: nn.Module) -> str:
    return EXPORTED_ARCHITECTURE if isinstance(network, ExportedNetwork) else type(network).__qualname__


def _explain(values: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={json.dumps(value)}" for key, value in values["hyperparameters"].items())
    parameters = "not said" if values["parameters"] is None else f"{values['parameters']:,}"
    lines = [
        f"model         {values['model']}",
        f"architecture  {values['architecture']}{f'({options})' if options else ''}",
        f"parameters    {parameters}",
        f"task          {_explain_task(values)}",
        f"runs code     {'yes, so --trust-model or --sha256 are asked for' if values['runs_code'] else 'no'}",
        *(f"sha256        {digest}  {name}" for name, digest in values["sha256"].items()),
    ]
    scalings = values["scaling"] or [{"type": "none"}] * len(values["bands"])
    bands = [
        (name, _explain_scaling(scaling), f"{fill:g}")
        for name, scaling, fill in zip(values["bands"], scalings, values["fill"], strict=True)
    ]
    classes = [
        (entry["name"], str(value), "#{:02X}{:02X}{:02X}".format(*entry["colour"]))
        for value, entry in enumerate(values["classes"])
    ]
    tables = [format_table(("band", "scaling", "fill"), bands), format_table(("class", "value", "colour"), classes)]
    return "\n".join(lines) + "\n\n" + "\n\n".join(tables)


def _explain_task(values: Mapping[str, Any]) -> str:
    """What a description says of the values; what it leaves open, a run prints."""
    said = [values["task"] or "task not said"]
    said += [f"activation {values['activation'] or 'not said'}"] if values["task"] != "regression" else []
    said += [f"yes above {values['threshold']:g}"] if values["threshold"] is not None else []
    return ", ".join(said)


def _explain_scaling(entry: Mapping[str, Any]) -> str:
    constants = ", ".join(f"{key} {value:g}" for key, value in entry.items() if key != "type")
    return f"{entry['type']} {constants}".strip()
