"""Options of the commands that know faces: evaluate, enroll, identify, calibrate, remove, gallery, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..base.option_types import EXIT_FAILED, EXIT_SOME_FAILED, Real, Size, option

_place = click.Path(path_type=Path)
_gallery = click.argument("gallery", type=_place)
_memory = option(
    "--memory", default="2GB", show_default=True, metavar="SIZE", help="Budget; rows are kept in it where they fit."
)
_resize = option(
    "--resize", is_flag=True, help="Take pictures of other sizes too, of the embedder's shape, and scale them."
)


def _embedder(*, required: bool) -> Any:
    return option(
        "--embedder",
        type=_place,
        required=required,
        metavar="RUN",
        help="A folder of face train (its newest generation), or one of its generations.",
    )


@click.command("sample", short_help="Write pictures of synthetic identities, and pairs of them.")
@click.argument("folder", type=_place)
@option("--identities", type=click.IntRange(2), default=40, show_default=True)
@option("--images", type=click.IntRange(2), default=4, show_default=True, help="Of each identity.")
@option("--first", type=click.IntRange(0), default=1_000_000, show_default=True, help="Number of the first identity.")
@option("--size", type=Size(), default="32", show_default=True, metavar="HxW", help="Of the pictures, in pixels.")
@option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.pass_obj
def sample(console: Any, folder: Path, **options: Any) -> None:
    """Write FOLDER/NAME/NAME_0001.png ... of synthetic identities, and FOLDER/pairs.txt, ten folds of pairs in LFW's
    format.

    \b
    outsize face sample people/
    outsize face sample strangers/ --first 2000000 --identities 200
    outsize face sample large/ --size 112 --images 8
    """
    from ..faces.sample import run_face_sample

    run_face_sample(console, folder, **options)


@click.command("evaluate", short_help="Measure an embedder: verification, pair lists, identification.")
@click.argument("images", type=_place, required=False)
@_embedder(required=False)
@option("--embeddings", type=_place, metavar="FILE.npy", help="(pictures, dim) in place of IMAGES.")
@option("--labels", type=_place, metavar="FILE", help="The person of each embedding: lines of text, or .npy.")
@option("--pairs", type=_place, metavar="FILE", help="Pairs in the format of LFW's pairs.txt.")
@option(
    "--far",
    default="1e-1,1e-2,1e-3,1e-4,1e-5,1e-6",
    show_default=True,
    metavar="F,F,..",
    help="False accept rates, of all pairs.",
)
@option(
    "--fpir",
    default="1e-1,1e-2,1e-3",
    show_default=True,
    metavar="F,F,..",
    help="Rates of strangers who are named.",
)
@option(
    "--enrolled", type=click.IntRange(1), default=1, show_default=True, help="Pictures of each person in the gallery."
)
@option(
    "--strangers",
    type=Real(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of the persons who are not enrolled.",
)
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of who is a stranger.")
@_resize
@_memory
@option("--report", type=_place, metavar="FILE.html", help="Also write a page with curves.")
@option("--overwrite", is_flag=True, help="Replace the page.")
@click.pass_obj
def evaluate(console: Any, **options: Any) -> None:
    """Measure how well an embedder tells persons apart: true accept rates at false accept rates over all pairs,
    accuracy on pairs in folds, rank-1 and error rates of identification with strangers. IMAGES has a folder for each
    person. Exit code 3 where some pictures, of the folder or of pairs, cannot be used.

    \b
    outsize face evaluate people/ --embedder faces/ --report people.html
    outsize face evaluate people/ --embedder faces/ --pairs people/pairs.txt
    outsize --json face evaluate --embeddings e.npy --labels names.txt
    """
    from ..faces.evaluate import EvaluateOptions, run_face_evaluate

    if not run_face_evaluate(console, EvaluateOptions(**options)):
        raise SystemExit(EXIT_SOME_FAILED)


@click.command("enroll", short_help="Put persons into a gallery.")
@_gallery
@click.argument("images", type=_place)
@_embedder(required=True)
@option(
    "--templates",
    type=click.Choice(["mean", "each"]),
    default="mean",
    show_default=True,
    help="One template a person, the mean of her embeddings; or one of each picture.",
)
@option("--replace", is_flag=True, help="Persons who are there already get these pictures in place of the old.")
@option("--add", is_flag=True, help="Persons who are there already get more templates.")
@option(
    "--storage",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of a new gallery's rows.",
)
@option(
    "--calibrate/--no-calibrate", default=True, show_default=True, help="Compare up to 1,000 persons with all others."
)
@_resize
@_memory
@click.pass_obj
def enroll(console: Any, *, replace: bool, add: bool, **options: Any) -> None:
    """Put the persons of IMAGES into GALLERY, which is made if it is not there; IMAGES has a folder for each person, of
    her name. Nothing is trained. Exit code 3 where some pictures cannot be used.

    \b
    outsize face enroll staff/ people/ --embedder faces/
    outsize face enroll staff/ newcomers/ --embedder faces/ --templates each
    outsize face enroll staff/ people/ --embedder faces/ --replace
    """
    from ..faces.gallery import EnrollOptions, run_enroll

    if replace and add:
        raise click.UsageError("give either --replace or --add, not both")
    existing = "replace" if replace else "add" if add else "refuse"
    if not run_enroll(console, EnrollOptions(existing=existing, **options)):
        raise SystemExit(EXIT_SOME_FAILED)


@click.command("identify", short_help="Say who is on pictures.")
@_gallery
@click.argument("images", type=_place, nargs=-1, required=True, metavar="IMAGE...")
@_embedder(required=True)
@option("-k", type=click.IntRange(1), default=5, show_default=True, help="Persons that are named at most.")
@option("--threshold", type=Real(-1, 1), help="Name persons beyond this score only.")
@option(
    "--fpir",
    type=Real(0, 1, min_open=True, max_open=True),
    help="The threshold that this share of strangers exceeds, by the gallery's calibration.",
)
@option(
    "--ranks", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the gallery's rows."
)
@_resize
@_memory
@click.pass_obj
def identify(console: Any, ranks: int, **options: Any) -> None:
    """Say who is on each IMAGE, a picture or a folder of pictures: the nearest persons of GALLERY, exactly, by cosine;
    behind each the cosine, and the share of strangers who come as near to anybody. The same bits for any number of
    ranks, whom torchrun may start too. Exit code 3 where some pictures cannot be used.

    \b
    outsize face identify staff/ door.png --embedder faces/
    outsize face identify staff/ visitors/ --embedder faces/ --fpir 0.01 -k 1
    outsize --json face identify staff/ door.png --embedder faces/ --threshold 0.45
    outsize face identify city/ visitors/ --embedder faces/ --ranks 2 --memory 8GB
    torchrun --nproc-per-node 2 -m outsize face identify city/ visitors/ --embedder faces/
    """
    from ..faces.identify import IdentifyOptions, run_identify

    if not run_identify(console, IdentifyOptions(**options), ranks=ranks):
        raise SystemExit(EXIT_SOME_FAILED)


@click.command("calibrate", short_help="Learn how like strangers are.")
@_gallery
@click.argument("strangers", type=_place, required=False)
@_embedder(required=False)
@_resize
@_memory
@click.pass_obj
def calibrate(
    console: Any, gallery: Path, strangers: Path | None, embedder: Path | None, resize: bool, memory: str
) -> None:
    """Learn how like somebody in GALLERY those are who are not in it, for --fpir: from pictures of STRANGERS, a folder
    with a folder for each person; without them from up to 1,000 persons of the gallery, each compared with all others.

    \b
    outsize face calibrate staff/
    outsize face calibrate staff/ strangers/ --embedder faces/
    """
    from ..faces.gallery import run_calibrate

    if not run_calibrate(console, gallery, strangers, embedder, resize=resize, memory=memory):
        raise SystemExit(EXIT_SOME_FAILED)


@click.command("remove", short_help="Delete persons from a gallery.")
@_gallery
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.pass_obj
def remove(console: Any, gallery: Path, names: tuple[str, ...]) -> None:
    """Delete persons from GALLERY: their names and templates are in none of its files afterwards.

    \b
    outsize face remove staff/ "Ada Lovelace"
    """
    from ..faces.gallery import run_remove

    run_remove(console, gallery, names)


@click.command("gallery", short_help="Show what a gallery holds.")
@_gallery
@option("--names", is_flag=True, help="Also list all persons, in the order of enrolment.")
@option("--verify", is_flag=True, help="Read every file against its checksum; exit code 1 where one is damaged.")
@click.pass_obj
def gallery(console: Any, gallery: Path, names: bool, verify: bool) -> None:
    """Show what GALLERY holds: persons, templates, embedder, calibration.

    \b
    outsize face gallery staff/
    outsize --json face gallery staff/ --names --verify
    """
    from ..faces.gallery import run_gallery

    if not run_gallery(console, gallery, names=names, verify=verify):
        raise SystemExit(EXIT_FAILED)


COMMANDS = (sample, evaluate, enroll, identify, calibrate, remove, gallery)
