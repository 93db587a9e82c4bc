"""`outsize verify`: an output's chunks read, sampled pixels computed again, damaged tiles repaired."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...models.segmentation.networks.model import SegmentationModel
from ...tiler.analysis.network import Network
from ...tiler.analysis.network_hash import hash_network
from ...tiler.base.errors import OutputError, TilerError, UsageError
from ...tiler.base.text import format_bytes
from ...tiler.cluster.client import ClusterOptions
from ...tiler.engines.engine import Engine
from ...tiler.engines.loading import compile_program, load_windows
from ...tiler.engines.quantise import QuantisedNetwork
from ...tiler.engines.torch import AUTOCAST, load_reference
from ...tiler.output.fingerprint import find_differences, fingerprint_raster, state_before
from ...tiler.output.options import WriteOptions
from ...tiler.output.records import run_folder
from ...tiler.output.resume import source_paths
from ...tiler.output.small_parts import mend_parts
from ...tiler.output.store import plan_of, read_header
from ...tiler.planning.options import PlanOptions
from ...tiler.planning.plan import TilePlan
from ...tiler.rasters.parts import open_reference, reference_to
from ...tiler.rasters.raster import Raster, ReadOptions
from ...tiler.runs.reference import Reference
from ...tiler.runs.request import Scope
from ...tiler.runs.verify import Fault, Recomputation, Verification, recompute_samples, tile_states, verify_output
from ..base.console import Console, count_of
from .run import Preparation, RunListener, SegmentOptions, segment_raster

SHOWN = 20
"""Faults that are listed; JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What `verify` is told."""

    samples: int
    repair: bool
    model: str | None
    weights: str | None
    weights_key: str | None
    trust_model: bool
    sha256: str | None
    memory: str | None
    source_unchanged: bool = False
    trust_sources: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """What an output was made from and with."""

    raster: Raster
    model: SegmentationModel
    network: Network
    options: SegmentOptions
    engine: Engine | None = None
    """Of a network in few bits: float32 tells nothing exact of it."""
    source_unchanged: bool = False
    """As the user says, where the raster's files were put back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repair:
    """What a repair did."""

    parts: int
    """Arrays whose metadata or values were written again."""
    done: frozenset[tuple[int, int]]
    failed: tuple[tuple[int, int, str], ...]
    """(row, column, reason) of damaged tiles that could not be computed again, and are nodata now."""


def run_verify(console: Console, out: Path, options: VerifyOptions, cluster: ClusterOptions) -> str:
    """Verify an output, and repair it where asked; its state now: "sound", "partial" (with failed tiles), "unfinished",
    or "damaged"."""
    header = read_header(out)
    plan = plan_of(out, header)
    with console.step("verify", plan.output_shape[1] * plan.output_shape[2]) as step:
        found = verify_output(out, step.advance)
    _show(console, found)
    mended = len(found.parts) if options.repair else 0
    if mended:
        mend_parts(out, found.parts, tile_states(out, header))
        # With its metadata an array's chunks can be decoded, too.
        found = verify_output(out)
        if found.parts:
            raise OutputError(f"{out} is damaged after the repair too: {found.parts[0].reason}; is the disk sound?")
    maker, why = _find_maker(out, header, plan, options)
    sampled = None
    if options.samples and any(part.array == header["kind"] for part in found.parts):
        console.remark(f"samples   not recomputed: {found.parts[0].reason}")
    elif maker is not None and options.samples:
        sampled = recompute_samples(
            out,
            Reference(
                raster=maker.raster,
                plan=plan,
                network=maker.network,
                fill=maker.model.fill,
                engine=maker.engine,
            ),
            options.samples,
            found.damaged | frozenset(found.failed) | frozenset(found.unfinished),
            header["kind"],
        )
        console.remark(f"samples   {sampled.sentence()}")
        _list(console, sampled.wrong)
    elif options.samples:
        console.remark(f"samples   not recomputed: {why}")
    bad = found.damaged | frozenset((fault.row, fault.column) for fault in (sampled.wrong if sampled else ()))
    state, repair = ("damaged" if bad else found.state), None
    if options.repair and (bad or mended):
        repair = _Repair(parts=mended, done=frozenset(), failed=())
        if bad:
            if maker is None:
                raise type(why)(f"a repair runs the network again: {why}")
            if not found.has_records:
                raise OutputError(f"{out}.run is not there, which says what is done; repair needs it")
            repair, state = _repair(console, out, header, maker, cluster, bad, mended)
    console.result(_sentence(out, found, sampled, bad, state, repair), _values(found, sampled, bad, state, repair))
    return state


def _find_maker(
    out: Path, header: dict[str, Any], plan: TilePlan, options: VerifyOptions
) -> tuple[_Maker | None, TilerError]:
    """The raster and the network of an output; or why they are not at hand."""
    reference = header["source"]
    known = SegmentOptions(
        source=", ".join(reference["paths"]),
        reading=ReadOptions.from_json(reference["options"]),
        model=options.model,
        output=header["kind"],
        planning=PlanOptions(
            memory=options.memory,
            engine=plan.engine,
            method=plan.method,
            precision=plan.precision,
            device=plan.device.partition(":")[0],
            compiles=plan.compiles,
            region=plan.wanted_region,
            mark_nodata_context=plan.receptive is not None,
        ),
        weights=options.weights,
        weights_key=options.weights_key,
        task=header.get("task"),
        activation=header.get("activation"),
        threshold=header.get("threshold"),
        trust_model=options.trust_model,
        sha256=options.sha256,
        halo=None if plan.is_known else plan.halo.top,
        halo_stride=None if plan.is_known else plan.stride[0],
    )
    try:
        raster = open_reference(reference, trust=options.trust_sources)
        model, network = Preparation(known, Console()).analyse(raster)
    except TilerError as error:
        if options.model is not None:
            raise
        return None, error
    fingerprint = header["fingerprint"]
    now = fingerprint_raster(raster) | (state_before(header) if options.source_unchanged else {})
    differences = find_differences(
        {name: fingerprint.get(name) for name in now}, now, (source_paths(header), reference_to(raster)["paths"])
    )
    if differences:
        return None, OutputError(f"{'; '.join(differences)}; segment --overwrite makes {out} anew")
    if hash_network(network) != fingerprint.get("network"):
        why = f"it was made by model {header.get('model') or 'of another name'}, this is {model.name}; give its --model"
        if options.model is not None:
            raise UsageError(why)
        return None, UsageError(why)
    # The run's own fill: its caller may have chosen another than the model's.
    filled = replace(model, fill=tuple(fingerprint["fill"]))
    try:
        engine = _open_fewer_bits(out, network, fingerprint, plan)
    except TilerError as error:
        return None, error
    return _Maker(
        raster=raster,
        model=filled,
        network=network,
        options=known,
        engine=engine,
        source_unchanged=options.source_unchanged,
    ), UsageError("")


def _open_fewer_bits(out: Path, network: Network, fingerprint: dict[str, Any], plan: TilePlan) -> Engine | None:
    """The network in few bits that made an output; None where float32 is near enough to compare with.

    Raises:
        OutputError: it is not in the run's folder, or damaged.
    """
    if plan.precision in AUTOCAST:
        return load_reference(compile_program(network, "torch", plan.threads, plan.precision))
    if plan.precision != "int8":
        return None
    found = QuantisedNetwork.read(run_folder(out), str(fingerprint.get("quantised")))
    return load_windows(found.pack(network, plan.threads))


def _repair(
    console: Console,
    out: Path,
    header: dict[str, Any],
    maker: _Maker,
    cluster: ClusterOptions,
    bad: frozenset[tuple[int, int]],
    mended: int,
) -> tuple[_Repair, str]:
    """Compute damaged tiles again, exactly those; the output's state then.

    Raises:
        OutputError: they are damaged after that too.
    """
    writing = WriteOptions(
        source_unchanged=maker.source_unchanged,
        zarr_format=header["fingerprint"].get("zarr_format", 3),
    )
    listener = RunListener(console, own_page=cluster.dashboard_address is not None)
    try:
        summary = segment_raster(
            maker.raster,
            maker.model,
            maker.network,
            out,
            maker.options,
            cluster,
            writing,
            listener,
            scope=Scope(redo=bad, rest=False),
        )
    finally:
        listener.close()
    failed = tuple(entry for entry in summary.failed_tiles if entry[:2] in bad)
    for row, column, reason in failed[:SHOWN]:
        console.remark(f"failed    tile {row},{column}: {reason}")
    if len(failed) > SHOWN:
        console.remark(f"failed    and {len(failed) - SHOWN} more, in {out}.run")
    again = verify_output(out)
    if again.faults:
        raise OutputError(f"{out} is damaged after the repair too: {again.faults[0].reason}; is the disk sound?")
    return _Repair(parts=mended, done=bad - {entry[:2] for entry in failed}, failed=failed), again.state


def _show(console: Console, found: Verification) -> None:
    console.remark(
        f"chunks    {count_of(found.chunks, 'chunk')} of {count_of(found.tiles, 'tile')} read, "
        f"{format_bytes(found.stored_bytes)}: {count_of(len(found.faults), 'tile')} damaged"
    )
    if not found.has_records:
        console.remark("records   the run's folder is not there: contents could only be decoded, not compared")
    if found.unfinished:
        console.remark(f"missing   {count_of(len(found.unfinished), 'tile')} not done yet; the same segment goes on")
    if found.failed and found.is_finished:
        hold = "holds" if len(found.failed) == 1 else "hold"
        console.remark(
            f"failed    {count_of(len(found.failed), 'tile')} {hold} nodata; segment --retry-failed tries again"
        )
    for part in found.parts:
        console.remark(f"damaged   {part.reason}")
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
    state: str,
    repair: _Repair | None,
) -> str:
    unfinished = f"UNFINISHED, {count_of(len(found.unfinished), 'tile')} not done; the same segment goes on"
    if repair is not None:
        said = [f"{count_of(repair.parts, 'array')} of metadata or coordinates written again"] if repair.parts else []
        said += [f"{count_of(len(repair.done), 'damaged tile')} computed again"] if repair.done else []
        if repair.failed:
            tiles = " ".join(f"{row},{column}" for row, column, _ in repair.failed[:SHOWN])
            said += [f"{count_of(len(repair.failed), 'tile')} FAILED, nodata now: {tiles}"]
        end = unfinished if state == "unfinished" else "every chunk is as it was written"
        return f"{out}: {', '.join([*said, *([] if repair.failed else [end])])}"
    if bad or found.parts:
        parts = [count_of(len(bad), "tile")] if bad else []
        parts += [count_of(len(found.parts), "array") + " beside the pixels"] if found.parts else []
        return f"{out}: {' and '.join(parts)} DAMAGED (--repair {'computes' if bad else 'writes'} them again)"
    written = "as written" if found.has_records else "decodable"
    checked = f", {count_of(sampled.pixels, 'pixel')} computed again and equal" if sampled is not None else ""
    chunks = f"{count_of(found.chunks, 'chunk')} {written}{checked}"
    if state == "unfinished":
        return f"{out}: {unfinished}; {chunks}"
    failed = f", {count_of(len(found.failed), 'tile')} FAILED" if found.failed else ""
    return f"{out}: sound, {chunks}{failed}"


def _values(
    found: Verification,
    sampled: Recomputation | None,
    bad: frozenset[tuple[int, int]],
    state: str,
    repair: _Repair | None,
) -> dict[str, Any]:
    faults = [*found.faults, *(sampled.wrong if sampled else ())]
    return {
        "state": state,
        "sound": state == "sound",
        "tiles": found.tiles,
        "chunks": found.chunks,
        "stored_bytes": found.stored_bytes,
        "compared_with_records": found.has_records,
        "damaged_tiles": len(bad),
        "faults": [{"row": f.row, "column": f.column, "reason": f.reason} for f in faults],
        "damaged_arrays": [{"array": part.array, "reason": part.reason} for part in found.parts],
        "unfinished_tiles": len(found.unfinished),
        "failed_tiles": len(found.failed),
        "sampled_tiles": sampled.tiles if sampled else 0,
        "sampled_pixels": sampled.pixels if sampled else 0,
        "ties": sampled.ties if sampled else 0,
        "repaired_arrays": repair.parts if repair else 0,
        "repaired_tiles": len(repair.done) if repair else 0,
        "repair_failures": [
            {"row": row, "column": column, "error": error} for row, column, error in (repair.failed if repair else ())
        ],
    }
