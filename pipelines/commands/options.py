"""Options that several commands share, and what is made of them."""

from __future__ import annotations

from typing import Any

import click

from ..base.option_types import Bands, MaskBand, NodataValue, Numbers, RegisteredName, option, together

overwrite_option = option("--overwrite", is_flag=True, help="Replace an existing output.")
trust_option = option(
    "--trust-sources",
    is_flag=True,
    help="Read rasters and labels that name other places or could run code: VRTs of raw bands, addresses or Python, "
    "formats that are lists of files, Zarr codecs that are not known.",
)
unchanged_option = option(
    "--source-unchanged",
    is_flag=True,
    help="Go on though the source's files were put back, replaced or given other permissions since: they hold what "
    "they held. Size and time of change must be as before.",
)
model_options = together(
    option("--weights", type=click.Path(), help="A factory's weights: .safetensors, or a state dict (.pt, .ckpt)."),
    option(
        "--weights-key",
        metavar="KEY",
        help="Of a checkpoint that holds them several times: the key of those that are meant, such as state_dict_ema.",
    ),
    option("--trust-model", is_flag=True, help="Load model files that could run code."),
    option("--sha256", metavar="HEX", help="Load the one file of this hash that could run code."),
)
meaning_options = together(
    option(
        "--task",
        type=click.Choice(["multiclass", "binary", "multilabel", "regression"]),
        help="What the network's channels answer; without it what the model file says, or else its result shows.",
    ),
    option(
        "--activation",
        type=click.Choice(["none", "sigmoid", "softmax", "argmax"]),
        help="What the network has applied to its result already; none: it gives logits. Without it as with --task.",
    ),
    option(
        "--threshold",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="P",
        help="Of a binary task: yes where the probability is above this; without it what the model file says, or 0.5.",
    ),
)
planning_options = together(
    option(
        "--model",
        metavar="MODEL",
        help="A model's .json, package.module:factory, or .pt2 and others that could run code; "
        "without it the shipped one.",
    ),
    model_options,
    meaning_options,
    option(
        "--output",
        type=click.Choice(["class", "probability", "logits", "values"]),
        show_default="class; of a regression values",
        help="What to write for each pixel; values: what the network gives, as it is.",
    ),
    option(
        "--memory",
        show_default="2GB, and 2GB more for each CUDA device",
        metavar="SIZE",
        help="Budget of all processes together.",
    ),
    option(
        "--engine",
        type=RegisteredName("outsize.tiler.engines.registry:ENGINES", ("auto", "openvino", "torch")),
        default="auto",
        show_default=True,
        help="What runs the network; auto: torch where it sees a CUDA device, else OpenVINO where it is installed.",
    ),
    option(
        "--device",
        default="auto",
        show_default=True,
        metavar="[auto|cpu|cuda|cuda:N]",
        help="Where: cuda takes every CUDA device, with a worker process each.",
    ),
    option(
        "--device-memory",
        metavar="SIZE",
        help="Budget on each CUDA device; without it 80 % of what is free there.",
    ),
    option(
        "--batch",
        type=click.IntRange(1),
        help="Windows that torch runs together; without it what a CUDA device is busy with, 1 on the CPU.",
    ),
    option(
        "--precision",
        type=click.Choice(["float32", "int8", "bfloat16", "float16", "tf32"]),
        default="float32",
        show_default=True,
        help="What the engine computes in. int8 is faster, and needs outsize[int8]: ranges are found on windows of the "
        "raster. bfloat16 and float16: torch.autocast; tf32: CUDA devices only. What fewer bits cost is measured and "
        "printed.",
    ),
    option("--compile", "compiles", is_flag=True, help="Run torch's windows by torch.compile."),
    option(
        "--method",
        type=click.Choice(["auto", "window", "program"]),
        default="auto",
        show_default=True,
        help="Run the network on windows of the raster, or specialised to each tile; auto: what is faster and exact.",
    ),
    option(
        "--halo",
        type=click.IntRange(0),
        metavar="PX",
        help="Of a network that cannot be traced: pixels around each that its result depends on. The start check "
        "stops a run whose halo is too small.",
    ),
    option(
        "--halo-stride",
        type=click.IntRange(1),
        metavar="PX",
        help="With --halo: windows start on multiples of this, which the network's own stride must divide; 64 if left "
        "out.",
    ),
    option("--workers", type=click.IntRange(1), help="Worker processes; without it one for each 8 cores."),
    option("--threads", type=click.IntRange(1), help="Compute threads of each worker."),
    option("--core", type=click.IntRange(1), help="Side of a tile's core; without it what the budget allows."),
    option(
        "--region",
        type=Numbers(int, 4),
        metavar="Y,X,HEIGHT,WIDTH",
        help="Only these pixels; their result equals the whole raster's.",
    ),
    option(
        "--bounds",
        type=Numbers(float, 4),
        metavar="W,S,E,N",
        help="Only what these bounds in the raster's CRS touch.",
    ),
    option(
        "--mark-nodata-context",
        is_flag=True,
        help="Also write nodata_context: 1 where a pixel's receptive field touches nodata.",
    ),
)
reading_options = together(
    option("--axes", metavar="ORDER", help="Order of a Zarr array's dimensions, such as yxb."),
    option(
        "--bands",
        type=Bands(),
        metavar="B,B,...",
        help="Bands to read, in this order, by number from 1 or by name: 3,2,1,4 or B04,B03,B02,B08. Without it a "
        "model's bands are found by name where the file names its own.",
    ),
    option(
        "--nodata",
        type=NodataValue(),
        multiple=True,
        metavar="VALUE",
        help="Nodata value in place of the file's; repeat it for several; none: no value.",
    ),
    option("--nodata-any", is_flag=True, help="A pixel is nodata where one band is; without it where all are."),
    option("--alpha", is_flag=True, help="Take the band tagged alpha for a mask, not for a band."),
    option(
        "--mask-band",
        type=MaskBand(),
        metavar="N=V,V,...",
        help="Band N is a mask; where it holds one of the values, a pixel is nodata.",
    ),
    option(
        "--apply-scale",
        is_flag=True,
        help="Read number * scale + offset, as the file's tags say; without it the numbers that are stored.",
    ),
    trust_option,
)
writing_options = together(
    option(
        "--zarr-format",
        type=click.Choice(["2", "3"]),
        default="3",
        show_default=True,
        help="2 for readers that know no other, such as GDAL before 3.12.",
    ),
    option("--no-space-check", is_flag=True, help="Begin even if the disk might be too small."),
)
cluster_options = together(
    option("--scheduler", metavar="ADDRESS", help="A running Dask scheduler, such as tcp://host:8786."),
    option("--scheduler-file", type=click.Path(), help="A running Dask scheduler's file."),
    option("--tls-ca-file", type=click.Path(), help="CA certificate of the scheduler."),
    option("--tls-cert", type=click.Path(), help="Certificate of this client."),
    option("--tls-key", type=click.Path(), help="Key of this client."),
    option(
        "--dashboard-address",
        default="127.0.0.1:8787",
        show_default=True,
        metavar="ADDRESS",
        help="Of the dashboard that a run on this machine shows.",
    ),
    option("--no-dashboard", is_flag=True, help="Show no dashboard."),
)


def make_read_options(options: dict[str, Any]) -> Any:
    from ...tiler.rasters.raster import ReadOptions

    values = options["nodata"]
    if "none" in values and len(values) > 1:
        raise click.UsageError("--nodata none says that there is no value; give it alone")
    if options["alpha"] and options["mask_band"]:
        raise click.UsageError("--alpha and --mask-band both name a mask; choose one")
    mask = options["mask_band"] or (None, ())
    return ReadOptions(
        axes=options["axes"],
        bands=options["bands"] or (),
        nodata=tuple(value for value in values if value != "none") if values else None,
        any_band=options["nodata_any"],
        alpha=options["alpha"],
        mask_band=mask[0],
        mask_values=mask[1],
        apply_scale=options["apply_scale"],
        trust=options["trust_sources"],
    )


def make_cluster_options(options: dict[str, Any]) -> Any:
    from ...tiler.cluster.client import ClusterOptions

    return ClusterOptions(
        scheduler=options["scheduler"],
        scheduler_file=options["scheduler_file"],
        tls_ca_file=options["tls_ca_file"],
        tls_cert=options["tls_cert"],
        tls_key=options["tls_key"],
        dashboard_address=None if options["no_dashboard"] else options["dashboard_address"],
    )


def make_segment_options(source: str, options: dict[str, Any]) -> Any:
    from ..segment.run import SegmentOptions

    names = (
        "model",
        "output",
        "weights",
        "weights_key",
        "task",
        "activation",
        "threshold",
        "trust_model",
        "sha256",
        "halo",
        "halo_stride",
    )
    return SegmentOptions(
        source=source,
        reading=make_read_options(options),
        planning=make_plan_options(options),
        **{name: options[name] for name in names},
    )


def make_plan_options(options: dict[str, Any]) -> Any:
    from ...tiler.base.geometry import Window
    from ...tiler.planning.options import PlanOptions

    names = (
        "memory",
        "engine",
        "device",
        "device_memory",
        "batch",
        "workers",
        "threads",
        "core",
        "bounds",
        "method",
        "precision",
        "compiles",
        "mark_nodata_context",
    )
    region = None
    if options["region"] is not None:
        y, x, height, width = options["region"]
        region = Window(y=y, x=x, height=height, width=width)
    return PlanOptions(region=region, **{name: options[name] for name in names})


def make_write_options(options: dict[str, Any]) -> Any:
    from ...tiler.output.options import WriteOptions

    return WriteOptions(
        resume=not options["no_resume"],
        overwrite=options["overwrite"],
        retry_failed=options["retry_failed"],
        source_unchanged=options["source_unchanged"],
        patience=options["tile_timeout"],
        zarr_format=2 if options["zarr_format"] == "2" else 3,
        space_check=not options["no_space_check"],
    )
