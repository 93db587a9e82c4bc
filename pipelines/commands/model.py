"""The commands of `outsize model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..base.option_types import Folder, OrderedGroup
from .options import meaning_options, model_options, overwrite_option


@click.group(cls=OrderedGroup)
def model() -> None:
    """Look at model files, and write your own.

    \b
    outsize model show
    outsize model pack mynet:build mynet.json --weights mynet.safetensors
    """


def _source_options(source: str | None, options: dict[str, Any]) -> Any:
    from ..segment.model import SourceOptions, parse_hyperparameters

    return SourceOptions(
        source=source,
        weights=options["weights"],
        weights_key=options["weights_key"],
        hyperparameters=parse_hyperparameters(options["hyperparameter"]),
        trust_model=options["trust_model"],
        sha256=options["sha256"],
    )


_hyperparameter = click.option(
    "--hyperparameter", multiple=True, metavar="KEY=JSON", help="A keyword argument of the factory; once for each."
)


@model.command(short_help="Write a model file from a factory and weights, or from another file.")
@click.argument("source")
@click.argument("out", type=Folder())
@model_options
@_hyperparameter
@click.option("--name", help="Of the model; without it the source's.")
@click.option("--band", "bands", multiple=True, metavar="NAME", help="A band's name; once for each, in order.")
@click.option(
    "--scaling",
    type=click.Choice(["z-score", "min-max", "offset-scale", "none"]),
    help="What happens to raw pixels x: (x - mean) / stddev, (x - minimum) / (maximum - minimum), "
    "(x - offset) / scale, or nothing. Without it what the source says.",
)
@click.option("--mean", metavar="V,V,..", help="Of z-score; one number for each band, or one for all.")
@click.option("--stddev", metavar="V,V,..", help="Of z-score.")
@click.option("--minimum", metavar="V,V,..", help="Of min-max.")
@click.option("--maximum", metavar="V,V,..", help="Of min-max.")
@click.option("--offset", metavar="V,V,..", help="Of offset-scale.")
@click.option("--scale", metavar="V,V,..", help="Of offset-scale.")
@click.option("--fill", metavar="V,V,..", help="Raw value of each band that stands in for nodata.")
@click.option(
    "--class",
    "classes",
    multiple=True,
    metavar="NAME=#RRGGBB",
    help="A class and its colour; once for each channel, and of a binary task for no and yes, or for yes alone.",
)
@meaning_options
@overwrite_option
@click.pass_obj
def pack(
    console: Any,
    source: str,
    out: Path,
    name: str | None,
    bands: tuple[str, ...],
    scaling: str | None,
    fill: str | None,
    classes: tuple[str, ...],
    overwrite: bool,
    **options: Any,
) -> None:
    """Write OUT.json and the weights beside it from SOURCE: package.module:factory with --weights, a model's .json, or
    a file of torch.export, torch.save or TorchScript.

    \b
    outsize model pack mynet:build mynet.json --weights mynet.safetensors --hyperparameter width=16
    outsize model pack mynet:build mynet.json --weights mynet.pt --band red --band nir
        --scaling z-score --mean 98.5,120 --stddev 40,35.5 --class water=#1F78B4 --class land=#B2DF8A
    outsize model pack clouds:build clouds.json --weights clouds.ckpt --task binary --threshold 0.4 --class cloud
    outsize model pack mynet.pt2 mynet.json --trust-model --scaling min-max --minimum 0 --maximum 255
    """
    from ...models.segmentation.networks.meaning import Statement
    from ..segment.model import PackOptions, run_pack

    constants = {key: options[key] for key in ("mean", "stddev", "minimum", "maximum", "offset", "scale")}
    packing = PackOptions(
        name=name,
        bands=bands,
        scaling=scaling,
        constants=constants,
        fill=fill,
        classes=classes,
        stated=Statement(task=options["task"], activation=options["activation"], threshold=options["threshold"]),
    )
    run_pack(console, _source_options(source, options), out, packing, overwrite=overwrite)


@model.command(short_help="Print what a model says.")
@click.argument("source", metavar="[MODEL]", required=False)
@model_options
@_hyperparameter
@click.pass_obj
def show(console: Any, source: str | None, **options: Any) -> None:
    """Print what a model says: bands, scaling, fill, classes, architecture, sha256. A .json is read, not loaded.

    \b
    outsize model show
    outsize model show mynet.json
    outsize --json model show mynet.pt2 --trust-model
    """
    from ..segment.model import run_show

    run_show(console, _source_options(source, options))
