"""Model files: weights as safetensors, everything else as a STAC item of the Machine Learning Model extension."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...tiler.errors import UsageError
from .model import Scaling, SegmentationClass, SegmentationModel
from .unet import UNet

MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.5.0/schema.json"
CLASSIFICATION_SCHEMA = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"
ARCHITECTURE = "outsize.models.segmentation.UNet"


class ModelFileError(UsageError):
    """A model file that is missing, damaged or of another kind."""


def _scaling_objects(scaling: Scaling) -> list[dict[str, Any]]:
    pairs = zip(scaling.subtract, scaling.divide, strict=True)
    if scaling.kind == "z-score":
        return [{"type": "z-score", "mean": mean, "stddev": deviation} for mean, deviation in pairs]
    return [{"type": "min-max", "minimum": low, "maximum": low + extent} for low, extent in pairs]


def _scaling_from_objects(objects: list[dict[str, Any]]) -> Scaling:
    kinds = {entry["type"] for entry in objects}
    if kinds == {"z-score"}:
        return Scaling(
            kind="z-score",
            subtract=tuple(float(entry["mean"]) for entry in objects),
            divide=tuple(float(entry["stddev"]) for entry in objects),
        )
    if kinds == {"min-max"}:
        low = tuple(float(entry["minimum"]) for entry in objects)
        high = tuple(float(entry["maximum"]) for entry in objects)
        return Scaling(kind="min-max", subtract=low, divide=tuple(h - lo for h, lo in zip(high, low, strict=True)))
    raise ModelFileError(f"value_scaling must be z-score or min-max, the same for every band; got {sorted(kinds)}")


def describe(model: SegmentationModel, weights_name: str, card: dict[str, Any] | None = None) -> dict[str, Any]:
    """The STAC MLM item of a model whose weights lie beside it in `weights_name`."""
    network = model.network
    if not isinstance(network, UNet):
        raise ModelFileError(f"only a UNet can be saved, got {type(network).__name__}")
    bands = [{"name": band} for band in model.bands]
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [MLM_SCHEMA, CLASSIFICATION_SCHEMA],
        "id": model.name,
        "geometry": None,
        "properties": {
            "datetime": None,
            "start_datetime": "1900-01-01T00:00:00Z",
            "end_datetime": "9999-12-31T23:59:59Z",
            "mlm:name": model.name,
            "mlm:architecture": ARCHITECTURE,
            "mlm:tasks": ["semantic-segmentation"],
            "mlm:framework": "pytorch",
            "mlm:pretrained": False,
            "mlm:total_parameters": sum(parameter.numel() for parameter in network.parameters()),
            "mlm:hyperparameters": {"widths": list(network.widths), "norm": network.norm},
            "mlm:input": [
                {
                    "name": "image",
                    "bands": [dict(band) for band in bands],
                    "input": {
                        "shape": [1, len(bands), -1, -1],
                        "dim_order": ["batch", "channel", "height", "width"],
                        "data_type": "float32",
                    },
                    "value_scaling": _scaling_objects(model.scaling),
                }
            ],
            "mlm:output": [
                {
                    "name": "logits",
                    "tasks": ["semantic-segmentation"],
                    "result": {
                        "shape": [1, len(model.classes), -1, -1],
                        "dim_order": ["batch", "channel", "height", "width"],
                        "data_type": "float32",
                    },
                    "classification:classes": [
                        {
                            "value": value,
                            "name": entry.name,
                            "color_hint": "{:02X}{:02X}{:02X}".format(*entry.colour),
                        }
                        for value, entry in enumerate(model.classes)
                    ],
                }
            ],
            "outsize:fill": list(model.fill),
            **({"outsize:card": card} if card else {}),
        },
        "links": [],
        "assets": {
            "weights": {
                "href": f"./{weights_name}",
                "type": "application/vnd.safetensors",
                "title": "Weights",
                "roles": ["mlm:model", "mlm:weights"],
                "mlm:artifact_type": "safetensors.torch.save_file",
                "bands": [dict(band) for band in bands],
            }
        },
    }


def _files(path: str | Path) -> tuple[Path, Path]:
    """(description, weights) of a model; a name may hold dots of its own, such as unet-1.5."""
    path = Path(path)
    name = path.name.removesuffix(".json").removesuffix(".safetensors")
    return path.with_name(f"{name}.json"), path.with_name(f"{name}.safetensors")


def save_model(model: SegmentationModel, path: str | Path, card: dict[str, Any] | None = None) -> SegmentationModel:
    """Write PATH.safetensors and PATH.json (either suffix of `path` is dropped); returns the model with its hash.

    Args:
        card: what was measured about the model, stored under `outsize:card`.

    Raises:
        ModelFileError: a network that is not a UNet.
    """
    item_path, weights = _files(path)
    description = describe(model, weights.name, card)
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(state, weights)
    item_path.write_text(json.dumps(description, indent=1) + "\n")
    return load_model(item_path)


def default_model_path() -> Path:
    """The shipped model's description."""
    return Path(str(resources.files("outsize.models.segmentation") / "weights" / "sample-unet.json"))


def load_model(path: str | Path | None = None) -> SegmentationModel:
    """The model described by a STAC MLM item (.json) with safetensors weights beside it; None: the shipped default.

    Only data is read: neither file can run code.

    Raises:
        ModelFileError: a file that is missing, damaged, or describes another architecture.
    """
    description_path = default_model_path() if path is None else _files(path)[0]
    if not description_path.is_file():
        raise ModelFileError(f"no model at {description_path}; give the .json that save_model wrote")
    try:
        item = json.loads(description_path.read_text())
        properties = item["properties"]
        if properties["mlm:architecture"] != ARCHITECTURE:
            raise ModelFileError(f"{description_path}: architecture must be {ARCHITECTURE}, got {item!r:.80}")
        source, result = properties["mlm:input"][0], properties["mlm:output"][0]
        bands = tuple(band["name"] if isinstance(band, dict) else str(band) for band in source["bands"])
        classes = tuple(
            SegmentationClass(name=entry["name"], colour=tuple(bytes.fromhex(entry["color_hint"])))  # pyright: ignore[reportArgumentType]
            for entry in result["classification:classes"]
        )
        options = properties["mlm:hyperparameters"]
        scaling = _scaling_from_objects(source["value_scaling"])
        fill = tuple(float(value) for value in properties.get("outsize:fill", [0.0] * len(bands)))
        weights = description_path.parent / item["assets"]["weights"]["href"]
    except (KeyError, IndexError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise ModelFileError(f"{description_path} is not a model description of ours: {error!r}") from error
    network = UNet(len(bands), len(classes), tuple(options["widths"]), norm=options.get("norm", "none"))
    try:
        network.load_state_dict(load_file(weights))
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except (OSError, SafetensorError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else repr(error)
        raise ModelFileError(
            f"{weights} does not hold the weights that {description_path.name} describes: {first_line}"
        ) from error
    return SegmentationModel(
        name=properties["mlm:name"],
        network=network.eval(),
        bands=bands,
        scaling=scaling,
        fill=fill,
        classes=classes,
        sha256=digest,
    )
