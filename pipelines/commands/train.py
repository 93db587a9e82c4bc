"""The options of `outsize train`, and how labels are read, which `outsize evaluate` shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..base.option_types import Folder, Numbers, Texts, option, together

if TYPE_CHECKING:
    from ...models.segmentation.training.recipe import Recipe
    from ..segment.model import SourceOptions

label_options = together(
    option("--label-field", metavar="NAME", help="Attribute of polygons that tells the class."),
    option("--label-encoding", metavar="NAME", help="Of a vector file's texts, such as latin1."),
    option(
        "--label-nodata",
        type=float,
        multiple=True,
        metavar="VALUE",
        help="Value of a raster of labels that means unlabelled, in place of its own; repeat it for several.",
    ),
    option(
        "--class-values",
        type=Texts(),
        metavar="V,V,...",
        help="Value of each class in the labels; without it 0, 1, 2, ..., or of polygons the classes' names.",
    ),
)


def make_label_options(options: dict[str, Any], labels: Sequence[str]) -> Any:
    """`LabelOptions` of the command line's, for these files of labels."""
    from ...tiler.labels.labels import LabelOptions

    made = LabelOptions(
        values=options["class_values"] or (),
        nodata=options["label_nodata"] or None,
        field=options["label_field"],
        encoding=options["label_encoding"],
        trust=options["trust_sources"],
    )
    made.require_use(labels)
    return made


train_options = together(
    option(
        "--labels",
        multiple=True,
        required=True,
        metavar="FILE",
        help="Of each scene, in their order: a raster on its grid, or polygons (GeoJSON; .shp, .gpkg and others with "
        "the extra vectors). One vector file may serve all. What has no label is not trained on.",
    ),
    option("--out", type=Folder(), required=True, metavar="DIR", help="Folder of the training."),
    option(
        "--classes",
        type=Texts(),
        metavar="NAME,NAME,...",
        help="In the order of their numbers, each with a colour if wanted: water=#2667B2. Without it those of "
        "--model, or of the labels.",
    ),
    label_options,
    option(
        "--step",
        default="tiles:8",
        show_default=True,
        metavar="KIND",
        help="Gradient of a step: image, of a whole scene; tiles:N, of N tiles with their true context.",
    ),
    option(
        "--core",
        type=click.IntRange(1),
        metavar="PX",
        help="Side of the tiles' cores.  [default: chosen from --memory, at most 256 for tiles:N]",
    ),
    option("--steps", type=click.IntRange(1), help="Steps in all; 1000 where --minutes is not given."),
    option("--minutes", type=click.FloatRange(0, min_open=True), help="Train so long, in place of --steps."),
    option(
        "--loss",
        show_default="cross-entropy; of one channel binary",
        metavar="NAME",
        help="cross-entropy; dice; binary, cross-entropy of each class against all others, or of one channel's yes and "
        "no; one that was added; or a sum: cross-entropy+0.5*dice.",
    ),
    option(
        "--task",
        type=click.Choice(["multiclass", "binary"]),
        show_default="multiclass",
        help="Of a new U-Net: a channel for each class, or one channel for two classes, no and yes.",
    ),
    option(
        "--class-weights",
        type=Numbers(float, word="balanced"),
        metavar="W,W,...",
        help="In cross-entropy; or: balanced. Without it all 1.",
    ),
    option("--optimiser", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
    option("--lr", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True, help="At its highest."),
    option("--weight-decay", type=click.FloatRange(0), default=1e-4, show_default=True),
    option("--warm-up", type=click.IntRange(0), default=50, show_default=True, help="Steps in which it rises."),
    option(
        "--ema",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.99,
        show_default=True,
        help="Decay of the weights' average, which is validated and kept; 0: the weights themselves.",
    ),
    option(
        "--clip", type=click.FloatRange(0), default=1.0, show_default=True, help="Largest norm of the gradient; 0: any."
    ),
    option(
        "--augment",
        default="flips,turns,radiometry=0.1",
        show_default=True,
        metavar="KINDS",
        help="flips, turns by right angles, radiometry (gain and offset of each band), or none.",
    ),
    option(
        "--validation",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.2,
        show_default=True,
        metavar="SHARE",
        help="Of blocks that are held out of every scene, with a guard of the network's reach around them.",
    ),
    option(
        "--validate-on",
        multiple=True,
        metavar="SCENE",
        help="Hold out this whole scene instead; repeat it for several.",
    ),
    option("--block", type=click.IntRange(1), metavar="PX", help="Side of validation blocks; without it by size."),
    option("--val-every", type=click.IntRange(1), default=100, show_default=True, help="Steps between validations."),
    option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
    option(
        "--widths",
        type=Numbers(int),
        default="16,32,64,128",
        show_default=True,
        help="Of a new U-Net: channels of each level.",
    ),
    option(
        "--workers",
        type=click.IntRange(1),
        help="Worker processes that share each step; without it, and without --scheduler, this process alone. Each "
        "keeps --memory.",
    ),
    option(
        "--threads",
        type=click.IntRange(1),
        help="Compute threads of each process: without it all cores, on Dask 1. With the same number a training has "
        "the same bits on any number of workers, and without any.",
    ),
    option(
        "--norm", type=click.Choice(["frozen", "none"]), default="frozen", show_default=True, help="Of a new U-Net."
    ),
)


def run_train_command(
    console: Any, scenes: tuple[str, ...], options: dict[str, Any], reading: Any, cluster: Any
) -> None:
    """`outsize train`.

    Args:
        cluster: `ClusterOptions`.
    """
    from ..train.options import TrainOptions
    from ..train.run import run_train
    from ..train.workers import WorkerOptions

    recipe, start = _read_recipe(options), _read_start(options)
    run_train(
        console,
        TrainOptions(
            scenes=scenes,
            labels=options["labels"],
            out=options["out"],
            recipe=recipe,
            reading=reading,
            label_options=make_label_options(options, options["labels"]),
            classes=options["classes"] or (),
            task=options["task"],
            balanced=options["class_weights"] == "balanced",
            validation=options["validation"],
            validate_on=options["validate_on"],
            block=options["block"],
            validate_every=options["val_every"],
            core=options["core"],
            memory=options["memory"],
            model=start,
            widths=options["widths"],
            norm=options["norm"],
            overwrite=options["overwrite"],
            workers=WorkerOptions(cluster=cluster, workers=options["workers"], threads=options["threads"]),
        ),
    )


def _read_recipe(options: dict[str, Any]) -> Recipe:
    from ..train.run import make_recipe

    weights, minutes, steps = options["class_weights"] or (), options["minutes"], options["steps"]
    return make_recipe(
        options["step"],
        options["augment"],
        loss=options["loss"] or "",
        class_weights=weights if isinstance(weights, tuple) else (),
        optimiser=options["optimiser"],
        rate=options["lr"],
        weight_decay=options["weight_decay"],
        warm_up=options["warm_up"],
        average=options["ema"],
        clip=options["clip"],
        steps=steps if steps or minutes else 1000,
        minutes=minutes,
        seed=options["seed"],
    )


def _read_start(options: dict[str, Any]) -> SourceOptions | None:
    """Where the training starts; None: at a new network.

    Raises:
        click.UsageError: --weights without --model.
    """
    from ..segment.model import SourceOptions

    if options["model"] is None:
        if options["weights"]:
            raise click.UsageError("--weights goes with --model package.module:factory")
        return None
    return SourceOptions(
        source=options["model"],
        weights=options["weights"],
        weights_key=options["weights_key"],
        trust_model=options["trust_model"],
        sha256=options["sha256"],
    )
