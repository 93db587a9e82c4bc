"""One contestant of `make bench`: a network over a scene, disk to disk, by one way of tiling; in a process of its own.

    python -m outsize.tests.benchmarks.contestant NAME SCENE.zarr OUT.zarr [--network small]

Prints one JSON line: seconds from the first read to the last chunk, imports and loading apart.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import nn

from ...models import SegmentationModel, as_tile_network, load_model
from ...models.segmentation.networks.unet import UNet
from ...tiler.system.machine import cpu_count

NAMES = (
    "bare",
    "bare rewritten",
    "outsize",
    "outsize int8",
    "monai 0.25",
    "monai 0.5",
    "map_overlap",
    "window loop",
    "window loop openvino",
    "whole",
)
CHUNK = 1024
WIDTHS = {
    "medium": (64, 128, 256, 512),
    "large": (112, 224, 448, 896, 1792),
}
HALOS = {"small": 48, "medium": 48, "large": 96}
"""What each network needs (46, 46, 94), rounded up to its stride."""


def make_network(name: str) -> nn.Module:
    """Scaling, network and argmax as one module: the shipped one, or of 7.8 or 96 million random weights."""
    model = load_model()
    if name in WIDTHS:
        torch.manual_seed(0)
        model = SegmentationModel(
            **{field: getattr(model, field) for field in model.__dataclass_fields__ if field != "network"},
            network=UNet(4, 6, WIDTHS[name]).eval(),
        )
    return as_tile_network(model, output="class")


def run_bare(scene: Path, out: Path, module: nn.Module, *, rewrite: bool) -> dict[str, Any]:
    """OpenVINO on windows that lie in memory, without overlap: the network as it is, or rewritten as outsize does."""
    import outsize

    from ...tiler.engines.openvino import OpenVinoEngine, convert_network

    del out
    raster = outsize.open_raster(scene)
    network = outsize.analyze_network(module, bands=raster.bands, dtype=raster.dtype)
    engine = OpenVinoEngine(convert_network(network, cpu_count()), rewrite=rewrite)
    image = zarr.open_array(scene, path="image", mode="r")
    starts = [(y, x) for y in range(0, image.shape[1], CHUNK) for x in range(0, image.shape[2], CHUNK)]
    # Few windows, used again and again: the same work for the engine, and no more memory than it needs.
    windows = [np.asarray(image[:, y : y + CHUNK, x : x + CHUNK]) for y, x in starts[:16]]
    windows = [window for window in windows if window.shape[1:] == (CHUNK, CHUNK)]
    engine.run(windows[0])
    pixels = image.shape[1] * image.shape[2]
    repeats = -(-pixels // CHUNK**2)
    began = time.perf_counter()
    for index in range(repeats):
        engine.run(windows[index % len(windows)])
    return {"seconds": (time.perf_counter() - began) * pixels / (repeats * CHUNK**2)}


def run_whole(scene: Path, out: Path, module: nn.Module) -> dict[str, Any]:
    """The whole image at once, by torch: what the others have to equal."""
    began = time.perf_counter()
    image = torch.from_numpy(np.asarray(zarr.open_array(scene, path="image", mode="r")[:]))[None]
    classes = module(image)[0, 0].numpy()
    create_output(out, classes.shape)[:] = classes
    return {"seconds": time.perf_counter() - began}


def create_output(out: Path, shape: tuple[int, int]) -> zarr.Array[Any]:
    """Class bytes in chunks like those of outsize."""
    return zarr.create_array(out, shape=shape, chunks=(CHUNK, CHUNK), dtype="u1", overwrite=True)


def run_outsize(scene: Path, out: Path, module: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """`outsize.predict` in its default budget, or the one that is given."""
    import outsize

    raster = outsize.open_raster(scene)
    network = outsize.analyze_network(module, bands=raster.bands, dtype=raster.dtype)
    summary = outsize.predict(
        raster,
        network,
        out,
        overwrite=True,
        memory=options.memory,
        workers=options.workers,
        threads=options.threads,
        core=options.core,
        precision="int8" if options.name == "outsize int8" else None,
    )
    return {"seconds": summary.seconds, "predicted_peak_bytes": summary.predicted_peak_bytes}


def run_monai(scene: Path, out: Path, module: nn.Module, overlap: float) -> dict[str, Any]:
    """MONAI's SlidingWindowInferer over the whole image in memory; logits are blended, as it does."""
    from monai.inferers import SlidingWindowInferer

    logits: Callable[[torch.Tensor], torch.Tensor] = module.logits  # pyright: ignore[reportAssignmentType]
    began = time.perf_counter()
    image = torch.from_numpy(np.asarray(zarr.open_array(scene, path="image", mode="r")[:]))[None]
    inferer = SlidingWindowInferer(roi_size=(CHUNK, CHUNK), sw_batch_size=1, overlap=overlap)
    # It blends in the image's own type, so that bytes have to be floats.
    classes = inferer(image.float(), logits).argmax(1)[0].to(torch.uint8).numpy()  # pyright: ignore[reportAttributeAccessIssue]
    create_output(out, classes.shape)[:] = classes
    return {"seconds": time.perf_counter() - began}


def run_map_overlap(scene: Path, out: Path, module: nn.Module, halo: int) -> dict[str, Any]:
    """dask.array.map_overlap with the exact depth, on threads."""
    import dask
    import dask.array as da

    began = time.perf_counter()
    image = da.from_zarr(scene, component="image")

    def run(block: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(np.ascontiguousarray(block))[None])[0].numpy()

    blocks = image.rechunk((image.shape[0], CHUNK, CHUNK))
    padded = da.overlap.overlap(blocks, depth={0: 0, 1: halo, 2: halo}, boundary="none")
    classes = da.overlap.trim_internal(
        padded.map_blocks(run, dtype="u1", chunks=((1,), *padded.chunks[1:])), {0: 0, 1: halo, 2: halo}, boundary="none"
    )[0]
    array = create_output(out, classes.shape)
    with dask.config.set(scheduler="threads", num_workers=1):  # torch has the other cores
        da.store(classes, array, lock=False)
    return {"seconds": time.perf_counter() - began}


Infer = Callable[[np.ndarray], np.ndarray]
"""(bands, height, width) -> (1, height, width) classes."""


def infer_by_torch(module: nn.Module) -> Infer:
    module = module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def infer(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(image)[None].contiguous(memory_format=torch.channels_last))[0].numpy()

    return infer


def infer_by_openvino(module: nn.Module, bands: int, dtype: str) -> Infer:
    """The graph as it is, compiled once for each shape of windows."""
    import outsize

    from ...tiler.engines.openvino import OpenVinoEngine, convert_network

    converted = convert_network(outsize.analyze_network(module, bands=bands, dtype=dtype), cpu_count())
    engines: dict[tuple[int, ...], OpenVinoEngine] = {}

    def infer(image: np.ndarray) -> np.ndarray:
        if image.shape not in engines:
            engines[image.shape] = OpenVinoEngine(converted, rewrite=False)
        return engines[image.shape].run(image)

    return infer


def run_window_loop(scene: Path, out: Path, infer: Infer, halo: int) -> dict[str, Any]:
    """What one writes by hand: windows of a tiled GeoTIFF with the exact halo, by rasterio."""
    import rasterio
    from rasterio.windows import Window

    source = scene.parent / "image.tif"
    began = time.perf_counter()
    with rasterio.open(source) as dataset:
        height, width = dataset.shape
        profile = {**dataset.profile, "count": 1}
        with rasterio.open(out.with_suffix(".tif"), "w", **profile) as result:
            for y in range(0, height, CHUNK):
                for x in range(0, width, CHUNK):
                    top, left = max(0, y - halo), max(0, x - halo)
                    bottom, right = min(height, y + CHUNK + halo), min(width, x + CHUNK + halo)
                    image = dataset.read(window=Window(left, top, right - left, bottom - top))
                    classes = infer(image)[0]
                    core = classes[y - top : y - top + CHUNK, x - left : x - left + CHUNK]
                    result.write(core, 1, window=Window(x, y, core.shape[1], core.shape[0]))
    seconds = time.perf_counter() - began
    with rasterio.open(out.with_suffix(".tif")) as result:
        create_output(out, (height, width))[:] = result.read(1)  # for the comparison
    return {"seconds": seconds}


def main() -> None:
    """Run one contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("scene", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", default="small", choices=["small", "medium", "large"])
    parser.add_argument("--memory", default="2GB")
    for name in ("workers", "threads", "core"):
        parser.add_argument(f"--{name}", type=int, help="of outsize; default: as it plans")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(cpu_count())
    module, halo = make_network(options.network).eval(), HALOS[options.network]
    if options.name.startswith("outsize"):
        found = run_outsize(options.scene, options.out, module, options)
    else:
        with torch.inference_mode():
            if options.name.startswith("bare"):
                rewrite = options.name != "bare"
                found = run_bare(options.scene, options.out, module, rewrite=rewrite)
            elif options.name == "whole":
                found = run_whole(options.scene, options.out, module)
            elif options.name.startswith("monai"):
                found = run_monai(options.scene, options.out, module, float(options.name.split()[1]))
            elif options.name == "map_overlap":
                found = run_map_overlap(options.scene, options.out, module, halo)
            elif options.name == "window loop":
                found = run_window_loop(options.scene, options.out, infer_by_torch(module), halo)
            else:
                image = zarr.open_array(options.scene, path="image", mode="r")
                infer = infer_by_openvino(module, image.shape[0], str(image.dtype))
                found = run_window_loop(options.scene, options.out, infer, halo)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
