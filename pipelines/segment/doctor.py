"""`outsize doctor`: what is installed, what the machine offers, and whether a small run comes out right."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rasterio
import torch
from rasterio.drivers import raster_driver_extensions
from rasterio.env import Env

from ...models.segmentation.files.sources import load_model
from ...models.segmentation.networks.model import as_tile_network
from ...sample_data.scene import Scene
from ...sample_data.write import write_scene
from ...tiler.analysis.network import analyze_network
from ...tiler.base.errors import EngineError
from ...tiler.base.geometry import Window
from ...tiler.base.text import format_bytes, format_seconds
from ...tiler.cluster.client import ClusterOptions
from ...tiler.engines.choice import choose_engine
from ...tiler.engines.devices import find_facts
from ...tiler.output.store import NODATA, open_array
from ...tiler.rasters.opening import open_raster
from ...tiler.rasters.raster import read_filled
from ...tiler.runs.run import predict
from ...tiler.runs.verify import verify_output
from ...tiler.system.cache_folder import cache_folder
from ...tiler.system.machine import cpu_count, measure_flops_per_s
from ..base.console import Console, count_of

PACKAGES = (
    "outsize", "torch", "openvino", "numpy", "zarr", "rasterio", "dask", "distributed", "bokeh", "s3fs", "fsspec"
)  # fmt: skip
DRIVERS = ("GTiff", "COG", "VRT", "JP2OpenJPEG", "Zarr", "HDF5", "netCDF")
SIZE = 384
"""Height and width of the self-test's scene."""


def run_doctor(console: Console) -> bool:
    """Print what there is; whether the self-test came out right."""
    sections: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("versions", _versions),
        ("machine", _machine),
        ("engines", _engines),
        ("gdal", _gdal),
        ("settings", _settings),
    ]
    found: dict[str, dict[str, Any]] = {}
    lines: list[str] = []
    for name, look in sections:
        found[name] = look()
        lines.append(f"{name:<9} " + ", ".join(f"{key} {value}" for key, value in found[name].items()))
    console.remark_lines(lines)
    test = _test_itself()
    found["self_test"] = test
    verdict = "right" if test["passed"] else "WRONG"
    console.result(
        f"self-test {verdict}: {test['text']} ({format_seconds(test['seconds'])})",
        {"passed": test["passed"], **found},
    )
    return bool(test["passed"])


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "gdal": rasterio.__gdal_version__, "system": f"{platform.system()} {platform.release()}"}


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "cores": cpu_count(),
        "memory": format_bytes(memory.total),
        "available": format_bytes(memory.available),
        "matrix product": f"{measure_flops_per_s() / 1e9:.0f} GFLOP/s",
        "free here": format_bytes(shutil.disk_usage(Path.cwd()).free),
        "free for temporary files": format_bytes(shutil.disk_usage(tempfile.gettempdir()).free),
    }


def _engines() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": f"{torch.get_num_threads()} threads"}
    try:
        facts = find_facts()
    except EngineError as error:
        facts = find_facts(with_cuda=False)
        found["cuda"] = str(error)
    for index, device in enumerate(facts.cuda):
        free, total = format_bytes(device.free_bytes), format_bytes(device.total_bytes)
        found[f"cuda:{index}"] = f"{device.name} ({free} of {total} free)"
    choice = choose_engine(facts)
    found["chosen"] = f"{choice.engine} on {choice.device}"
    if importlib.util.find_spec("openvino") is None:
        return {**found, "openvino": "not installed: pip install openvino"}
    import openvino

    return {**found, "openvino": " ".join(openvino.Core().available_devices) or "no device"}


def _gdal() -> dict[str, Any]:
    with Env() as env:
        known = env.drivers()
    return {
        "drivers": " ".join(name for name in DRIVERS if name in known) or "none",
        "missing": " ".join(name for name in DRIVERS if name not in known) or "none",
        "all": len(known),
        "writable": len(set(raster_driver_extensions().values())),
    }


def _settings() -> dict[str, Any]:
    folder = cache_folder()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    names = sorted(name for name in os.environ if name.startswith(("OUTSIZE_", "DASK_", "GDAL_", "AWS_")))
    # Names alone: a value may be a secret.
    return {"cache": f"{folder} ({format_bytes(size)})", "variables": " ".join(names) or "none"}


def _test_itself() -> dict[str, Any]:
    """A small scene through worker processes, every pixel beside the whole image's."""
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="outsize-doctor-") as folder:
            passed, text = _run_small(Path(folder))
    except Exception as error:  # noqa: BLE001 - whatever it is, this is where it is told
        passed, text = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
    return {"passed": passed, "text": text, "seconds": round(time.perf_counter() - began, 2)}


def _run_small(folder: Path) -> tuple[bool, str]:
    write_scene(folder, Scene(height=SIZE, width=SIZE, seed=7))
    raster, model = open_raster(folder / "scene.zarr"), load_model()
    module = as_tile_network(model, "class")
    network = analyze_network(module, raster.bands, raster.dtype)
    out = folder / "map.zarr"
    summary = predict(
        raster, network, out, fill=model.fill, core=128, cluster=ClusterOptions(dashboard_address=None), workers=1
    )
    filled = read_filled(raster.open_reader(), raster, Window.whole(raster.shape_yx), model.fill)
    with torch.inference_mode():
        whole = module(torch.from_numpy(filled.image)[None])[0, 0].numpy()
    if filled.missing is not None:
        whole[filled.missing] = NODATA
    differs = int((np.asarray(open_array(out, "class")[...]) != whole).sum())
    faults = verify_output(out).faults
    # Two engines may part where a pixel's two best classes are equal up to rounding.
    passed = differs <= 2 and not faults and not summary.failed_tiles
    return passed, (
        f"{count_of(summary.tiles, 'tile')} by {summary.engine} in a worker process, {differs} of {whole.size} pixels "
        f"differ from the whole image by torch, {count_of(len(faults), 'chunk')} damaged"
    )
