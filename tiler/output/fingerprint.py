"""Fingerprints: what must agree before two runs may write into one output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.network_hash import hash_network
from ..base.differences import say_differences, shorten
from ..engines.registry import ENGINES
from ..system.places import scheme_of

if TYPE_CHECKING:
    from ..analysis.network import Network
    from ..planning.plan import TilePlan
    from ..rasters.raster import Raster
    from .store import OutputDescription


MIXED = "changed while it was read"
"""In place of an input's identity: no raster has it, so that nothing continues such an output."""


BEFORE = {"precision": "float32", "device": "cpu", "compiled": False}
"""What outputs are that were begun when there was no other."""


def make_fingerprint(
    raster: Raster,
    network: Network,
    description: OutputDescription,
    plan: TilePlan,
    fill: tuple[float, ...],
    zarr_format: int,
) -> dict[str, Any]:
    """What a run's result depends on, as plain values."""
    # The network's hash holds it too; this one can be read.
    threshold = {} if description.threshold is None else {"threshold": description.threshold}
    return {
        **fingerprint_raster(raster),
        "region": list(plan.region),
        "nodata_context": plan.receptive is not None,
        "zarr_format": zarr_format,
        "network": hash_network(network),
        "kind": description.kind,
        **threshold,
        "engine": plan.engine,
        # Another version may round otherwise: tiles of two do not belong into one output.
        "engine_version": ENGINES.find(plan.engine).version(),
        "method": plan.method,
        "precision": plan.precision,
        # Devices of one kind may be changed for each other; a CPU and a GPU round otherwise.
        "device": plan.device.partition(":")[0],
        "compiled": plan.compiles,
        "fill": list(fill),
    }


def fingerprint_raster(raster: Raster) -> dict[str, Any]:
    """What tells one raster, read in one way, from another."""
    stored = raster.parts[0].raster if raster.kind == "scaled" else None
    return {
        "input": raster.identity,
        "input_state": raster.state,
        "input_shape": list(raster.shape),
        "input_dtype": str(raster.dtype),
        "input_bands": list(raster.indexes),
        "input_axes": raster.axes,
        "input_nodata": str(raster.nodata_rule if stored is None else stored.nodata_rule),
        **({} if stored is None else {"input_scale": [list(pair) for pair in stored.scale_tags]}),
        **_describe_parts(stored or raster),
        # Before there was a rule for them, NaN and infinity went into the network.
        **({"not_finite": "nodata"} if raster.dtype.kind == "f" else {}),
    }


def _describe_parts(raster: Raster) -> dict[str, Any]:
    """How files of a stack or mosaic are read, where the whole's nodata does not say it."""
    if raster.nodata_rule.mask != "parts" and all(part.raster.kind != "scaled" for part in raster.parts):
        return {}
    told = [fingerprint_raster(part.raster) for part in raster.parts]
    read = [[one["input_nodata"], one.get("input_scale")] for one in told]
    return {"input_parts": read[0] if all(one == read[0] for one in read) else read}


def state_before(header: dict[str, Any]) -> dict[str, Any]:
    """The state of the input of which an output was begun, for a caller who vouches that it holds what it held."""
    stored = header.get("fingerprint")
    return {"input_state": stored.get("input_state") if isinstance(stored, dict) else None}


def find_differences(
    stored: dict[str, Any], ours: dict[str, Any], paths: tuple[Sequence[str], Sequence[str]] = ((), ())
) -> list[str]:
    """One phrase for each part that differs.

    Args:
        paths: of the input, there and now.
    """
    phrases: list[str] = []
    stored = {**{name: value for name, value in BEFORE.items() if name in ours}, **stored}
    if stored.get("input") == MIXED:
        phrases.append("the input was changed while that run read it")
    elif stored.get("input") != ours.get("input"):
        there, now = (", ".join(map(_resolve, side)) for side in paths)
        phrases.append(
            f"the input is another file: {there} there, {now} now"
            if there and there != now
            else "the input's size or time of change is another"
        )
    elif stored.get("input_state") not in (None, ours.get("input_state")):
        # Of what was made before states were kept, size and time must do.
        phrases.append(
            "the input was replaced or written to, its size and time of change put back (or its owner or permissions "
            "were changed, which looks the same); if it holds what it held, --source-unchanged goes on"
        )
    # Of two precisions one has no network in int8 at all.
    left_out = {"input", "input_state"} | ({"quantised"} if stored.get("precision") != ours.get("precision") else set())
    return phrases + say_differences(stored, ours, _say, left_out=left_out)


def _resolve(path: str) -> str:
    """As `file_identity` sees it, so that two spellings are no difference; URLs as they are."""
    return path if scheme_of(path) else str(Path(path).resolve())


def _say(value: Any) -> str:
    """Hashes by their beginning, sentences whole."""
    text = str(value)
    return f"{text[:12]}..." if len(text) > 24 and " " not in text else shorten(text, 80)
