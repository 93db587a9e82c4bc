"""`outsize export`: an output as a file of another format, by its suffix."""

from __future__ import annotations

import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path

from ...tiler.base.errors import OutputError, UsageError
from ...tiler.base.text import format_bytes
from ...tiler.output.records import writing
from ...tiler.output.store import read_header
from ...tiler.system.files import upload
from ...tiler.system.meter import MemoryMeter
from ...tiler.system.places import is_remote, require_lasting
from ..base.console import Console
from .writers import WRITERS, Export


def run_export(console: Console, out: Path, target: Path, *, overwrite: bool, trust: bool = False) -> None:
    """Write TARGET by its suffix: .tif a COG, .png a quicklook of input and result, others as registered.

    Args:
        trust: of the input, as in `open_raster`.
    """
    require_lasting(target)
    header = read_header(out)
    if target.is_dir():
        raise OutputError(f"{target} is a folder; choose another path")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another path, or --overwrite")
    name = target.suffix.lower().removeprefix(".")
    if name not in WRITERS.names():
        added = "".join(f", .{other}" for other in WRITERS.added_names())
        raise UsageError(f"export writes .tif (COG) or .png (quicklook){added}, got {target.name}")
    write = WRITERS.find(name)
    # Written beside its place, or here for a store, and moved there whole.
    fresh = f".{target.stem}-{uuid.uuid4().hex[:8]}{target.suffix}"
    with ExitStack() as stack:
        if is_remote(target):
            unfinished = Path(stack.enter_context(tempfile.TemporaryDirectory()), fresh)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_name(fresh)
            stack.callback(unfinished.unlink, missing_ok=True)
        with MemoryMeter() as meter:
            write(Export(console=console, out=out, header=header, trust=trust), unfinished)
        if not unfinished.is_file():
            raise OutputError(f"export writer {name} left no file for {target}")
        size = unfinished.stat().st_size
        if is_remote(target):
            with writing(target):
                upload(unfinished, target)
        else:
            unfinished.replace(target)
    console.result(
        f"{target}: {format_bytes(size)}, peak memory {format_bytes(meter.peak_bytes)}",
        {"out": str(target), "bytes": size, "peak_bytes": meter.peak_bytes},
    )
