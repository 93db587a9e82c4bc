"""The command line: options, exit codes, error lines. Each command's work is in its own file, imported when called."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import threading
import tomllib
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from ... import __version__
from ...tiler.base.errors import TilerError
from ...tiler.base.text import first_line, one_line, reason_of
from ...tiler.cluster.dask_trouble import find_dask_trouble
from ...tiler.system.files import MOST_TEXT, read_regular
from ...tiler.system.process_end import end_with
from ..base.interrupts import heed_interrupts
from ..base.option_types import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SOME_FAILED, Folder, OrderedGroup, Place, option
from .face import face
from .model import model
from .options import (
    cluster_options,
    make_cluster_options,
    make_read_options,
    make_segment_options,
    make_write_options,
    model_options,
    overwrite_option,
    planning_options,
    reading_options,
    trust_option,
    unchanged_option,
    writing_options,
)
from .train import label_options, make_label_options, train_options


def _load_config(context: click.Context, _parameter: click.Parameter, path: str | None) -> None:
    """Values of run.toml become defaults: `memory = "2GB"` for all commands, `[segment]` for one."""
    if path is None:
        return
    try:
        values = tomllib.loads(read_regular(Path(path), MOST_TEXT).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise click.BadParameter(one_line(f"{path}: {reason_of(error)}")) from error
    shared = {key: value for key, value in values.items() if not isinstance(value, dict)}
    defaults: dict[str, Any] = {}
    for name, command in cli.commands.items():
        known = {parameter.name for parameter in command.params}
        # `model = "x.json"` is an option, though there is a command of that name.
        own = values[name] if isinstance(values.get(name), dict) else {}
        unknown = {key for key in own if key.replace("-", "_") not in known}
        if unknown:
            raise click.BadParameter(one_line(f"{path}: [{name}] has no option {', '.join(sorted(unknown))}"))
        merged = {key.replace("-", "_"): value for key, value in {**shared, **own}.items()}
        several = {parameter.name for parameter in command.params if getattr(parameter, "multiple", False)}
        merged = {k: [v] if k in several and not isinstance(v, list) else v for k, v in merged.items()}
        defaults[name] = {key: value for key, value in merged.items() if key in known}
    everything = {p.name for command in cli.commands.values() for p in command.params}
    unknown = {key for key in shared if key.replace("-", "_") not in everything}
    unknown |= {key for key, value in values.items() if isinstance(value, dict) and key not in cli.commands}
    if unknown:
        raise click.BadParameter(one_line(f"{path}: no command knows {', '.join(sorted(unknown))}"))
    context.default_map = defaults


@click.group(
    cls=OrderedGroup,
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
    type=click.Path(),
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
    from ..base.console import Console

    context.obj = Console(as_json=as_json)


@cli.command()
@click.argument("folder", type=Folder())
@click.option("--size", type=click.IntRange(1, 200_000), default=4096, show_default=True, help="Height and width.")
@click.option("--height", type=click.IntRange(1, 200_000), help="Height, if not --size.")
@click.option("--width", type=click.IntRange(1, 200_000), help="Width, if not --size.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Another scene each.")
@click.option(
    "--axes", type=click.Choice(["byx", "yxb"]), default="byx", show_default=True, help="Order of the dimensions."
)
@overwrite_option
@click.pass_obj
def sample(
    console: Any, folder: Path, size: int, height: int | None, width: int | None, seed: int, axes: str, overwrite: bool
) -> None:
    """Make a 4-band scene with labels: FOLDER/scene.zarr and FOLDER/labels.zarr.

    \b
    outsize sample demo
    outsize sample giant --size 30000 --axes yxb
    """
    from ..segment.sample import run_sample

    run_sample(console, folder, height=height or size, width=width or size, seed=seed, axes=axes, overwrite=overwrite)


@cli.command()
@click.argument("src", nargs=-1, required=True)
@click.argument("dst", type=Place())
@option("--stack", is_flag=True, help="Several SRC are bands of one grid, in this order.")
@option("--mosaic", is_flag=True, help="Several SRC are pieces of one grid; the first with data counts.")
@reading_options
@option("--memory", default="2GB", show_default=True, metavar="SIZE", help="Budget of all processes together.")
@option("--workers", type=click.IntRange(1), help="Worker processes; without it one for each core.")
@writing_options
@cluster_options
@overwrite_option
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
    from ..segment.ingest import IngestOptions, run_ingest

    summary = run_ingest(
        console,
        IngestOptions(
            sources=src,
            stack=stack,
            mosaic=mosaic,
            reading=make_read_options(options),
            memory=options["memory"],
            workers=options["workers"],
            zarr_format=2 if options["zarr_format"] == "2" else 3,
            space_check=not options["no_space_check"],
            overwrite=overwrite,
        ),
        dst,
        make_cluster_options(options),
    )
    if summary.unreadable:
        raise SystemExit(EXIT_SOME_FAILED)


@cli.command()
@click.argument("src")
@reading_options
@planning_options
@option("--prove", is_flag=True, help="Try instead, on a small image in float64, that tiles equal the whole.")
@click.pass_obj
def plan(console: Any, src: str, prove: bool, **options: Any) -> None:
    """Show what `segment` would do: tiles, halo and why, memory, time. Reads no pixel.

    \b
    outsize plan scene.tif --memory 4GB
    outsize plan scene.tif --model mynet:build --weights mynet.pt --prove
    """
    from ..segment.run import run_plan, run_proof

    if not prove:
        run_plan(console, make_segment_options(src, options))
    elif not run_proof(console, make_segment_options(src, options)):
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
@reading_options
@planning_options
@writing_options
@cluster_options
@option("--no-resume", is_flag=True, help="Refuse an existing output instead of continuing it.")
@option(
    "--report",
    type=Place(),
    metavar="FILE.html",
    help="Also write a page on the run: pictures, areas, plan, checks, speed, failures; when it failed, too.",
)
@option("--retry-failed", is_flag=True, help="Also try tiles again that failed in an earlier call.")
@unchanged_option
@option(
    "--tile-timeout",
    type=click.FloatRange(1),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="A worker that does not answer for so long is restarted, and its tile tried alone at the end; never less than "
    "20 times the longest tile, or than the largest tile's work takes a slow machine.",
)
@overwrite_option
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
    from ..segment.run import run_plan, run_segment

    known, out = make_segment_options(sources[0], options), Place().convert(sources[1], None, None)
    cluster = make_cluster_options(options)
    if options["dry_run"]:
        from ...tiler.system.places import is_remote

        run_plan(console, known, dashboard=cluster.serves_dashboard, to_store=is_remote(out))
        return
    summary = run_segment(console, known, out, cluster, make_write_options(options), report=options["report"])
    if summary.failed_tiles:
        raise SystemExit(EXIT_SOME_FAILED)


def _segment_batch(console: Any, sources: tuple[str, ...], folder: Path, options: dict[str, Any]) -> None:
    from ..segment.scenes import find_scenes

    # Before torch is imported, which takes seconds: a wrong call is told at once.
    scenes = find_scenes(sources, options["lists"], options["assets"])
    from ..segment.batch import run_batch, run_dry

    known, cluster = make_segment_options("", options), make_cluster_options(options)
    if options["dry_run"]:
        if not run_dry(console, scenes, known, folder, dashboard=cluster.serves_dashboard):
            raise SystemExit(EXIT_FAILED)
        return
    results = run_batch(console, scenes, known, folder, cluster, make_write_options(options))
    states = {result.state for result in results}
    if "failed" in states:
        raise SystemExit(EXIT_FAILED)
    if "partial" in states:
        raise SystemExit(EXIT_SOME_FAILED)


@cli.command()
@click.argument("out", type=Place())
@option("--samples", type=click.IntRange(0), default=12, show_default=True, help="Tiles to compute again in part.")
@option("--repair", is_flag=True, help="Compute damaged tiles again, and only those.")
@unchanged_option
@trust_option
@option("--model", metavar="MODEL", help="The one that made OUT, as segment takes it; without it the shipped one.")
@model_options
@option(
    "--memory",
    show_default="2GB, and 2GB more for each CUDA device",
    metavar="SIZE",
    help="Budget of a repair.",
)
@cluster_options
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
    from ..segment.verify import VerifyOptions, run_verify

    names = (
        "samples",
        "repair",
        "model",
        "weights",
        "weights_key",
        "trust_model",
        "sha256",
        "memory",
        "source_unchanged",
        "trust_sources",
    )
    known = VerifyOptions(**{name: options[name] for name in names})
    state = run_verify(console, out, known, make_cluster_options(options))
    if state != "sound":
        raise SystemExit(EXIT_SOME_FAILED if state == "partial" else EXIT_FAILED)


@cli.command()
@click.argument("scenes", nargs=-1, required=True, metavar="SCENE...")
@train_options
@click.option("--model", metavar="MODEL", help="Start from this one, as segment takes it; without it a new U-Net.")
@model_options
@option("--memory", default="2GB", show_default=True, metavar="SIZE", help="Budget of the process; on Dask of each.")
@reading_options
@cluster_options
@overwrite_option
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
    from .train import run_train_command

    run_train_command(console, scenes, options, make_read_options(options), make_cluster_options(options))


@cli.command()
@click.argument("pairs", nargs=-1, required=True, metavar="OUT LABELS...")
@label_options
@trust_option
@click.pass_obj
def evaluate(console: Any, pairs: tuple[str, ...], **options: Any) -> None:
    """Compare class maps with labels, a raster on the map's grid or polygons: IoU, F1, precision and recall of each
    class, accuracy, confusion matrix; of several maps with their labels each and all together.

    \b
    outsize evaluate map.zarr labels.zarr
    outsize evaluate a.zarr a-labels.tif b.zarr b-labels.tif
    outsize evaluate map.zarr polygons.shp --label-field cover --label-encoding latin1
    """
    from ..segment.evaluate import run_evaluate

    if len(pairs) % 2:
        raise click.UsageError(f"each OUT needs its LABELS after it, got {len(pairs)} arguments")
    maps = [Place().convert(out, None, None) for out in pairs[::2]]
    run_evaluate(console, list(zip(maps, pairs[1::2], strict=True)), make_label_options(options, pairs[1::2]))


@cli.command()
@click.argument("out", type=Place())
@click.argument("file", type=Place(), required=False)
@overwrite_option
@trust_option
@click.pass_obj
def report(console: Any, out: Path, file: Path | None, overwrite: bool, trust_sources: bool) -> None:
    """Write a page on an output, OUT.html where no FILE is named: pictures before and after, class areas, plan, start
    check, throughput, memory, failed tiles, provenance. One file, which opens anywhere.

    \b
    outsize report map.zarr
    outsize report map.zarr report.html --overwrite
    """
    from ..segment.report import run_report

    run_report(console, out, file, overwrite=overwrite, trust=trust_sources)


@cli.command()
@click.argument("out", type=Place())
@click.argument("file", type=Place())
@overwrite_option
@trust_option
@click.pass_obj
def export(console: Any, out: Path, file: Path, overwrite: bool, trust_sources: bool) -> None:
    """Write an output as FILE: .tif a cloud-optimised GeoTIFF with overviews, .png a quicklook of input and
    result, others as they were added.

    \b
    outsize export map.zarr map.tif
    outsize export map.zarr map.png
    """
    from ..segment.export import run_export

    run_export(console, out, file, overwrite=overwrite, trust=trust_sources)


@cli.command()
@click.pass_obj
def doctor(console: Any) -> None:
    """Show versions, cores, engines and GDAL's drivers, and try a small run against the whole image. Exit code 1 where
    it comes out wrong.

    \b
    outsize doctor
    outsize --json doctor
    """
    from ..segment.doctor import run_doctor

    if not run_doctor(console):
        raise SystemExit(EXIT_FAILED)


cli.add_command(face)
cli.add_command(model)


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
        from ..base.console import printable

        shown = io.StringIO()
        error.show(shown)
        print(printable(shown.getvalue()), end="", file=sys.stderr)
        _end(words, error.exit_code, error.format_message())
    except (KeyboardInterrupt, click.Abort):
        print(f"outsize: {_interrupted(words)}", file=sys.stderr)
        _end(words, EXIT_INTERRUPTED, _interrupted(words))
    except BrokenPipeError:
        # The reader of our output has gone: nothing more to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:  # noqa: BLE001 - the last line of defence
        if debug:
            traceback.print_exc()
        error = find_dask_trouble(error) or error
        if isinstance(error, TilerError):
            print(one_line(f"outsize: error: {error}"), file=sys.stderr)
            _end(words, error.exit_code, str(error))
        reason = _system_reason(error)
        if reason:
            print(one_line(f"outsize: error: {reason}"), file=sys.stderr)
            _end(words, EXIT_FAILED, reason)
        reason = first_line(error, "")
        print(one_line(f"outsize: unexpected {type(error).__name__}: {reason} (--debug shows where)"), file=sys.stderr)
        _end(words, EXIT_FAILED, f"{type(error).__name__}: {reason}")


_OF_THE_SYSTEM = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EFBIG: "choose a disk or a limit that takes larger files",
    errno.EROFS: "choose another place",
    errno.EACCES: "allow it, or choose another place",
    errno.EPERM: "allow it, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a link to itself",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "give a file",
    errno.ENOENT: "it is not there, or its folder is not",
    errno.EEXIST: "something else is in its place",
    errno.EIO: "the disk does not answer as it should",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EINVAL: "choose another name",
}
"""What is to be done where the system refuses a file; told at the end only of what no command has better words for."""


def _system_reason(error: Exception) -> str:
    """Of a refusal of the system: which file, why, and what helps; empty for other errors."""
    if isinstance(error, MemoryError):
        return "not enough memory; choose a smaller --memory, or a machine with more"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{error}; give a path without it"
    if not isinstance(error, OSError) or error.errno not in _OF_THE_SYSTEM:
        return ""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {_OF_THE_SYSTEM[error.errno]}"


def run() -> NoReturn:
    """The command as a process of its own."""
    # What libraries say to each other's authors. Where they are called warnings are off anyway, but Python switches
    # them for the whole process, and a thread that converts may end after the one that switched them off.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(copyreg|torch|torch\..*|xarray|xarray\..*)$")
    end_with(main)


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
    run()
