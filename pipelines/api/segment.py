"""A raster through a model in one call: opened, matched, analysed, planned, checked, run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from distributed import Client
from torch import nn

from ...models.segmentation.files.sources import load_model
from ...models.segmentation.networks.model import Output, SegmentationModel, as_tile_network, describe_output
from ...tiler.analysis.network import analyze_network
from ...tiler.base.errors import UsageError
from ...tiler.cluster.client import ClusterKeeper, ClusterOptions
from ...tiler.output.options import WriteOptions
from ...tiler.planning.options import PlanOptions
from ...tiler.rasters.bands import match_bands
from ...tiler.rasters.opening import as_raster, open_with
from ...tiler.rasters.parts import open_stack
from ...tiler.rasters.raster import Raster, ReadOptions
from ...tiler.runs.events import Listener
from ...tiler.runs.request import RunKeywords, RunRequest, ignore, split_keywords
from ...tiler.runs.run import run_raster
from ...tiler.system.places import is_path
from ..base.console import Console
from ..segment.run import RunListener
from .result import Result, result_of


def segment(
    source: Any,
    model: SegmentationModel | nn.Module | str | Path | None,
    out: str | Path,
    *,
    output: Output | None = None,
    reading: ReadOptions | None = None,
    planning: PlanOptions | None = None,
    writing: WriteOptions | None = None,
    client: Client | None = None,
    cluster: ClusterOptions | ClusterKeeper | None = None,
    progress: bool | None = None,
    listener: Listener | None = None,
    **keywords: Unpack[RunKeywords],
) -> Result:
    """Segment a raster of any size into a Zarr store, within a memory budget; the same call continues what was
    interrupted.

    Guarantee: every pixel is that of the model on the whole raster, up to floating-point rounding, whatever tiles,
    budget and workers; a start check confirms it before anything is written. Nodata in, nodata out.

    Args:
        source: a path or URL that GDAL or Zarr opens, several as the bands of one raster, an open raster, an array of
            numpy, torch or xarray of (bands, height, width).
        model: an `outsize.Model`; a module of torch, which is taken for a model of as many bands as the raster has,
            without scaling; the path of a model file; None: the shipped model.
        out: the store to write, such as "map.zarr".
        output: "class", "probability", "logits" or "values"; None: classes, or the values of a regression.
        reading: how the source is read where it does not say so itself: bands, nodata, masks, scale.
        planning: what of the plan is chosen already; None: nothing.
        writing: how the output is treated: resume, overwrite, ...; None: as the defaults say.
        client: a Dask client to use; None: workers are started as `cluster` says.
        progress: show a bar and what the run says on stderr; None: where stderr is a terminal.
        listener: called with every event, in place of what `progress` shows.
        keywords: fields of `PlanOptions` and `WriteOptions`, such as memory="2GB" or overwrite=True.

    Returns:
        The output, with the summary of this call.

    Raises:
        TilerError: its subclasses say what: raster, model, budget, output, engine, start check.
        TypeError: a keyword that is no option.
    """
    planning, writing = split_keywords(keywords, planning, writing)
    raster = _open(source, reading)
    known = _as_model(model, raster)
    raster = match_bands(raster, known.bands, f"model {known.name}").raster
    network = analyze_network(as_tile_network(known, output), raster.bands, raster.dtype)
    cluster = cluster or ClusterOptions()
    options = cluster.options if isinstance(cluster, ClusterKeeper) else cluster
    shown = None
    if listener is None and (sys.stderr.isatty() if progress is None else progress):
        shown = RunListener(Console(), own_page=options.dashboard_address is not None)
    request = RunRequest(
        planning=planning,
        writing=writing,
        description=describe_output(known, output),
        fill=known.fill,
        client=client,
        cluster=cluster,
        listener=listener or shown or ignore,
    )
    try:
        summary = run_raster(raster, network, out, request)
    finally:
        if shown is not None:
            shown.close()
    return result_of(summary)


def _open(source: Any, reading: ReadOptions | None) -> Raster:
    if isinstance(source, Raster):
        if reading is not None:
            raise UsageError("an open raster is read as it was opened; leave reading out, or give its path")
        return source
    if is_path(source):
        return open_with(source, reading or ReadOptions())
    if isinstance(source, Sequence) and source and all(map(is_path, source)):
        return open_stack([str(each) for each in source], reading or ReadOptions())
    if reading is not None:
        raise UsageError("options of reading are for files; an array is what it is, leave reading out")
    return as_raster(source)


def _as_model(model: SegmentationModel | nn.Module | str | Path | None, raster: Raster) -> SegmentationModel:
    if isinstance(model, SegmentationModel):
        return model
    if isinstance(model, nn.Module):
        return SegmentationModel(model, bands=raster.bands)
    if model is None or is_path(model):
        return load_model(model, bands=raster.bands)
    kind = type(model).__name__
    raise UsageError(f"a model is an outsize.Model, a module of torch or the path of a model file, got {kind}")
