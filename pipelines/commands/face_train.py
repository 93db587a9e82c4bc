"""The options of `outsize face train`, but for those of the layer, which `face benchmark` shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..base.option_types import Numbers, Real, RegisteredName, Size, option, together

_share = Real(0, 1)
_strength = Real(0, 3)


margin_name = RegisteredName("outsize.models.faceid.layer.margin_registry:MARGINS", ("arcface", "cosface", "softmax"))


class MarginChoice(click.ParamType):
    """The name of a margin, or three numbers."""

    name = "margin"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        if len(parts) == 1 and (value in margin_name.own or value in margin_name.names()):
            return value
        try:
            m1, m2, m3 = map(float, parts)
        except ValueError:
            self.fail(f"{', '.join(margin_name.names())}, or M1,M2,M3 such as 1,0.3,0.2, got {value!r}", param, ctx)
        return m1, m2, m3


face_train_options = together(
    option(
        "--faces",
        default="synthetic:2000",
        show_default=True,
        metavar="SOURCE",
        help="synthetic:N identities, drawn on the fly; a folder with a folder for each identity; NAME.csv or "
        "NAME.parquet with the columns path,label; NAME.rec of InsightFace, with NAME.idx beside it.",
    ),
    option(
        "--size",
        type=Size(),
        metavar="HxW",
        help="Of the pictures, in pixels; without it 32 of synthetic ones, that of most of others.",
    ),
    option(
        "--resize",
        is_flag=True,
        help="Take pictures of other sizes too, of the shape of --size, and scale them.",
    ),
    option(
        "--held-out",
        type=click.IntRange(0),
        metavar="N",
        help="Identities to measure with, never trained on; without it 500, of real ones at most a twentieth.",
    ),
    option(
        "--samples",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="Synthetic: of each identity in an epoch, on average; each epoch draws new ones.",
    ),
    option(
        "--zipf",
        type=_strength,
        default=0.0,
        show_default=True,
        help="Synthetic: identity k comes in proportion to k^-ZIPF; 0: all as often.",
    ),
    option(
        "--label-noise",
        type=Real(0, 1, max_open=True),
        default=0.0,
        show_default=True,
        help="Synthetic: share of wrong labels.",
    ),
    option("--pose", type=_strength, default=0.5, show_default=True, help="Synthetic: strength of turns and moves."),
    option("--light", type=_strength, default=0.5, show_default=True, help="Synthetic: strength of changes of light."),
    option(
        "--occlusion", type=_share, default=0.1, show_default=True, help="Synthetic: share of faces partly covered."
    ),
    option("--noise", type=_strength, default=1.0, show_default=True, help="Synthetic: strength of noise."),
    option(
        "--network",
        type=click.Choice(["small", "r18", "r50", "r100"]),
        default="small",
        show_default=True,
        help="small, or an iResNet, for pictures whose sides are multiples of 16.",
    ),
    option("--dim", type=click.IntRange(1), help="Numbers of a feature; without it 512, of small 128."),
    option("--recompute", is_flag=True, help="Of an iResNet: keep one tensor a block, for a third more work."),
    option(
        "--precision",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Of the embedder's products.",
    ),
    option(
        "--augment",
        metavar="KINDS",
        help="crop=0.1, flip=0.5, colour=0.1, grey=0.1, blur=0.02, resolution=0.4, jpeg=0.6, erase=0.2 between commas, "
        "with these strengths or others, or none; without it flip,colour of pictures, none of synthetic faces.",
    ),
    option(
        "--micro-batch",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        help="Samples that go through the embedder together; threads and ranks share these.",
    ),
    option(
        "--steps",
        type=click.IntRange(1),
        default=1000,
        show_default=True,
        help="In all; of a training that is there they can be raised.",
    ),
    option(
        "--init",
        metavar="FOLDER|FILE",
        help="Weights to start from: the folder of another training, or one of its generations, with its rows of "
        "identities of the same names; or a file of an embedder's weights (.safetensors, .pt).",
    ),
    option(
        "--grow",
        is_flag=True,
        help="The training that is in OUT goes on with the identities and pictures that the source has by now.",
    ),
    option("--optimiser", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
    option(
        "--lr",
        type=Real(0, min_open=True),
        default=0.001,
        show_default=True,
        help="Of the embedder, at its highest.",
    ),
    option(
        "--head-lr",
        type=Real(0, min_open=True),
        default=0.1,
        show_default=True,
        help="Of the rows, at its highest.",
    ),
    option("--weight-decay", type=Real(0), default=0.05, show_default=True, help="Of the embedder."),
    option(
        "--clip",
        type=Real(0),
        default=5.0,
        show_default=True,
        help="Largest norm of the embedder's gradient; 0: any.",
    ),
    option(
        "--schedule",
        type=click.Choice(["cosine", "steps", "constant"]),
        default="cosine",
        show_default=True,
        help="Of both rates, after the warm-up; steps: a tenth at each of --falls.",
    ),
    option("--warm-up", type=click.IntRange(0), help="Steps in which the rates rise; without it a twentieth of all."),
    option(
        "--falls",
        type=Numbers(float),
        default="0.5,0.75,0.9",
        show_default=True,
        metavar="SHARE,...",
        help="Of all steps.",
    ),
    option(
        "--margin",
        type=MarginChoice(),
        default="cosface",
        show_default=True,
        help="arcface, cosface, softmax, one that was added, or M1,M2,M3: cos(M1 angle + M2) - M3 of a sample's "
        "own class.",
    ),
    option("--margin-value", type=Real(0), help="Of the named margin; without it 0.5 of arcface, 0.35 of cosface."),
    option("--scale", type=Real(1), default=32.0, show_default=True, help="Of cosines."),
    option(
        "--sample",
        type=Real(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Share of the classes that a step sees, besides the batch's own (Partial FC).",
    ),
    option(
        "--denominator",
        type=click.Choice(["corrected", "pfc"]),
        default="corrected",
        show_default=True,
        help="Of the softmax over a share: corrected by the probability of being seen, or as Partial FC has it.",
    ),
    option("--save-every", type=click.IntRange(1), default=250, show_default=True, help="Steps."),
    option(
        "--evaluate-every",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Steps between measurements (identities never seen, the loss over all classes); 0: at the end alone.",
    ),
    option("--seed", type=click.IntRange(0), default=0, show_default=True),
)


def _has_value(margin: str | tuple[float, float, float]) -> bool:
    """Of an added margin nobody knows: it refuses what it does not take."""
    return isinstance(margin, str) and margin != "softmax"


def make_face_training(out: Path, options: dict[str, Any]) -> Any:
    """`FaceTraining` of the command line's options, which lose those that it takes."""
    from ..faces.options import FaceTraining
    from ..faces.sources import SYNTHETIC

    source, network = options.pop("faces"), options["network"]
    named = ("samples", "zipf", "label_noise", "pose", "light", "occlusion", "noise")
    synthetic = {name: options.pop(name) for name in named}
    if options["resize"] and source.startswith(SYNTHETIC):
        raise click.UsageError("--resize is of pictures; synthetic faces are drawn in --size")
    if options["margin_value"] is not None and not _has_value(options["margin"]):
        raise click.UsageError("--margin-value is of arcface or cosface; M1,M2,M3 and softmax have none")
    if options["augment"] is None:
        options["augment"] = "none" if source.startswith(SYNTHETIC) else "flip,colour"
    if options["dim"] is None:
        options["dim"] = 128 if network == "small" else 512
    if options["warm_up"] is None:
        options["warm_up"] = options["steps"] // 20
    if options["init"] is not None:
        options["init"] = str(Path(options["init"]).absolute())
    return FaceTraining(out=str(out.absolute()), source=source, synthetic=synthetic, threads=1, **options)
