"""Runs of small networks over small scenes, and what the whole image gives."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client
from outsize.models.segmentation.networks.unet import UNet
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.geometry import Window
from outsize.tiler.output.store import open_array, read_header
from outsize.tiler.planning.check_windows import larger_window
from outsize.tiler.planning.options import PlanOptions
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.check import StartCheck
from outsize.tiler.runs.request import RunRequest, Scope
from outsize.tiler.runs.run import predict, run_raster
from outsize.tiler.runs.summary import RunSummary
from torch import Tensor, nn

from .analysed import analysed
from .rasters import write_geotiff
from .zoo import alive


class Classify(nn.Module):
    """Class numbers of another network, its logits shown."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def logits(self, x: Tensor) -> Tensor:
        return self.network(x / 50)

    def finish(self, logits: Tensor) -> Tensor:
        return logits.argmax(1, keepdim=True).to(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.logits(x))


@cache
def class_network() -> Network:
    network = alive(UNet(3, 4, (6, 8, 10)), seed=3).float()
    return analyze_network(Classify(network).eval(), bands=3, dtype=torch.float32)


def logit_network(name: str) -> Network:
    return analysed(name, torch.float32)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 60, (3, height, width)).astype(np.float32)


def scene(folder: Path, height: int, width: int, *, nodata: bool = False) -> Path:
    image = random_image(height, width)
    if nodata:
        image[:, : height // 3, : width // 3] = -1
        image[0, -1, -1] = -1  # one band only: still valid
        image[:, height // 2, width // 2] = -1
    options = {"nodata": -1, "tiled": True, "blockxsize": 32, "blockysize": 48} if nodata else {}
    return write_geotiff(folder / f"scene-{height}x{width}.tif", image, **options)


def run(source: Path, network: Network, out: Path, client: Client, **options: Any) -> RunSummary:
    settings: dict[str, Any] = {"engine": "torch", "core": 64, "memory": "4GB", **options}
    return predict(source, network, out, client=client, **settings)


def run_again(
    source: Path, network: Network, out: Path, client: Client, redo: Iterable[tuple[int, int]], *, rest: bool = True
) -> RunSummary:
    """The same run once more, some of its tiles done again."""
    request = RunRequest(
        planning=PlanOptions(engine="torch", core=64, memory="4GB"),
        client=client,
        scope=Scope(redo=frozenset(redo), rest=rest),
    )
    return run_raster(source, network, out, request)


def whole(network: Network, source: Path, fill: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    """The module on the whole raster, nodata filled before and masked after: the definition."""
    raster = open_raster(source)
    image = raster.open_reader().read(Window.whole(raster.shape_yx))
    missing = np.zeros(raster.shape_yx, bool)
    if raster.nodata is not None:
        missing = (image == raster.nodata).all(0)
        image = np.where(missing, np.asarray(fill, image.dtype)[:, None, None], image)
    height, width = network.padded_shape(raster.shape_yx)
    padded = np.empty((3, height, width), image.dtype)
    padded[:] = np.asarray(fill)[:, None, None]
    padded[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        result = network.module(torch.from_numpy(padded)[None])[0].numpy()
    output_h, output_w = network.output_shape(raster.shape_yx)
    result = result[:, :output_h, :output_w]
    if missing.any():
        assert network.scale == (1, 1)
        result = np.where(missing, np.asarray(255 if result.dtype == np.uint8 else np.nan, result.dtype), result)
    return result


def stored(out: Path) -> np.ndarray:
    header = read_header(out)
    values = np.asarray(open_array(out, header["kind"])[...])
    return values if values.ndim == 3 else values[None]


def passed_check() -> Any:

    return StartCheck(tiles=0, pixels=0, compared="logits", max_abs=0, largest=1, flipped=0, tolerance=1)


def larger_windows_of(network: Network) -> Any:

    return lambda _, patch, shape, margin: larger_window(network, patch, shape, margin)
