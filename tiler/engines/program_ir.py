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


def split_model(graph: bytes, weights: bytes | memoryview, kept: dict[str, bytes] | None = None) -> ModelParts:
    """Take a serialised model (OpenVINO IR, version 10 and later) apart.

    Args:
        kept: constants that are held already, by name: those are not held once more, and new ones are added.
    """
    kept = {} if kept is None else kept
    root = ElementTree.fromstring(graph)
    constants: dict[str, bytes] = {}
    for data in _constants_of(root):
        offset, size = int(data.attrib.pop("offset")), int(data.attrib["size"])
        with memoryview(weights) as whole, whole[offset : offset + size] as value:
            name = hashlib.sha256(value).hexdigest()
            if name not in kept:
                kept[name] = bytes(value)
        constants[name] = kept[name]
        data.set("sha256", name)
    return ModelParts(graph=ElementTree.tostring(root), constants=constants)


def names_of(graph: bytes) -> list[str]:
    """The constants that a graph needs."""
    return [data.attrib["sha256"] for data in _constants_of(ElementTree.fromstring(graph))]


def join_models(graphs: dict[str, bytes], constants: dict[str, bytes]) -> tuple[dict[str, bytes], bytearray]:
    """(graphs, weights) of models under their names, as OpenVINO reads them; each constant is there once.

    Args:
        constants: of all of them, by name. Emptied, as one after the other goes over: they may be large.
    """
    offsets: dict[str, int] = {}
    weights = bytearray()
    for name in list(constants):
        weights += bytes(-len(weights) % ALIGNMENT)
        offsets[name] = len(weights)
        weights += constants.pop(name)
    joined: dict[str, bytes] = {}
    for key, graph in graphs.items():
        root = ElementTree.fromstring(graph)
        for data in _constants_of(root):
            data.set("offset", str(offsets[data.attrib.pop("sha256")]))
        joined[key] = ElementTree.tostring(root)
    return joined, weights
