"""The command line: options, exit codes, error lines. Each command's work is in its own file, imported when called."""

from __future__ import annotations

import json
import os
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from .. import __version__
from ..tiler.errors import TilerError
from .cli_face_gallery import COMMANDS as FACE_COMMANDS
from .cli_face_train import face_train_options
from .cli_train import label_options, make_label_options, train_options
from .interrupts import heed_interrupts
from .option_types import Numbers, Place, option, together
from .torchrun import refuse_torchrun

EXIT_FAILED, EXIT_USAGE, EXIT_FAILED_TILES, EXIT_INTERRUPTED = 1, 2, 3, 130

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


def _load_config(context: click.Context, _parameter: click.Parameter, path: str | None) -> None:
    """Values of run.toml become defaults: `memory = "2GB"` for all commands, `[segment]` for one."""
    if path is None:
        return
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    shared = {key: value for key, value in values.items() if not isinstance(value, dict)}
    defaults: dict[str, Any] = {}
    for name, command in cli.commands.items():
        known = {parameter.name for parameter in command.params}
        # `model = "x.json"` is an option, though there is a command of that name.
        own = values[name] if isinstance(values.get(name), dict) else {}
        unknown = {key for key in own if key.replace("-", "_") not in known}
        if unknown:
            raise click.BadParameter(f"{path}: [{name}] has no option {', '.join(sorted(unknown))}")
        merged = {key.replace("-", "_"): value for key, value in {**shared, **own}.items()}
        several = {parameter.name for parameter in command.params if getattr(parameter, "multiple", False)}
        merged = {k: [v] if k in several and not isinstance(v, list) else v for k, v in merged.items()}
        defaults[name] = {key: value for key, value in merged.items() if key in known}
    everything = {p.name for command in cli.commands.values() for p in command.params}
    unknown = {key for key in shared if key.replace("-", "_") not in everything}
    unknown |= {key for key, value in values.items() if isinstance(value, dict) and key not in cli.commands}
    if unknown:
        raise click.BadParameter(f"{path}: no command knows {', '.join(sorted(unknown))}")
    context.default_map = defaults


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "auto_envvar_prefix": "OUTSIZE"},
    epilog="Every option is also a variable, OUTSIZE_MEMORY or OUTSIZE_SEGMENT_MEMORY. "
    "Exit codes: 0 done, 1 failed, 2 usage, 3 finished with failed tiles or windows, 130 interrupted.",
)
@click.version_option(__version__, prog_name="outsize")
@click.option(
    "--json", "as_json", is_flag=True, envvar="OUTSIZE_JSON", help="Print one JSON object on the last line of stdout."
)
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="Defaults from a TOML file; options and variables go before them.",
)
@click.pass_context
def cli(context: click.Context, as_json: bool, debug: bool) -> None:  # noqa: ARG001 - debug is read by main
    """Run CNNs over rasters that outsize the machine: tile by tile, with the same result as the whole image.

    \b
    outsize sample demo --size 4096               a scene to try with
    outsize plan demo/scene.zarr                  what a run would do
    outsize segment demo/scene.zarr demo/map.zarr
    outsize verify demo/map.zarr                  every chunk, and sampled pixels again
    outsize evaluate demo/map.zarr demo/labels.zarr
    outsize train demo/scene.zarr --labels demo/labels.zarr --out training
    outsize export demo/map.zarr demo/map.tif     a cloud-optimised GeoTIFF
    outsize export demo/map.zarr demo/map.png     a picture of input and result
    """
    from .console import Console

    context.obj = Console(as_json=as_json)


class _NodataValue(click.ParamType):
    """A number, nan, or none."""

    name = "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value is None or str(value).lower() == "none":
            return "none"
        try:
            return float(value)
        except ValueError:
            self.fail(f"a number, nan or none, got {value!r}", param, ctx)


class _MaskBand(click.ParamType):
    """N=V,V,...: a band and its values that mean nodata."""

    name = "mask"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        band, _, values = str(value).partition("=")
        try:
            return int(band), tuple(float(part) for part in values.split(","))
        except ValueError:
            self.fail(f"a band and its values that mean nodata, such as 8=2,4; got {value!r}", param, ctx)


_overwrite = option("--overwrite", is_flag=True, help="Replace an existing output.")
_model_options = together(
    option("--weights", type=click.Path(), help="A factory's weights: .safetensors, or a state dict (.pt)."),
    option("--trust-model", is_flag=True, help="Load model files that could run code."),
    option("--sha256", metavar="HEX", help="Load the one file of this hash that could run code."),
)
_planning = together(
    option(
        "--model",
        metavar="MODEL",
        help="A model's .json, package.module:factory, or .pt2 and others that could run code; "
        "without it the shipped one.",
    ),
    _model_options,
    option(
        "--output",
        type=click.Choice(["class", "probability", "logits"]),
        default="class",
        show_default=True,
        help="What to write for each pixel.",
    ),
    option(
        "--memory",
        show_default="2GB, and 2GB more for each CUDA device",
        metavar="SIZE",
        help="Budget of all processes together.",
    ),
    option(
        "--engine",
        type=click.Choice(["auto", "openvino", "torch"]),
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
_reading = together(
    option("--axes", metavar="ORDER", help="Order of a Zarr array's dimensions, such as yxb."),
    option("--bands", type=Numbers(int), metavar="N,N,...", help="Bands to read, from 1, in this order."),
    option(
        "--nodata",
        type=_NodataValue(),
        multiple=True,
        metavar="VALUE",
        help="Nodata value in place of the file's; repeat it for several; none: no value.",
    ),
    option("--nodata-any", is_flag=True, help="A pixel is nodata where one band is; without it where all are."),
    option("--alpha", is_flag=True, help="Take the band tagged alpha for a mask, not for a band."),
    option(
        "--mask-band",
        type=_MaskBand(),
        metavar="N=V,V,...",
        help="Band N is a mask; where it holds one of the values, a pixel is nodata.",
    ),
)
_writing = together(
    option(
        "--zarr-format",
        type=click.Choice(["2", "3"]),
        default="3",
        show_default=True,
        help="2 for readers that know no other, such as GDAL before 3.12.",
    ),
    option("--no-space-check", is_flag=True, help="Begin even if the disk might be too small."),
)
_cluster = together(
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


def _read_options(options: dict[str, Any]) -> Any:
    from ..tiler.raster import ReadOptions

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
    )


def _cluster_options(options: dict[str, Any]) -> Any:
    from ..tiler.cluster import ClusterOptions

    return ClusterOptions(
        scheduler=options["scheduler"],
        scheduler_file=options["scheduler_file"],
        tls_ca_file=options["tls_ca_file"],
        tls_cert=options["tls_cert"],
        tls_key=options["tls_key"],
        dashboard_address=None if options["no_dashboard"] else options["dashboard_address"],
    )


def _segment_options(source: str, options: dict[str, Any]) -> Any:
    from .segment import SegmentOptions

    names = (
        "model",
        "output",
        "memory",
        "engine",
        "device",
        "device_memory",
        "batch",
        "method",
        "precision",
        "compiles",
        "workers",
        "threads",
        "core",
        "weights",
        "trust_model",
        "sha256",
        "halo",
        "halo_stride",
    )
    return SegmentOptions(
        source=source,
        reading=_read_options(options),
        region=options["region"],
        bounds=options["bounds"],
        mark_nodata_context=options["mark_nodata_context"],
        **{name: options[name] for name in names},
    )


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--size", type=click.IntRange(1, 200_000), default=4096, show_default=True, help="Height and width.")
@click.option("--height", type=click.IntRange(1, 200_000), help="Height, if not --size.")
@click.option("--width", type=click.IntRange(1, 200_000), help="Width, if not --size.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Another scene each.")
@click.option(
    "--axes", type=click.Choice(["byx", "yxb"]), default="byx", show_default=True, help="Order of the dimensions."
)
@_overwrite
@click.pass_obj
def sample(
    console: Any, folder: Path, size: int, height: int | None, width: int | None, seed: int, axes: str, overwrite: bool
) -> None:
    """Make a 4-band scene with labels: FOLDER/scene.zarr and FOLDER/labels.zarr.

    \b
    outsize sample demo
    outsize sample giant --size 30000 --axes yxb
    """
    from .sample import run_sample

    run_sample(console, folder, height=height or size, width=width or size, seed=seed, axes=axes, overwrite=overwrite)


@cli.command()
@click.argument("src", nargs=-1, required=True)
@click.argument("dst", type=Place())
@option("--stack", is_flag=True, help="Several SRC are bands of one grid, in this order.")
@option("--mosaic", is_flag=True, help="Several SRC are pieces of one grid; the first with data counts.")
@_reading
@option("--memory", default="2GB", show_default=True, metavar="SIZE", help="Budget of all processes together.")
@option("--workers", type=click.IntRange(1), help="Worker processes; without it one for each core.")
@_writing
@_cluster
@_overwrite
@click.pass_obj
def ingest(
    console: Any, src: tuple[str, ...], dst: Path, stack: bool, mosaic: bool, overwrite: bool, **options: Any
) -> None:
    """Copy rasters into one Zarr store DST, pixels and georeference equal. The same command continues an interrupted
    copy. Windows that cannot be read become nodata and are listed (exit code 3). `segment` reads GeoTIFF, COG, VRT and
    Zarr directly too.

    \b
    outsize ingest scene.tif scene.zarr
    outsize ingest B04.tif B03.tif B02.tif B08.tif scene.zarr --stack
    outsize ingest tile_*.tif scene.zarr --mosaic
    outsize ingest landsat.tif scene.zarr --bands 3,2,1,4 --mask-band 8=2,4 --nodata 16000 --nodata-any
    outsize ingest cube.zarr scene.zarr --axes yxb
    """
    from .ingest import IngestOptions, run_ingest

    summary = run_ingest(
        console,
        IngestOptions(
            sources=src,
            stack=stack,
            mosaic=mosaic,
            reading=_read_options(options),
            memory=options["memory"],
            workers=options["workers"],
            zarr_format=2 if options["zarr_format"] == "2" else 3,
            space_check=not options["no_space_check"],
            overwrite=overwrite,
        ),
        dst,
        _cluster_options(options),
    )
    if summary.unreadable:
        raise SystemExit(EXIT_FAILED_TILES)


@cli.command()
@click.argument("src")
@_reading
@_planning
@option("--prove", is_flag=True, help="Try instead, on a small image in float64, that tiles equal the whole.")
@click.pass_obj
def plan(console: Any, src: str, prove: bool, **options: Any) -> None:
    """Show what `segment` would do: tiles, halo and why, memory, time. Reads no pixel.

    \b
    outsize plan scene.tif --memory 4GB
    outsize plan scene.tif --model mynet:build --weights mynet.pt --prove
    """
    from .segment import run_plan, run_proof

    if not prove:
        run_plan(console, _segment_options(src, options))
    elif not run_proof(console, _segment_options(src, options)):
        raise SystemExit(EXIT_FAILED)


@cli.command()
@click.argument("sources", nargs=-1, metavar="SRC... [OUT]")
@option(
    "--out-dir",
    type=Place(),
    metavar="DIR",
    help="A batch: all arguments are inputs, each written to DIR/NAME.zarr.",
)
@option(
    "--list",
    "lists",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="Of a batch: a text file with a path on each line, and a name after a tab if wanted.",
)
@option(
    "--asset",
    "assets",
    multiple=True,
    metavar="KEY",
    help="Of STAC items: the asset to read; several are the bands of one raster. Without it the one of role data.",
)
@option("--dry-run", is_flag=True, help="List plan and cost of each scene; read and write nothing.")
@_reading
@_planning
@_writing
@_cluster
@option("--no-resume", is_flag=True, help="Refuse an existing output instead of continuing it.")
@option(
    "--report",
    type=Place(),
    metavar="FILE.html",
    help="Also write a page on the run: pictures, areas, plan, checks, speed, failures; when it failed, too.",
)
@option("--retry-failed", is_flag=True, help="Also try tiles again that failed in an earlier call.")
@option(
    "--tile-timeout",
    type=click.FloatRange(1),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="A worker that does not answer for so long is restarted, and its tile tried alone at the end; never less than "
    "20 times the longest tile, or than the largest tile's work takes a slow machine.",
)
@_overwrite
@click.pass_obj
def segment(console: Any, sources: tuple[str, ...], out_dir: Path | None, **options: Any) -> None:
    """Segment a raster SRC into OUT, a Zarr store; or with --out-dir many: paths, patterns, folders of rasters, STAC
    items (.json), lists. The same command continues what was interrupted. Tiles that fail become nodata and are listed
    (exit code 3); a scene that fails does not stop a batch (exit code 1 at the end).

    \b
    outsize segment scene.tif map.zarr
    outsize segment scene.zarr map.zarr --output probability --memory 4GB
    outsize segment scene.tif part.zarr --region 1000,2000,4096,4096
    outsize segment landsat.tif map.zarr --bands 3,2,1,4 --nodata -9999
    outsize segment scene.tif map.zarr --retry-failed
    outsize segment scene.zarr map.zarr --scheduler tcp://10.0.0.5:8786
    outsize segment 'scenes/*.tif' more/ --out-dir maps/ --dry-run
    outsize segment items.json --asset B04 --asset B03 --asset B02 --asset B08 --out-dir maps/
    outsize segment s3://bucket/scene.tif s3://bucket/map.zarr
    """
    if out_dir is not None:
        if options["report"]:
            raise click.UsageError("--report is for one scene; of a batch, outsize report DIR/NAME.zarr for each")
        _segment_batch(console, sources, out_dir, options)
        return
    if options["lists"] or options["assets"]:
        raise click.UsageError("--list and --asset are for batches; give --out-dir DIR")
    if len(sources) != 2:
        raise click.UsageError(f"one SRC and its OUT, or inputs and --out-dir DIR; got {len(sources)} arguments")
    from .segment import run_plan, run_segment

    known, out = _segment_options(sources[0], options), Place().convert(sources[1], None, None)
    cluster = _cluster_options(options)
    if options["dry_run"]:
        from ..tiler.places import is_remote

        run_plan(console, known, dashboard=cluster.serves_dashboard, to_store=is_remote(out))
        return
    if run_segment(console, known, out, cluster, _write_options(options)).failed_tiles:
        raise SystemExit(EXIT_FAILED_TILES)


def _write_options(options: dict[str, Any]) -> Any:
    from .segment import WriteOptions

    return WriteOptions(
        resume=not options["no_resume"],
        overwrite=options["overwrite"],
        retry_failed=options["retry_failed"],
        patience=options["tile_timeout"],
        zarr_format=2 if options["zarr_format"] == "2" else 3,
        space_check=not options["no_space_check"],
        report=options["report"],
    )


def _segment_batch(console: Any, sources: tuple[str, ...], folder: Path, options: dict[str, Any]) -> None:
    from .scenes import find_scenes

    # Before torch is imported, which takes seconds: a wrong call is told at once.
    scenes = find_scenes(sources, options["lists"], options["assets"])
    from .batch import run_batch, run_dry

    known, cluster = _segment_options("", options), _cluster_options(options)
    if options["dry_run"]:
        if not run_dry(console, scenes, known, folder, dashboard=cluster.serves_dashboard):
            raise SystemExit(EXIT_FAILED)
        return
    results = run_batch(console, scenes, known, folder, cluster, _write_options(options))
    states = {result.state for result in results}
    if "failed" in states:
        raise SystemExit(EXIT_FAILED)
    if "partial" in states:
        raise SystemExit(EXIT_FAILED_TILES)


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
        help="How rows follow their gradient; docs/faceid.md compares them.",
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


@cli.group(cls=_Group)
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
@click.option("--margin", type=click.Choice(["arcface", "cosface", "softmax"]), default="arcface", show_default=True)
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
    from .face import FaceBenchmarkOptions, run_face_benchmark

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
    outsize face train ms1m/ --faces train.rec --network r100 --recompute --batch 256
    torchrun --nproc-per-node 2 -m outsize face train faces/ --faces list.csv
    """
    from .cli_face_train import make_face_training
    from .face_train import run_face_train

    training = make_face_training(out, options)
    if not run_face_train(console, training, ranks=ranks, threads=threads, memory=memory):
        raise SystemExit(EXIT_FAILED_TILES)


for _command in FACE_COMMANDS:
    face.add_command(_command)


@cli.command()
@click.argument("out", type=Place())
@option("--samples", type=click.IntRange(0), default=12, show_default=True, help="Tiles to compute again in part.")
@option("--repair", is_flag=True, help="Compute damaged tiles again, and only those.")
@option("--model", metavar="MODEL", help="The one that made OUT, as segment takes it; without it the shipped one.")
@_model_options
@option(
    "--memory",
    show_default="2GB, and 2GB more for each CUDA device",
    metavar="SIZE",
    help="Budget of a repair.",
)
@_cluster
@click.pass_obj
def verify(console: Any, out: Path, **options: Any) -> None:
    """Read every chunk of an output: present, decodable, of the content that was written; and compute sampled pixels
    again in larger windows. Exit code 1 where something is damaged or the run never came to its end, 3 where all is
    well but for failed tiles.

    \b
    outsize verify map.zarr
    outsize verify map.zarr --repair
    outsize verify map.zarr --model mynet.json --samples 100
    """
    from .verify import VerifyOptions, run_verify

    names = ("samples", "repair", "model", "weights", "trust_model", "sha256", "memory")
    known = VerifyOptions(**{name: options[name] for name in names})
    state = run_verify(console, out, known, _cluster_options(options))
    if state != "sound":
        raise SystemExit(EXIT_FAILED_TILES if state == "partial" else EXIT_FAILED)


@cli.command()
@click.argument("scenes", nargs=-1, required=True, metavar="SCENE...")
@train_options
@click.option("--model", metavar="MODEL", help="Start from this one, as segment takes it; without it a new U-Net.")
@_model_options
@option("--memory", default="2GB", show_default=True, metavar="SIZE", help="Budget of the process; on Dask of each.")
@_reading
@_cluster
@_overwrite
@click.pass_obj
def train(console: Any, scenes: tuple[str, ...], **options: Any) -> None:
    """Train a segmentation network on scenes of any size and leave DIR/best.json, a model for segment, with last.json,
    train.jsonl and report.html beside it. Gradients are exact: those of whole scenes, or of tiles that see their true
    context, computed here, by --workers or on Dask. The same command goes on after a stop, with the same weights as
    without it.

    \b
    outsize train scene.tif --labels labels.tif --out training
    outsize train a.tif b.tif c.tif --labels a.shp --labels b.shp --labels c.shp --out training
        --label-field cover --classes water,sand,forest --validate-on c.tif
    outsize train scene.zarr --labels polygons.geojson --out training --minutes 30 --class-weights balanced
    outsize train scene.zarr --labels labels.zarr --out tuned --model training/best.json --lr 2e-4 --steps 300
    outsize train scene.tif --labels labels.tif --out training --step image --optimiser sgd --lr 0.05 --steps 200
    outsize train scene.tif --labels labels.tif --out training --step image --scheduler tcp://10.0.0.5:8786
    outsize segment other.tif map.zarr --model training/best.json
    """
    from .cli_train import run_train_command

    run_train_command(console, scenes, options, _read_options(options), _cluster_options(options))


@cli.command()
@click.argument("pairs", nargs=-1, required=True, metavar="OUT LABELS...")
@label_options
@click.pass_obj
def evaluate(console: Any, pairs: tuple[str, ...], **options: Any) -> None:
    """Compare class maps with labels, a raster on the map's grid or polygons: IoU, F1, precision and recall of each
    class, accuracy, confusion matrix; of several maps with their labels each and all together.

    \b
    outsize evaluate map.zarr labels.zarr
    outsize evaluate a.zarr a-labels.tif b.zarr b-labels.tif
    outsize evaluate map.zarr polygons.shp --label-field cover --label-encoding latin1
    """
    from .evaluate import run_evaluate

    if len(pairs) % 2:
        raise click.UsageError(f"each OUT needs its LABELS after it, got {len(pairs)} arguments")
    maps = [Place().convert(out, None, None) for out in pairs[::2]]
    run_evaluate(console, list(zip(maps, pairs[1::2], strict=True)), make_label_options(options, pairs[1::2]))


@cli.command()
@click.argument("out", type=Place())
@click.argument("file", type=Place(), required=False)
@_overwrite
@click.pass_obj
def report(console: Any, out: Path, file: Path | None, overwrite: bool) -> None:
    """Write a page on an output, OUT.html where no FILE is named: pictures before and after, class areas, plan, start
    check, throughput, memory, failed tiles, provenance. One file, which opens anywhere.

    \b
    outsize report map.zarr
    outsize report map.zarr report.html --overwrite
    """
    from .report import run_report

    run_report(console, out, file, overwrite=overwrite)


@cli.command()
@click.argument("out", type=Place())
@click.argument("file", type=Place())
@_overwrite
@click.pass_obj
def export(console: Any, out: Path, file: Path, overwrite: bool) -> None:
    """Write an output as FILE: .tif a cloud-optimised GeoTIFF with overviews, .png a quicklook of input and result.

    \b
    outsize export map.zarr map.tif
    outsize export map.zarr map.png
    """
    from .export import run_export

    run_export(console, out, file, overwrite=overwrite)


@cli.command()
@click.pass_obj
def doctor(console: Any) -> None:
    """Show versions, cores, engines and GDAL's drivers, and try a small run against the whole image. Exit code 1 where
    it comes out wrong.

    \b
    outsize doctor
    outsize --json doctor
    """
    from .doctor import run_doctor

    if not run_doctor(console):
        raise SystemExit(EXIT_FAILED)


@cli.group(cls=_Group)
def model() -> None:
    """Look at model files, and write your own.

    \b
    outsize model show
    outsize model pack mynet:build mynet.json --weights mynet.safetensors
    """


def _source_options(source: str | None, options: dict[str, Any]) -> Any:
    from .model import SourceOptions, parse_hyperparameters

    return SourceOptions(
        source=source,
        weights=options["weights"],
        hyperparameters=parse_hyperparameters(options["hyperparameter"]),
        trust_model=options["trust_model"],
        sha256=options["sha256"],
    )


_hyperparameter = click.option(
    "--hyperparameter", multiple=True, metavar="KEY=JSON", help="A keyword argument of the factory; once for each."
)


@model.command(short_help="Write a model file from a factory and weights, or from another file.")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@_model_options
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
    "--class", "classes", multiple=True, metavar="NAME=#RRGGBB", help="A class and its colour; once for each channel."
)
@_overwrite
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
    outsize model pack mynet.pt2 mynet.json --trust-model --scaling min-max --minimum 0 --maximum 255
    """
    from .model import PackOptions, run_pack

    constants = {key: options[key] for key in ("mean", "stddev", "minimum", "maximum", "offset", "scale")}
    packing = PackOptions(name=name, bands=bands, scaling=scaling, constants=constants, fill=fill, classes=classes)
    run_pack(console, _source_options(source, options), out, packing, overwrite=overwrite)


@model.command(short_help="Print what a model says.")
@click.argument("source", metavar="[MODEL]", required=False)
@_model_options
@_hyperparameter
@click.pass_obj
def show(console: Any, source: str | None, **options: Any) -> None:
    """Print what a model says: bands, scaling, fill, classes, architecture, sha256. A .json is read, not loaded.

    \b
    outsize model show
    outsize model show mynet.json
    outsize --json model show mynet.pt2 --trust-model
    """
    from .model import run_show

    run_show(console, _source_options(source, options))


def _global_first(arguments: list[str]) -> list[str]:
    """`--json`, `--debug` and `--config FILE` may stand anywhere; click wants them before the command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    moved: list[str] = []
    others: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        if word == "--config":
            moved += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word in ("--json", "--debug") or word.startswith("--config="):
            moved.append(word)
        else:
            others.append(word)
    return moved + others + arguments[end:]


def main(arguments: list[str] | None = None) -> None:
    """The `outsize` command."""
    words = _global_first(sys.argv[1:] if arguments is None else arguments)
    if threading.current_thread() is threading.main_thread():
        # SIGTERM is what batch systems send first, SIGHUP what is left of a lost connection.
        heed_interrupts(lambda: _end_at_once(words))
    debug = "--debug" in words or bool(os.environ.get("OUTSIZE_DEBUG"))
    try:
        cli.main(words, prog_name="outsize", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        _end(words, error.exit_code, error.format_message())
    except (KeyboardInterrupt, click.Abort):
        print(f"outsize: {_interrupted(words)}", file=sys.stderr)
        _end(words, EXIT_INTERRUPTED, _interrupted(words))
    except BrokenPipeError:
        # The reader of our output has gone: nothing more to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:  # noqa: BLE001 - the last line of defence
        from .console import printable

        if debug:
            traceback.print_exc()
        if isinstance(error, TilerError):
            print(printable(f"outsize: error: {error}"), file=sys.stderr)
            _end(words, error.exit_code, str(error))
        reason = (str(error).strip().splitlines() or [""])[0]
        print(printable(f"outsize: unexpected {type(error).__name__}: {reason} (--debug shows where)"), file=sys.stderr)
        _end(words, EXIT_FAILED, f"{type(error).__name__}: {reason}")


def _interrupted(words: list[str]) -> str:
    resumes = bool({"segment", "ingest", "train"} & set(words))
    return f"interrupted; {'the same command goes on where it stopped' if resumes else 'the same command begins anew'}"


def _end_at_once(words: list[str]) -> NoReturn:
    """As after an interruption, without winding up; workers that were started here die with this process."""
    os.write(2, f"outsize: {_interrupted(words)}\n".encode())
    if _wants_json(words):
        os.write(1, json.dumps({"error": _interrupted(words), "exit_code": EXIT_INTERRUPTED}).encode() + b"\n")
    os._exit(EXIT_INTERRUPTED)


def _wants_json(words: list[str]) -> bool:
    return "--json" in words or os.environ.get("OUTSIZE_JSON", "") not in ("", "0", "false")


def _end(words: list[str], code: int, error: str) -> NoReturn:
    """End with a code; with --json the last line of stdout says why."""
    if _wants_json(words):
        print(json.dumps({"error": error, "exit_code": code}), flush=True)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
