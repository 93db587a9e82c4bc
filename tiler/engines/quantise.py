"""int8: a network in 8 bits for each weight and activation, by NNCF on windows of the user's own raster.

NNCF is imported in a process of its own, which ends before the first tile: it would take 0.2 GB of the command's.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.dtypes import dtype_name
from ..base.errors import EngineError, OutputError
from ..base.text import last_line
from ..rasters.nodata import Array
from ..system.files import flush_file, remove_file, write_whole
from ..system.machine import die_with_parent
from ..system.meter import sample_peak
from ..system.process_end import end_with
from .engine import EngineProgram

if TYPE_CHECKING:
    from ..analysis.network import Network

WEIGHTED = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul")
"""Operations that are worth 8 bits; what lies before the first and after the last of them stays in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedNetwork:
    """A network with its ranges fixed, as OpenVINO's model files: data, no code."""

    graph: bytes
    weights: bytes
    peak_bytes: int = 0
    """Of the process that made it."""

    @property
    def digest(self) -> str:
        """SHA-256 of both files."""
        return hashlib.sha256(hashlib.sha256(self.graph).digest() + hashlib.sha256(self.weights).digest()).hexdigest()

    def pack(self, network: Network, threads: int) -> EngineProgram:
        """For workers, to run on windows."""
        return EngineProgram(
            engine="openvino",
            payload=(self.graph, self.weights),
            has_logits=network.has_logits,
            threads=threads,
            precision="int8",
        )

    def write(self, folder: Path) -> None:
        """Keep it in a run's folder, under its digest, in place of any other."""
        places = _places(folder, self.digest)
        for place in [place for place in folder.iterdir() if re.fullmatch(r"int8-\w+\.(xml|bin)", place.name)]:
            if place not in places:
                remove_file(place)
        for place, value in zip(places, (self.graph, self.weights), strict=True):
            write_whole(place, value)
            flush_file(place)

    @classmethod
    def read(cls, folder: Path, digest: str) -> QuantisedNetwork:
        """The one of that digest in a run's folder.

        Raises:
            OutputError: it is not there, or damaged.
        """
        graph, weights = _places(folder, digest)
        try:
            found = cls(graph=graph.read_bytes(), weights=weights.read_bytes())
        except FileNotFoundError as error:
            raise OutputError(
                f"{graph} and {weights.name} must be there, the network in int8 that this output was begun with; "
                "put them back, or segment --overwrite begins anew"
            ) from error
        if found.digest != digest:
            raise OutputError(f"{graph} or {weights.name} is damaged; segment --overwrite begins anew")
        return found


def _places(folder: Path, digest: str) -> tuple[Path, Path]:
    return folder / f"int8-{digest[:16]}.xml", folder / f"int8-{digest[:16]}.bin"


def require_quantiser() -> None:
    """Refuse int8 where NNCF is not installed.

    Raises:
        EngineError: it is not.
    """
    if importlib.util.find_spec("nncf") is None:
        raise EngineError(
            "precision int8 needs NNCF, which is not installed; pip install 'outsize[int8]', or use --precision float32"
        )


def quantise_network(network: Network, images: Sequence[Array], threads: int) -> QuantisedNetwork:
    """Find the range of every activation on images, and fix it for all windows alike.

    Guarantee: the same images give the same network, and what each pixel of a window becomes depends on the pixels
    that the float network needs for it and on nothing else: scales are constants.

    Args:
        images: each (bands, height, width), of the network's dtype.

    Raises:
        EngineError: NNCF is not installed, or it or OpenVINO cannot take this network.
    """
    from ..analysis.network import analyze_network
    from ..rasters.reading import GDAL_CACHE_BYTES
    from ..system.environment import worker_environment
    from .openvino import convert_network

    require_quantiser()
    # In few bits the CPU plugin takes no pixels of int16.
    wider = analyze_network(network.module, network.bands, "int32") if dtype_name(network.dtype) == "int16" else network
    converted = convert_network(wider, threads)
    completed = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        input=pickle.dumps((converted.payload, converted.has_logits, [np.ascontiguousarray(i) for i in images])),
        env={**os.environ, **worker_environment(GDAL_CACHE_BYTES)},
        capture_output=True,
    )
    if completed.returncode:
        reason = last_line(completed.stderr, "its process was killed")
        raise EngineError(f"NNCF cannot quantise this network: {reason}; use --precision float32")
    peak, graph = (int.from_bytes(completed.stdout[at : at + 8], "big") for at in (0, 8))
    return QuantisedNetwork(
        graph=completed.stdout[16 : 16 + graph], weights=completed.stdout[16 + graph :], peak_bytes=peak
    )


def main() -> None:
    """Quantise the network on stdin; its files to stdout."""
    die_with_parent()
    # Whatever is imported may print to stdout, and NNCF does.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    payload, has_logits, images = pickle.loads(sys.stdin.buffer.read())
    with sample_peak(0.05) as peak:
        graph, weights = _quantise(payload, has_logits, images)
    with answer:
        for number in (peak[0], len(graph)):
            answer.write(number.to_bytes(8, "big"))
        answer.write(graph)
        answer.write(weights)


def _quantise(payload: tuple[bytes, bytes], has_logits: bool, images: list[Array]) -> tuple[bytes, bytes]:
    # First: NNCF reports its use to its makers, unless the package that does so is missing, and there it is.
    from .openvino import read_model, serialise_model

    model = read_model(*payload)
    dtype = model.input(0).get_element_type().to_dtype()
    names = find_float_operations(model, has_logits)
    if names is None:
        raise ValueError("it has no convolution and no matrix product")
    nncf: Any = importlib.import_module("nncf")
    quantised = nncf.quantize(
        model,
        nncf.Dataset([image[None].astype(dtype, copy=False) for image in images]),
        subset_size=len(images),
        # Symmetric ranges: zero, which convolutions pad with, is one of the 256 values.
        preset=nncf.QuantizationPreset.PERFORMANCE,
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(names=names, validate=False),
    )
    return serialise_model(quantised)


def find_float_operations(model: Any, has_logits: bool) -> list[str] | None:
    """Names of the operations that stay in float32: scaling before the first weighted operation, and the head after
    the logits, or after the last weighted operation; None where there is no weighted operation.

    Args:
        model: of OpenVINO.
        has_logits: its second result is the logits.
    """
    ordered = list(model.get_ordered_ops())
    weighted = {node.get_friendly_name() for node in ordered if node.get_type_name() in WEIGHTED}
    if not weighted:
        return None
    after: set[str] = set()
    """What has a weighted operation above it."""
    for node in ordered:
        above = {value.get_node().get_friendly_name() for value in node.input_values()}
        if above & (weighted | after):
            after.add(node.get_friendly_name())
    before = [n for n in ordered if n.get_type_name() not in ("Parameter", "Constant", "Result")]
    scaling = {n.get_friendly_name() for n in before} - after - weighted
    if has_logits:
        head = _readers_below(model.get_results()[1].input_value(0))
    else:
        leads: set[str] = set()
        """What has a weighted operation below it."""
        for node in reversed(ordered):
            below = {
                reader.get_node().get_friendly_name() for out in node.outputs() for reader in out.get_target_inputs()
            }
            if below & (weighted | leads):
                leads.add(node.get_friendly_name())
        # A bias or an activation is one with the operation that it follows.
        joined = {
            reader.get_node().get_friendly_name()
            for node in ordered
            if node.get_friendly_name() in weighted
            for out in node.outputs()
            for reader in out.get_target_inputs()
        }
        head = {n.get_friendly_name() for n in before} - leads - weighted - joined
    return sorted(scaling | head)


def _readers_below(output: Any) -> set[str]:
    """Names of what is computed from an output."""
    found: set[str] = set()
    waiting = [output]
    while waiting:
        for reader in waiting.pop().get_target_inputs():
            node = reader.get_node()
            if node.get_type_name() != "Result" and node.get_friendly_name() not in found:
                found.add(node.get_friendly_name())
                waiting.extend(node.outputs())
    return found


if __name__ == "__main__":
    end_with(main)
