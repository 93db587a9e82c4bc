"""Model descriptions: STAC items of the Machine Learning Model extension (MLM v1.5), to and from values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....tiler.base.errors import UsageError
from ....tiler.base.text import reason_of
from ....tiler.system.files import MOST_TEXT, read_regular
from ..networks.meaning import Meaning, Statement
from ..networks.model import SegmentationClass, SegmentationModel, default_bands, meaning_of
from ..networks.palette import default_colour
from ..networks.scaling import Scaling, ScalingKind
from ..networks.trust import ModelFileError

_EXTENSIONS = (
    "https://stac-extensions.github.io/mlm/v1.5.0/schema.json",
    "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
_MULTIHASH = "1220"
"""What stands before a SHA-256 in `file:checksum`: its code and its length in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """The file beside a description that holds the weights, or the whole network."""

    name: str
    kind: str
    """`mlm:artifact_type`."""
    media_type: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a description says."""

    name: str
    architecture: str
    hyperparameters: dict[str, Any]
    bands: tuple[str, ...]
    scaling: Scaling
    fill: tuple[float, ...]
    classes: tuple[SegmentationClass, ...]
    channels: int
    """Of the network's result, as far as it is said; 0: it is not."""
    stated: Statement
    """What the network's values mean, as far as it is said."""
    parameters: int | None
    artifact: Path
    """The file that holds the weights, or the whole network."""
    artifact_sha256: str | None
    """What the file's hash must be; None where the description does not say."""
    sha256: str = ""
    """Of the description itself."""


def scaling_objects(scaling: Scaling) -> list[dict[str, Any]] | None:
    """MLM's `value_scaling`, one object a band; None where nothing is scaled."""
    if scaling.kind == "none":
        return None
    objects: list[dict[str, Any]] = []
    for kind, subtract, divide in zip(scaling.kinds, scaling.subtract, scaling.divide, strict=True):
        match kind:
            case "z-score":
                objects.append({"type": kind, "mean": subtract, "stddev": divide})
            case "min-max":
                objects.append({"type": kind, "minimum": subtract, "maximum": subtract + divide})
            case "scale":
                objects.append({"type": kind, "value": divide})
            case "offset" | "none":
                # A band left as it is among others that are scaled: readers disagree on how to write null there.
                objects.append({"type": "offset", "value": subtract})
    return objects


def _band_scaling(entry: Mapping[str, Any] | None) -> tuple[ScalingKind, float, float]:
    kind = None if entry is None else entry["type"]
    if entry is None or kind is None:
        return "none", 0.0, 1.0
    match kind:
        case "z-score":
            return kind, float(entry["mean"]), float(entry["stddev"])
        case "min-max":
            return kind, float(entry["minimum"]), float(entry["maximum"]) - float(entry["minimum"])
        case "offset":
            return kind, float(entry["value"]), 1.0
        case "scale":
            return kind, 0.0, float(entry["value"])
    raise ModelFileError(
        f'value_scaling of type "{kind}" is not supported, only z-score, min-max, offset, scale and null; '
        "do it in the network's forward, and give that network"
    )


def scaling_from_objects(objects: Sequence[Mapping[str, Any] | None] | None, bands: int) -> Scaling:
    """The scaling of MLM's `value_scaling`: one object a band, one for all bands, or none at all.

    Raises:
        ModelFileError: a type that is no affine map of one band, or another number of objects.
    """
    if not objects:
        return Scaling.none(bands)
    if len(objects) == 1:
        objects = list(objects) * bands
    if len(objects) != bands:
        raise ModelFileError(f"value_scaling must hold one object or one for each of {bands} bands, got {len(objects)}")
    kinds, subtract, divide = zip(*(_band_scaling(entry) for entry in objects), strict=True)
    return Scaling(kind=kinds, subtract=subtract, divide=divide)


def describe(
    model: SegmentationModel,
    *,
    architecture: str,
    hyperparameters: Mapping[str, Any],
    artifact: Artifact,
    card: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The STAC MLM item of a model whose `artifact` lies beside it."""
    meaning = meaning_of(model)
    tasks = ["regression" if meaning.task == "regression" else "semantic-segmentation"]
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(_EXTENSIONS),
        "id": model.name,
        "geometry": None,
        "properties": {
            "datetime": None,
            "start_datetime": "1900-01-01T00:00:00Z",
            "end_datetime": "9999-12-31T23:59:59Z",
            "mlm:name": model.name,
            "mlm:architecture": architecture,
            "mlm:tasks": tasks,
            "mlm:framework": "pytorch",
            "mlm:pretrained": False,
            "mlm:total_parameters": model.parameters,
            # MLM allows no empty object here.
            **({"mlm:hyperparameters": dict(hyperparameters)} if hyperparameters else {}),
            "mlm:input": [_describe_input(model)],
            "mlm:output": [_describe_output(model, meaning, tasks)],
            **({"outsize:task": meaning.task} if meaning.task else {}),
            **({"outsize:activation": meaning.activation} if meaning.activation else {}),
            **({"outsize:threshold": meaning.threshold} if meaning.task == "binary" else {}),
            "outsize:fill": list(model.fill),
            **({"outsize:card": card} if card else {}),
        },
        "links": [],
        "assets": {
            "weights": {
                "href": f"./{artifact.name}",
                "type": artifact.media_type,
                "title": "Weights",
                "roles": ["mlm:model", "mlm:weights"],
                "mlm:artifact_type": artifact.kind,
                "file:checksum": f"{_MULTIHASH}{artifact.sha256}",
                "bands": _describe_bands(model),
            }
        },
    }


def _describe_bands(model: SegmentationModel) -> list[dict[str, str]]:
    return [{"name": band} for band in model.bands]


def _describe_input(model: SegmentationModel) -> dict[str, Any]:
    scaling = scaling_objects(model.scaling)
    return {
        "name": "image",
        "bands": _describe_bands(model),
        "input": {
            "shape": [1, len(model.bands), -1, -1],
            "dim_order": ["batch", "channel", "height", "width"],
            "data_type": "float32",
        },
        **({"value_scaling": scaling} if scaling else {}),
    }


def _describe_output(model: SegmentationModel, meaning: Meaning, tasks: list[str]) -> dict[str, Any]:
    return {
        "name": _name_result(meaning),
        "tasks": tasks,
        "result": {
            "shape": [1, meaning.channels, -1, -1],
            "dim_order": ["batch", "channel", "height", "width"],
            "data_type": "float32",
        },
        **(_channel_fields(model) if meaning.task == "regression" else _class_fields(model)),
    }


def _name_result(meaning: Meaning) -> str:
    if meaning.task == "regression":
        return "values"
    return {"none": "logits", "argmax": "classes"}.get(meaning.activation or "none", "probabilities")


def _class_fields(model: SegmentationModel) -> dict[str, Any]:
    if not model.classes:
        return {}
    return {
        "classification:classes": [
            {"value": value, "name": entry.name, "color_hint": "{:02X}{:02X}{:02X}".format(*entry.colour)}
            for value, entry in enumerate(model.classes)
        ]
    }


def _channel_fields(model: SegmentationModel) -> dict[str, Any]:
    """Names of what is no class, for which MLM has no field."""
    return {"outsize:channels": [entry.name for entry in model.classes]}


def _only(entries: Sequence[Mapping[str, Any]], what: str) -> Mapping[str, Any]:
    if len(entries) != 1:
        raise ModelFileError(f"{what} must hold one entry, got {len(entries)}; only networks of one image are run")
    return entries[0]


def _read_bands(source: Mapping[str, Any]) -> tuple[str, ...]:
    shape = source.get("input", {}).get("shape", [])
    if shape and len(shape) != 4:
        raise ModelFileError(f"the input must have 4 dimensions (batch, channel, height, width), got {shape}")
    for name in ("pre_processing_function", "resize_type"):
        if source.get(name):
            raise ModelFileError(
                f"{name} {source[name]!s:.60} is not supported; apply it to the raster first, or in the network's "
                "forward"
            )
    entries = source.get("bands") or []
    for entry in entries:
        if isinstance(entry, dict) and entry.get("expression") is not None:
            raise ModelFileError(
                f"band {entry['name']} is computed from others ({entry['expression']!s:.60}), which is not supported; "
                "compute it into the raster, and name it as a plain band"
            )
    if not entries:
        if not shape or int(shape[1]) < 1:
            raise ModelFileError("mlm:input must name its bands, or give their number in its shape")
        return default_bands(_count(shape[1], "bands"))
    return tuple(str(entry["name"] if isinstance(entry, dict) else entry) for entry in entries)


_MOST_CHANNELS = 65_535


def _count(extent: Any, what: str) -> int:
    """A number of bands or classes that a shape gives."""
    if int(extent) > _MOST_CHANNELS:
        raise ModelFileError(f"a network has at most {_MOST_CHANNELS} {what}, got {extent}")
    return int(extent)


def parse_colour(text: str) -> tuple[int, int, int]:
    """RGB of RRGGBB, with or without #.

    Raises:
        ValueError: another text.
    """
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


def _read_classes(result: Mapping[str, Any]) -> tuple[SegmentationClass, ...]:
    entries = sorted(result.get("classification:classes") or [], key=lambda entry: entry["value"])
    values = [entry["value"] for entry in entries]
    if values != list(range(len(entries))):
        raise ModelFileError(
            f"class values must be the output's channels 0, 1, 2, ..., got {values}; "
            "give channels without a class a name too"
        )
    if not entries:
        names = result.get("outsize:channels") or []
        return tuple(SegmentationClass(name=str(name), colour=default_colour(at)) for at, name in enumerate(names))
    return tuple(
        SegmentationClass(
            name=str(entry.get("name") or entry.get("description") or f"class {value}"),
            colour=parse_colour(entry["color_hint"]) if entry.get("color_hint") else default_colour(value),
        )
        for value, entry in enumerate(entries)
    )


def _count_channels(result: Mapping[str, Any], classes: int) -> int:
    shape = result.get("result", {}).get("shape", [])
    said = _count(shape[1], "classes") if len(shape) == 4 else 0
    return said if said > 0 else classes


def _read_statement(properties: Mapping[str, Any], output: Mapping[str, Any]) -> Statement:
    tasks = output.get("tasks") or properties.get("mlm:tasks") or []
    threshold = properties.get("outsize:threshold")
    return Statement(
        task=properties.get("outsize:task") or ("regression" if tasks == ["regression"] else None),
        activation=properties.get("outsize:activation"),
        threshold=None if threshold is None else float(threshold),
    )


def _find_asset(assets: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The model's asset: ours is called "weights", others are found by their role."""
    asset = assets.get("weights") or next(
        (asset for asset in assets.values() if "mlm:model" in asset.get("roles", [])), None
    )
    if asset is None:
        raise ModelFileError('no asset has the role "mlm:model"; it must say where the weights are')
    if "://" in asset["href"]:
        raise ModelFileError(
            f"the weights are at {asset['href']}, and nothing is downloaded; put them beside the description, and "
            "their name into its href"
        )
    return asset


def spare_path(artifact: Path, sha256: str) -> Path:
    """Where `save_model` keeps a description's file until that has its own name, which an earlier one may have."""
    return artifact.with_name(f".{artifact.stem}-{sha256}{artifact.suffix}")


def read_description(path: Path) -> Description:
    """What a STAC MLM item says; data, nothing is run.

    Raises:
        ModelFileError: a file that cannot be read, is no such item, or says something that is not supported.
    """
    try:
        text = read_regular(path, MOST_TEXT)
        item = json.loads(text)
        properties = item["properties"]
        source, output = _only(properties["mlm:input"], "mlm:input"), _only(properties["mlm:output"], "mlm:output")
        bands = _read_bands(source)
        classes = _read_classes(output)
        asset = _find_asset(item["assets"])
        checksum = str(asset.get("file:checksum", ""))
        artifact = path.parent / asset["href"]
        sha256 = checksum.removeprefix(_MULTIHASH) if checksum.startswith(_MULTIHASH) else None
        if sha256 is not None and (spare := spare_path(artifact, sha256)).is_file():
            # A kill left it.
            artifact = spare
        return Description(
            name=properties["mlm:name"],
            architecture=properties["mlm:architecture"],
            hyperparameters=dict(properties.get("mlm:hyperparameters") or {}),
            bands=bands,
            scaling=scaling_from_objects(source.get("value_scaling"), len(bands)),
            fill=tuple(float(value) for value in properties.get("outsize:fill", [0.0] * len(bands))),
            classes=classes,
            channels=_count_channels(output, len(classes)),
            stated=_read_statement(properties, output),
            parameters=properties.get("mlm:total_parameters"),
            artifact=artifact,
            artifact_sha256=sha256,
            sha256=hashlib.sha256(text).hexdigest(),
        )
    except UsageError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {reason_of(error)}") from error
    except KeyError as error:
        raise ModelFileError(f"{path} is not a model description of MLM: it lacks {error}") from error
    except (IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path} is not a model description of MLM: {error!r}") from error
