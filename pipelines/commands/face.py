"""The commands of `outsize face`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..base.option_types import EXIT_SOME_FAILED, OrderedGroup, together
from ..faces.torchrun import refuse_torchrun
from .face_gallery import COMMANDS as FACE_COMMANDS
from .face_train import face_train_options, margin_name

_layer = together(
    click.option(
        "--batch", type=click.IntRange(1), default=64, show_default=True, help="Samples a step, of all ranks."
    ),
    click.option(
        "--ranks", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the layer."
    ),
    click.option("--threads", type=click.IntRange(1), help="Of each rank; without it the cores divided among them."),
    click.option(
        "--rule",
        type=click.Choice(["rms", "sgd", "momentum"]),
        default="rms",
        show_default=True,
        help="How rows follow their gradient; docs/benchmarks.md compares them.",
    ),
    click.option(
        "--storage",
        type=click.Choice(["float16", "bfloat16", "float32"]),
        default="float16",
        show_default=True,
        help="Of the rows; products are float32 always.",
    ),
    click.option("--memory", metavar="SIZE", help="Budget of all ranks, such as 12GB; without it the machine's."),
)


@click.group(cls=OrderedGroup)
@click.pass_context
def face(context: click.Context) -> None:
    """Faces: the giant classification layer, an embedder trained through it, and galleries of persons.

    \b
    outsize face train faces/                                  an embedder
    outsize face sample people/                                pictures to try with
    outsize face evaluate people/ --embedder faces/
    outsize face enroll staff/ people/ --embedder faces/
    outsize face identify staff/ door.png --embedder faces/
    """
    if context.invoked_subcommand not in ("train", "identify"):
        refuse_torchrun(str(context.invoked_subcommand))


@face.command("benchmark")
@click.option("--classes", type=click.IntRange(1), default=1_000_000, show_default=True, help="Identities.")
@click.option("--dim", type=click.IntRange(1), default=512, show_default=True, help="Numbers of a feature.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps; the first is not counted.")
@click.option("--margin", type=margin_name, default="arcface", show_default=True)
@click.option(
    "--sample",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the classes that a step sees, besides the batch's own (Partial FC).",
)
@click.option("--keep-cosines", is_flag=True, help="Hold batch x classes numbers between the passes: less work.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Also save the layer to this new folder and load it, timed."
)
@click.option(
    "--product-seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="For each of four timings of plain matrix products, which the steps are compared with.",
)
@_layer
@click.pass_obj
def face_benchmark(console: Any, **options: Any) -> None:
    """Time training steps of a layer, with random batches.

    \b
    outsize face benchmark --classes 100000
    outsize face benchmark --classes 10_000_000 --ranks 2 --memory 12GB
    outsize face benchmark --classes 1_000_000 --sample 0.1
    outsize --json face benchmark --classes 1000000 --rule momentum --checkpoint layer/
    """
    from ..faces.benchmark import FaceBenchmarkOptions, run_face_benchmark

    run_face_benchmark(console, FaceBenchmarkOptions(**options))


@face.command("train")
@click.argument("out", type=click.Path(path_type=Path))
@face_train_options
@_layer
@click.pass_obj
def face_train(console: Any, out: Path, ranks: int, threads: int | None, memory: str | None, **options: Any) -> None:
    """Train an embedder through the layer. The same command goes on after a stop, with any number of ranks; so does
    torchrun -m outsize face train. Exit code 3 where some pictures could not be used.

    \b
    outsize face train faces/
    outsize face train faces/ --faces synthetic:10000 --steps 3000 --ranks 2
    outsize face train staff/ --faces people/ --network r50 --steps 20000
    outsize face train staff/ --faces people/ --resize --augment flip,blur,jpeg
    outsize face train ms1m/ --faces train.rec --network r100 --recompute --batch 256
    torchrun --nproc-per-node 2 -m outsize face train faces/ --faces list.csv
    """
    from ..faces.train import run_face_train
    from .face_train import make_face_training

    training = make_face_training(out, options)
    if not run_face_train(console, training, ranks=ranks, threads=threads, memory=memory):
        raise SystemExit(EXIT_SOME_FAILED)


for _command in FACE_COMMANDS:
    face.add_command(_command)
