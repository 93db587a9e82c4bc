"""`outsize face enroll`, `calibrate`, `remove` and `gallery`: persons into a gallery, and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.faceid.base.errors import GalleryError, HeadMemoryError
from ...models.faceid.embedder.file import Embedder, load_embedder
from ...models.faceid.gallery.files import find_damage, has_gallery, is_free, read_newest
from ...models.faceid.gallery.gallery import Gallery
from ...models.faceid.gallery.search import Tell
from ...models.faceid.layer.head_plan import PROCESS_BYTES
from ...models.faceid.pictures.images import ImageError, find_people
from ...tiler.base.errors import OutputError, UsageError
from ...tiler.base.text import format_bytes, one_line, parse_bytes
from ...tiler.system.meter import MemoryMeter
from ..base.console import Console, count_of, format_table
from .pictures import BATCH, Pictures, embed_people, group_by_person

SHOWN = 20
"""Names that are listed in a sentence."""
SHOWN_ROWS = 1_000_000
"""Of all passes of a search together, from which on its progress is shown: some tenths of a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrollOptions:
    """What `face enroll` is told."""

    gallery: Path
    images: Path
    embedder: Path
    templates: str
    existing: str
    """What happens to persons who are there already: "refuse", "replace" them, or "add" templates."""
    storage: str
    resize: bool
    calibrate: bool
    memory: str


def run_enroll(console: Console, options: EnrollOptions) -> bool:
    """Enrol the persons of a folder; False where some pictures or persons could not be.

    Raises:
        GalleryError: the gallery is another embedder's, or damaged, or being changed.
        OutputError: the folder holds something else.
        UsageError: no pictures; persons who are there already.
        ImageError: not one picture could be used.
    """
    with MemoryMeter() as meter:
        embedder = load_embedder(options.embedder)
        require_memory(embedder, options.memory)
        gallery = None if _is_new(options.gallery) else open_gallery(options.gallery, embedder, options.memory)
        found = find_people(options.images)
        there = gallery.find(found.people) if gallery is not None else set()
        if there and options.existing == "refuse":
            raise UsageError(
                f"{_list_names(sorted(there))} in {options.gallery} already; --replace puts these pictures in place of "
                f"the old, --add gives them more templates"
            )
        pictures = embed_people(console, embedder, found, resize=options.resize)
        if not pictures.paths:
            raise ImageError(f"none of the pictures in {options.images} can be used; what is wrong stands above")
        names, templates = group_by_person(pictures, each=options.templates == "each")
        lost = sorted(found.people.keys() - set(names) - {path for path, _ in pictures.failed})
        reason = "not one of its pictures can be used"
        console.remark_first([one_line(f"{name}: {reason}") for name in lost], "without a picture that can be used")
        pictures.failed += [(name, reason) for name in lost]
        with nullcontext(gallery) if gallery is not None else _created(options, embedder) as gallery:
            of = gallery.calibration.of if gallery.calibration else "enrolled"
            with searching(console) as tell:
                new = _store(gallery, names, templates, there, options, tell)
        if options.calibrate:
            _remark_calibration(console, gallery, of)
    values = {
        **describe(gallery),
        "new_people": new,
        "changed_people": len(set(names)) - new,
        **pictures.counts(),
        "embedder_source": embedder.source,
        "peak_bytes": meter.peak_bytes,
    }
    changed = f", {count_of(values['changed_people'], 'person')} changed" if values["changed_people"] else ""
    console.result(
        f"{options.gallery}: {count_of(new, 'person')} enrolled{changed} from "
        f"{count_of(len(pictures.paths), 'picture')}{_failed_sentence(pictures)}; {_sentence(gallery)}",
        values,
    )
    return not pictures.failed


def _is_new(place: Path) -> bool:
    """Whether a gallery can be made there; False: there is one.

    Raises:
        OutputError: something else is there.
    """
    if not place.exists() or (place.is_dir() and is_free(place)):
        return True
    if not (place.is_dir() and has_gallery(place)):
        found = f"{min(path.name for path in place.iterdir())} there" if place.is_dir() else "a file"
        raise OutputError(f"{place} must be a gallery, or a new or empty folder, got {found}; choose another folder")
    return False


@contextmanager
def _created(options: EnrollOptions, embedder: Embedder) -> Iterator[Gallery]:
    """A new gallery; if nobody gets into it, nothing is left of it."""
    place, was_there = options.gallery, options.gallery.exists()
    try:
        yield Gallery.create(
            place,
            dim=embedder.description.dim,
            embedder=embedder.sha256,
            storage=options.storage,
            memory=options.memory,
        )
    except BaseException:
        with suppress(GalleryError, OSError):
            Gallery.discard(place)
        with suppress(OSError):
            if not was_there:
                place.rmdir()
        raise


def _store(
    gallery: Gallery, names: list[str], templates: Any, there: set[str], options: EnrollOptions, tell: Tell
) -> int:
    """Put templates of known and new persons into the gallery; how many persons are new."""
    calibrate = options.calibrate
    if options.existing == "add":
        return gallery.enroll(names, templates, add=True, calibrate=calibrate, tell=tell)
    old = [place for place, name in enumerate(names) if name in there]
    fresh = [place for place, name in enumerate(names) if name not in there]
    if old:
        now = calibrate and not fresh
        gallery.replace([names[place] for place in old], templates[old], calibrate=now, tell=tell)
    if not fresh:
        return 0
    return gallery.enroll([names[place] for place in fresh], templates[fresh], calibrate=calibrate, tell=tell)


def run_remove(console: Console, place: Path, names: tuple[str, ...]) -> None:
    """Remove persons; their names and templates are in no file afterwards."""
    gallery = Gallery.open(place)
    before, count = gallery.calibration, len(gallery.find(names))
    with searching(console) as tell:
        templates = gallery.remove(names, calibrate=before is not None, tell=tell)
    if before is not None:
        _remark_calibration(console, gallery, before.of)
    console.result(
        f"{place}: {count_of(count, 'person')} removed with {count_of(templates, 'template')}; {_sentence(gallery)}",
        {**describe(gallery), "removed_people": count, "removed_templates": templates},
    )


@contextmanager
def searching(console: Console) -> Iterator[Tell]:
    """Progress of a search among many rows; one among few is over before there is anything to see."""
    with ExitStack() as opened:
        step, before = None, 0

        def tell(done: int, rows: int) -> None:
            nonlocal step, before
            if rows >= SHOWN_ROWS:
                if step is None:
                    step = opened.enter_context(console.step("search", rows, counts_pixels=False))
                step.advance(done - before)
                before = done

        yield tell


def _remark_calibration(console: Console, gallery: Gallery, of: str) -> None:
    """A change has replaced the calibration by one of the gallery's own persons.

    Args:
        of: whom the former one was of.
    """
    if of == "strangers":
        instead = "persons of the gallery stand in for them" if gallery.people > 1 else "there is none now"
        console.remark(
            f"the calibration by strangers is out of date and deleted, {instead}; outsize face calibrate GALLERY "
            "STRANGERS makes a new one"
        )


def run_calibrate(
    console: Console, place: Path, strangers: Path | None, embedder_run: Path | None, *, resize: bool, memory: str
) -> bool:
    """Learn how like strangers are; False where some of their pictures could not be read.

    Raises:
        UsageError: strangers without an embedder.
    """
    if strangers is None:
        gallery, pictures = Gallery.open(place, memory=memory), None
        with searching(console) as tell:
            calibration = gallery.calibrate(tell=tell)
    else:
        if embedder_run is None:
            raise UsageError("pictures of strangers need --embedder, the one that made the gallery")
        embedder = load_embedder(embedder_run)
        require_memory(embedder, memory)
        gallery = open_gallery(place, embedder, memory)
        found = find_people(strangers)
        there = gallery.find(found.people)
        if there:
            raise UsageError(f"strangers must not be in the gallery, but {_list_names(sorted(there))}")
        pictures = embed_people(console, embedder, found, resize=resize)
        if not pictures.paths:
            raise ImageError(f"none of the pictures in {strangers} can be used; what is wrong stands above")
        with searching(console) as tell:
            calibration = gallery.calibrate(pictures.embeddings, tell=tell)
    count = len(calibration.scores)
    rates = [rate for rate in (0.1, 0.01, 0.001, 0.0001) if rate * count >= 10]
    thresholds = {f"{rate:g}": gallery.threshold_for(rate) for rate in rates}
    rows = [[rate, f"{threshold:.4f}"] for rate, threshold in thresholds.items()]
    by = (
        f"{count_of(count, 'person')} of the gallery, each compared with all others"
        if calibration.of == "enrolled"
        else f"{count_of(count, 'picture')} of strangers"
    )
    table = format_table(("false positive rate", "threshold"), rows) if rows else ""
    known = table or f"a rate of 0.1 needs 100, {gallery.describe_rates()}"
    console.result(
        f"{place}: calibrated by {by}; the highest score {calibration.scores[0]:.4f}\n{known}",
        {
            **describe(gallery),
            "thresholds": thresholds,
            "highest": calibration.scores[0],
            **(pictures.counts() if pictures else {"failed": []}),
        },
    )
    return not (pictures and pictures.failed)


def run_gallery(console: Console, place: Path, *, names: bool, verify: bool) -> bool:
    """Print what a gallery holds; False where it is damaged. With `verify` all that is damaged is named, also where
    nothing else can be told.

    Raises:
        GalleryError: there is none, or it is damaged.
    """
    damaged = find_damage(place, read_newest(place)) if verify else []
    try:
        gallery = Gallery.open(place)
    except GalleryError:
        if not damaged:
            raise
        console.result(
            "\n".join(f"damaged     {entry}" for entry in damaged), {"gallery": str(place), "damaged": damaged}
        )
        return False
    values = describe(gallery)
    lines = [
        f"{place}: {_sentence(gallery)}",
        f"embedder    {gallery.embedder}",
        f"generation  {gallery.generation}",
        f"calibration {_calibration_sentence(gallery)}",
    ]
    if verify:
        values["damaged"] = damaged
        lines += [f"damaged     {entry}" for entry in damaged] or ["verified    every file has its checksum"]
    if names:
        values["names"] = list(gallery.names())
        lines += values["names"]
    console.result("\n".join(lines), values)
    return not (verify and values["damaged"])


def _calibration_sentence(gallery: Gallery) -> str:
    calibration = gallery.calibration
    if calibration is None:
        return "none; outsize face calibrate makes one, which --fpir needs"
    whose = "persons of the gallery" if calibration.of == "enrolled" else "strangers"
    return f"{count_of(len(calibration.scores), 'score')} of {whose}, the highest {calibration.scores[0]:.4f}"


def require_memory(embedder: Embedder, memory: str, ranks: int = 1) -> None:
    """Refuse a budget that not even the embedder fits.

    Args:
        ranks: processes that share the budget, of which one embeds.

    Raises:
        HeadMemoryError: says what is needed.
    """
    needed, budget = ranks * PROCESS_BYTES + embedder.plan_bytes(BATCH), parse_bytes(memory)
    if needed > budget:
        where = f" on {ranks} ranks" if ranks > 1 else ""
        raise HeadMemoryError(
            f"embedding {BATCH} pictures{where} needs {format_bytes(needed)}, the budget is {format_bytes(budget)}; "
            f"allow more memory"
        )


def describe(gallery: Gallery) -> dict[str, Any]:
    """What a gallery holds, for JSON."""
    calibration = gallery.calibration
    return {
        "gallery": str(gallery.folder),
        "people": gallery.people,
        "templates": gallery.templates,
        "dim": gallery.dim,
        "storage": gallery.storage,
        "embedder": gallery.embedder,
        "generation": gallery.generation,
        "stored_bytes": gallery.stored_bytes,
        "calibration": {"scores": len(calibration.scores), "of": calibration.of} if calibration else None,
    }


def _sentence(gallery: Gallery) -> str:
    return (
        f"{count_of(gallery.people, 'person')} with {count_of(gallery.templates, 'template')} of {gallery.dim} numbers "
        f"in {gallery.storage}, {format_bytes(gallery.stored_bytes)}"
    )


def _failed_sentence(pictures: Pictures) -> str:
    return f", {len(pictures.failed)} failed" if pictures.failed else ""


def _list_names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'is' if len(names) == 1 else 'are'}"


def open_gallery(place: Path, embedder: Embedder, memory: int | str, *, threads: int | None = None) -> Gallery:
    """A gallery that this embedder made.

    Raises:
        GalleryError: another one made it, or it is damaged.
    """
    try:
        return Gallery.open(place, embedder=embedder.sha256, memory=memory, threads=threads)
    except GalleryError as error:
        if "another embedder" in str(error):
            raise GalleryError(f"{error} (now: {embedder.source})") from error
        raise
