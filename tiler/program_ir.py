"""OpenVINO's model files with their constants told apart, so that programs of one network share their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

ALIGNMENT = 64
"""Of constants, in bytes: what vector instructions like."""


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A model: its graph, whose constants are named by their SHA-256, and the constants."""

    graph: bytes
    constants: dict[str, bytes]


def _constants_of(graph: ElementTree.Element) -> Iterable[ElementTree.Element]:
    for layer in graph.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            yield data


def split_model(graph: bytes, weights: bytes) -> ModelParts:
    """Take a serialised model (OpenVINO IR, version 10 and later) apart."""
    root = ElementTree.fromstring(graph)
    constants: dict[str, bytes] = {}
    for data in _constants_of(root):
        offset, size = int(data.attrib.pop("offset")), int(data.attrib["size"])
        value = weights[offset : offset + size]
        name = hashlib.sha256(value).hexdigest()
        constants[name] = value
        data.set("sha256", name)
    return ModelParts(graph=ElementTree.tostring(root), constants=constants)


def names_of(graph: bytes) -> list[str]:
    """The constants that a graph needs."""
    return [data.attrib["sha256"] for data in _constants_of(ElementTree.fromstring(graph))]


def join_models(models: dict[str, ModelParts]) -> tuple[dict[str, bytes], bytes]:
    """(graphs, weights) of models under their names, as OpenVINO reads them; each constant is there once."""
    offsets: dict[str, int] = {}
    parts: list[bytes] = []
    length = 0
    for model in models.values():
        for name, value in model.constants.items():
            if name not in offsets:
                padding = -length % ALIGNMENT
                parts += [bytes(padding), value]
                offsets[name] = length + padding
                length += padding + len(value)
    graphs: dict[str, bytes] = {}
    for key, model in models.items():
        root = ElementTree.fromstring(model.graph)
        for data in _constants_of(root):
            data.set("offset", str(offsets[data.attrib.pop("sha256")]))
        graphs[key] = ElementTree.tostring(root)
    return graphs, b"".join(parts)
