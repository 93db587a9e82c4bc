"""`outsize verify`: an output's chunks read, sampled pixels computed again, damaged tiles repaired."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models.segmentation.model import SegmentationModel
from ..tiler.cluster import ClusterOptions
from ..tiler.errors import OutputError, TilerError, UsageError
from ..tiler.fingerprint import hash_network
from ..tiler.memory import format_bytes
from ..tiler.network import Network
from ..tiler.plan import TilePlan
from ..tiler.raster import Raster, ReadOptions
from ..tiler.raster_parts import open_reference
from ..tiler.reference import Reference
from ..tiler.store import read_header
from ..tiler.verify import Fault, Recomputation, Verification, recompute_samples, verify_output
from .console import Console, count_of
from .segment import Preparation, RunListener, SegmentOptions, WriteOptions, segment_raster

SHOWN = 20
"""Faults that are listed; JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What `verify` is told."""

    samples: int
    repair: bool
    model: str | None
    weights: str | None
    trust_model: bool
    sha256: str | None
    memory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """What an output was made from and with."""

    raster: Raster
    model: SegmentationModel
    network: Network
    options: SegmentOptions


def run_verify(console: Console, out: Path, options: VerifyOptions, cluster: ClusterOptions) -> bool:
    """Verify an output, and repair it where asked; whether it is sound now."""
    header = read_header(out)
    plan = TilePlan.from_json(header["plan"])
    with console.step("verify", plan.output_shape[1] * plan.output_shape[2]) as step:
        found = verify_output(out, step.advance)
    _show(console, found)
    maker, reason = _find_maker(header, plan, options)
    sampled = None
    if maker is not None and options.samples:
        sampled = recompute_samples(
            out,
            Reference(raster=maker.raster, plan=plan, network=maker.network, fill=maker.model.fill),
            options.samples,
            found.damaged | frozenset(found.failed) | frozenset(found.unfinished),
            header["kind"],
        )
        console.remark(f"samples   {sampled.sentence()}")
        _list(console, sampled.wrong)
    elif options.samples:
        console.remark(f"samples   not recomputed: {reason}")
    bad = found.damaged | frozenset((fault.row, fault.column) for fault in (sampled.wrong if sampled else ()))
    repaired = None
    if options.repair and bad:
        if maker is None:
            raise UsageError(f"a repair runs the network again: {reason}")
        if not found.has_records:
            raise OutputError(f"{out}.run is not there, which says what is done; repair needs it")
        repaired = _repair(console, out, header, maker, cluster, bad)
    sound = not bad or repaired is not None
    console.result(_sentence(out, found, sampled, bad, repaired), _values(found, sampled, bad, repaired, sound))
    return sound


def _find_maker(header: dict[str, Any], plan: TilePlan, options: VerifyOptions) -> tuple[_Maker | None, str]:
    """The raster and the network of an output; or why they are not at hand."""
    reference = header["source"]
    known = SegmentOptions(
        source=", ".join(reference["paths"]),
        reading=ReadOptions.from_json(reference["options"]),
        model=options.model,
        output=header["kind"],
        memory=options.memory,
        engine=plan.engine,
        method=plan.method,
        workers=None,
        threads=None,
        core=None,
        region=plan.region,
        mark_nodata_context=plan.receptive is not None,
        weights=options.weights,
        trust_model=options.trust_model,
        sha256=options.sha256,
        halo=None if plan.is_known else plan.halo.top,
        halo_stride=None if plan.is_known else plan.stride[0],
    )
    try:
        raster = open_reference(reference)
        model, network = Preparation(known).analyse(raster, known.source)
    except TilerError as error:
        if options.model is not None:
            raise
        return None, str(error)
    fingerprint = header.get("fingerprint", {})
    if hash_network(network) != fingerprint.get("network"):
        why = f"it was made by model {header.get('model') or 'of another name'}, this is {model.name}; give its --model"
        if options.model is not None:
            raise UsageError(why)
        return None, why
    # The run's own fill: its caller may have chosen another than the model's.
    filled = replace(model, fill=tuple(fingerprint["fill"]))
    return _Maker(raster=raster, model=filled, network=network, options=known), ""


def _repair(
    console: Console,
    out: Path,
    header: dict[str, Any],
    maker: _Maker,
    cluster: ClusterOptions,
    bad: frozenset[tuple[int, int]],
) -> int:
    """Compute damaged tiles again, exactly those; how many were done."""
    writing = WriteOptions(redo=bad, zarr_format=header["fingerprint"]["zarr_format"])
    listener = RunListener(console, own_page=cluster.dashboard_address is not None)
    try:
        summary = segment_raster(
            maker.raster, maker.model, maker.network, out, maker.options, cluster, writing, listener
        )
    finally:
        listener.close()
    again = verify_output(out)
    if again.faults:
        raise OutputError(f"{out} is damaged after the repair too: {again.faults[0].reason}; is the disk sound?")
    return summary.tiles


def _show(console: Console, found: Verification) -> None:
    console.remark(
        f"chunks    {count_of(found.chunks, 'chunk')} of {count_of(found.tiles, 'tile')} read, "
        f"{format_bytes(found.stored_bytes)}: {count_of(len(found.faults), 'tile')} damaged"
    )
    if not found.has_records:
        console.remark("records   the run's folder is not there: contents could only be decoded, not compared")
    if found.unfinished:
        console.remark(f"missing   {count_of(len(found.unfinished), 'tile')} not done yet; the same segment goes on")
    if found.failed:
        console.remark(
            f"failed    {count_of(len(found.failed), 'tile')} hold nodata; segment --retry-failed tries them"
        )
    _list(console, found.faults)


def _list(console: Console, faults: tuple[Fault, ...]) -> None:
    for fault in faults[:SHOWN]:
        console.remark(f"damaged   tile {fault.row},{fault.column}: {fault.reason}")
    if len(faults) > SHOWN:
        console.remark(f"damaged   and {len(faults) - SHOWN} more")


def _sentence(
    out: Path,
    found: Verification,
    sampled: Recomputation | None,
    bad: frozenset[tuple[int, int]],
    repaired: int | None,
) -> str:
    if repaired is not None:
        return f"{out}: {count_of(repaired, 'damaged tile')} computed again, every chunk is as it was written"
    if bad:
        return f"{out}: {count_of(len(bad), 'tile')} DAMAGED (--repair computes them again)"
    checked = f", {count_of(sampled.pixels, 'pixel')} computed again and equal" if sampled is not None else ""
    return f"{out}: sound, {count_of(found.chunks, 'chunk')} as written{checked}"


def _values(
    found: Verification,
    sampled: Recomputation | None,
    bad: frozenset[tuple[int, int]],
    repaired: int | None,
    sound: bool,
) -> dict[str, Any]:
    faults = [*found.faults, *(sampled.wrong if sampled else ())]
    return {
        "sound": sound,
        "tiles": found.tiles,
        "chunks": found.chunks,
        "stored_bytes": found.stored_bytes,
        "compared_with_records": found.has_records,
        "damaged_tiles": len(bad),
        "faults": [{"row": f.row, "column": f.column, "reason": f.reason} for f in faults],
        "unfinished_tiles": len(found.unfinished),
        "failed_tiles": len(found.failed),
        "sampled_tiles": sampled.tiles if sampled else 0,
        "sampled_pixels": sampled.pixels if sampled else 0,
        "ties": sampled.ties if sampled else 0,
        "repaired_tiles": repaired or 0,
    }
