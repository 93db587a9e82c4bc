"""`outsize face evaluate`: how well an embedder tells persons apart, as numbers and as a page."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...models.faceid.base.errors import HeadError
from ...models.faceid.base.name_list import compose
from ...models.faceid.embedder.file import load_embedder
from ...models.faceid.gallery.top_k import exact_scores, unit_rows
from ...models.faceid.pictures.images import ImageError, find_people
from ...models.faceid.scores.identification import RANKS, Identification, measure_identification, split_pictures
from ...models.faceid.scores.pair_list import PairList, Shot, read_pairs
from ...models.faceid.scores.verification import (
    FoldAccuracy,
    PairVerification,
    count_blocks,
    measure_folds,
    measure_verification,
    parse_rates,
)
from ...tiler.base.errors import UsageError
from ...tiler.base.text import reason_of
from ...tiler.output.records import writing
from ...tiler.system.files import upload_bytes
from ...tiler.system.machine import find_versions
from ...tiler.system.meter import MemoryMeter
from ...tiler.system.plain_file import open_plain
from ..base.console import Console, count_of, format_rate, format_table
from ..base.page import render_page, require_page_target
from .charts import BINS, draw_cmc, draw_det, draw_roc, draw_scores
from .gallery import require_memory, searching
from .pictures import embed_people

Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What `face evaluate` is told."""

    images: Path | None
    embedder: Path | None
    embeddings: Path | None
    labels: Path | None
    pairs: Path | None
    far: str
    fpir: str
    enrolled: int
    strangers: float
    seed: int
    resize: bool
    memory: str
    report: Path | None
    overwrite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Faces:
    """What is evaluated."""

    unit: npt.NDArray[np.float32]
    names: list[str]
    """The person of each."""
    stems: list[str]
    """Names of the pictures without their ending, or empty texts."""
    values: Values
    """Of where they come from, for JSON."""


def run_face_evaluate(console: Console, options: EvaluateOptions) -> bool:
    """Measure what the faces allow to; False where some pictures could not be used, or are not there for a pair.

    Raises:
        UsageError: inputs that contradict each other, or cannot be read.
        HeadError: faces that allow no measurement at all.
    """
    rates, stranger_rates = parse_rates(options.far.split(",")), parse_rates(options.fpir.split(","))
    if options.report is not None:
        require_page_target(options.report, overwrite=options.overwrite)
    pair_list = read_pairs(options.pairs) if options.pairs is not None else None
    with MemoryMeter() as meter:
        faces = _load(console, options)
        labels = np.unique(faces.names, return_inverse=True)[1]
        folds = _measure_pairs(console, faces, pair_list) if pair_list is not None else None
        with console.step("compare", count_blocks(len(labels)), counts_pixels=False) as step:
            verification = _try(console, lambda: measure_verification(faces.unit, labels, rates, tell=step.advance))
        with searching(console) as tell:
            identification = _try(
                console,
                lambda: measure_identification(
                    faces.unit,
                    labels,
                    split_pictures(
                        labels, templates=options.enrolled, stranger_share=options.strangers, seed=options.seed
                    ),
                    rates=stranger_rates,
                    threads=torch.get_num_threads(),
                    tell=tell,
                ),
            )
    if verification is None and identification is None and folds is None:
        raise HeadError("these faces allow no measurement; what is missing stands above")
    values = {
        **faces.values,
        "people": len(set(faces.names)),
        "pairs": _describe_folds(*folds, options.pairs) if folds else None,
        "verification": _describe_verification(verification) if verification else None,
        "identification": _describe_identification(identification) if identification else None,
        "peak_bytes": meter.peak_bytes,
    }
    source = str(options.images or options.embeddings)
    if options.report is not None:
        page = _render(source, values, verification, identification).encode()
        with writing(options.report):
            upload_bytes(options.report, page)
        values["report"] = str(options.report)
    console.result(_sentence(source, values), values)
    return not values["failed"] and not (values["pairs"] and values["pairs"]["left_out"])


def _try(console: Console, measure: Any) -> Any:
    """None, with a remark, where the faces do not allow it."""
    try:
        return measure()
    except HeadError as error:
        console.remark(str(error))
        return None


def _load(console: Console, options: EvaluateOptions) -> _Faces:
    if (options.images is None) == (options.embeddings is None):
        raise UsageError("give either a folder of pictures with --embedder, or --embeddings with --labels")
    if options.embeddings is not None:
        if options.labels is None:
            raise UsageError("--embeddings needs --labels, the person of each")
        unit, names = _read_embeddings(options.embeddings, options.labels)
        values = {"images": len(names), "failed": [], "embedder": None}
        return _Faces(unit=unit, names=names, stems=[""] * len(names), values=values)
    assert options.images is not None
    if options.embedder is None:
        raise UsageError("pictures need --embedder, a folder of outsize face train")
    embedder = load_embedder(options.embedder)
    require_memory(embedder, options.memory)
    found = find_people(options.images)
    pictures = embed_people(console, embedder, found, resize=options.resize)
    if not pictures.paths:
        raise ImageError(f"none of the pictures in {options.images} can be used; what is wrong stands above")
    values = {**pictures.counts(), "embedder": embedder.sha256, "embedder_source": embedder.source}
    stems = [compose(path.stem) for path in pictures.paths]
    return _Faces(unit=pictures.embeddings, names=pictures.names, stems=stems, values=values)


def _read_embeddings(path: Path, labels: Path) -> tuple[npt.NDArray[np.float32], list[str]]:
    vectors = _read_array(path)
    if labels.suffix == ".npy":
        names = [compose(str(label)) for label in np.atleast_1d(_read_array(labels)).tolist()]
    else:
        try:
            with open_plain(labels) as file:
                names = compose(file.read().decode()).removesuffix("\n").replace("\r\n", "\n").split("\n")
        except (OSError, ValueError) as error:
            raise UsageError(f"{labels} must be labels, one a line, that can be read: {reason_of(error)}") from error
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise UsageError(f"{path} must hold real numbers as (pictures, dim), got {vectors.dtype} {vectors.shape}")
    if len(names) != len(vectors):
        raise UsageError(f"each embedding needs a label, got {len(vectors)} and {len(names)} in {labels}")
    return unit_rows(vectors), names


def _read_array(path: Path) -> npt.NDArray[Any]:
    """Of plain values: an array of Python objects is a pickle, which could run code."""
    try:
        with open_plain(path) as file:
            if file.read(6) != b"\x93NUMPY":
                raise UsageError(f"{path} must be an array of numpy.save, got another kind of file")
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UsageError(f"{path} must be an array that can be read: {reason_of(error)}") from error


def _measure_pairs(console: Console, faces: _Faces, pairs: PairList) -> tuple[FoldAccuracy, int] | None:
    """(accuracy in folds, pairs left out since a picture of theirs is not there)."""
    places = _number_shots(faces)
    known = [pair for pair in pairs.pairs if pair.first in places and pair.second in places]
    lost = [(pair.line, shot) for pair in pairs.pairs for shot in (pair.first, pair.second) if shot not in places]
    told = [
        f"line {line} of the pairs: there is no picture {number} of {name} that can be used"
        for line, (name, number) in lost
    ]
    console.remark_first(told, "of the pairs' pictures cannot be used")
    if not known:
        raise UsageError("not one of the pairs has both its pictures here; names and numbers must be those of the list")
    first = faces.unit[[places[pair.first] for pair in known]]
    second = faces.unit[[places[pair.second] for pair in known]]
    same, fold = np.array([pair.is_same for pair in known]), np.array([pair.fold for pair in known])
    measured = _try(console, lambda: measure_folds(exact_scores(first, second), same, fold))
    return (measured, len(pairs.pairs) - len(known)) if measured is not None else None


def _number_shots(faces: _Faces) -> dict[Shot, int]:
    """Where each picture is: of files NAME_0003 by their number, of embeddings by their order for each label."""
    counts: Counter[str] = Counter()
    places: dict[Shot, int] = {}
    for place, (name, stem) in enumerate(zip(faces.names, faces.stems, strict=True)):
        counts[name] += 1
        if not stem:
            places[name, counts[name]] = place
        elif (number := stem.removeprefix(f"{name}_")).isdecimal() and stem != number:
            places[name, int(number)] = place
    return places


def _describe_folds(accuracy: FoldAccuracy, left_out: int, path: Path | None) -> Values:
    return {
        "list": str(path),
        "accuracy": accuracy.mean,
        "standard_error": accuracy.standard_error,
        "folds": accuracy.accuracies,
        "thresholds": accuracy.thresholds,
        "pairs": accuracy.pairs,
        "left_out": left_out,
    }


def _describe_verification(verification: PairVerification) -> Values:
    return {
        "genuine_pairs": verification.genuine_pairs,
        "impostor_pairs": verification.impostor_pairs,
        "points": [asdict(point) for point in verification.points],
    }


def _describe_identification(found: Identification) -> Values:
    """All but the scores, of which there may be millions."""
    names = ("people", "templates", "known", "strangers", "match_rates")
    return {**{name: getattr(found, name) for name in names}, "points": [asdict(point) for point in found.points]}


def _sentence(source: str, values: Values) -> str:
    lines = [f"{source}: {count_of(values['people'], 'person')} with {count_of(values['images'], 'picture')}"]
    if values["failed"]:
        lines[0] += f", {len(values['failed'])} failed"
    if verification := values["verification"]:
        rows = [
            [format_rate(p["rate"]), *(_cells(p["threshold"], p["true_accept_rate"], p["false_accepts"], p["is_sure"]))]
            for p in verification["points"]
        ]
        lines += [
            "",
            f"verification of {verification['genuine_pairs']:,} pairs of one person and "
            f"{verification['impostor_pairs']:,} of two",
            format_table(("false accept rate", "threshold", "true accept rate", "false accepts"), rows),
        ]
    if pairs := values["pairs"]:
        lines += [
            "",
            f"accuracy on {pairs['pairs']:,} pairs in {len(pairs['folds'])} folds: {100 * pairs['accuracy']:.2f} % +- "
            f"{100 * pairs['standard_error']:.2f}" + (f", {pairs['left_out']} left out" if pairs["left_out"] else ""),
        ]
    if found := values["identification"]:
        shown = [rank for rank in RANKS if rank <= len(found["match_rates"])]
        ranks = ", ".join(f"rank-{rank} {100 * found['match_rates'][rank - 1]:.2f} %" for rank in shown)
        rows = [
            [format_rate(p["rate"]), *(_cells(p["threshold"], p["missed_rate"], p["named_strangers"], p["is_sure"]))]
            for p in found["points"]
        ]
        lines += [
            "",
            f"identification of {found['known']:,} pictures among {found['people']:,} persons: {ranks}",
            format_table(("strangers named", "threshold", "known missed", "strangers"), rows),
        ]
    measured = [part["points"] for part in (values["verification"], values["identification"]) if part]
    if not all(point["is_sure"] for points in measured for point in points):
        lines.append("? fewer than 10 are allowed: uncertain; - not even one: these pictures cannot tell")
    return "\n".join(lines)


def _cells(threshold: float | None, share: float | None, count: int, is_sure: bool) -> list[str]:
    if threshold is None or share is None:
        return ["-", "-", "-"]
    return [f"{threshold:.6f}", f"{share:.4f}{'' if is_sure else ' ?'}", f"{count:,}"]


def _render(
    source: str, values: Values, verification: PairVerification | None, identification: Identification | None
) -> str:
    """The page's text."""
    sure = [point for point in verification.points if point.is_sure] if verification else []
    content: Values = {
        "out": source,
        "values": values,
        "headline": asdict(sure[-1]) if sure else None,
        "folds": list(zip(values["pairs"]["folds"], values["pairs"]["thresholds"], strict=True))
        if values["pairs"]
        else [],
        "roc": None,
        "scores": None,
        "cmc": draw_cmc(identification.match_rates) if identification else None,
        "det": None,
        "versions": find_versions(),
        "command": sys.argv[1:],
    }
    if verification is not None:
        far, tar = verification.curve()
        measured = [
            (point.rate, point.true_accept_rate)
            for point in verification.points
            if point.true_accept_rate is not None and point.is_sure
        ]
        content["roc"] = draw_roc(far, tar, measured, verification.impostor_pairs)
        content["scores"] = draw_scores(*verification.histogram(BINS))
    if identification is not None and identification.strangers:
        content["det"] = draw_det(
            *identification.curve(),
            [(p.rate, p.missed_rate) for p in identification.points if p.missed_rate is not None and p.is_sure],
            identification.strangers,
        )
    return render_page("face_evaluate.html", "faces", content, rate=format_rate)
