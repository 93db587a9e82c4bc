"""A network of much weight and little work, and what runs of it take: each measured in a process of its own.

python -m outsize.tests.support.large_weights pack COUNT ...
python -m outsize.tests.support.large_weights run WIDTH SIDE CORE MEMORY FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from outsize.tiler.runs.events import Event, RunPlanned
from torch import Tensor, nn
from torch.nn import functional as F

from .rasters import write_geotiff


class _Block(nn.Module):
    """Two convolutions and a way around them, as ResNet-18 and 34 have."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.around = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.norm(self.a(x)))) + self.around(x))


class _Decoder(nn.Module):
    """Enlarges to the skip's size by nearest pixels, so that only programs are exact."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs + skip, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
        return F.relu(self.b(F.relu(self.a(torch.cat([x, skip], 1)))))


class ResUNet(nn.Module):
    """A U-Net over an encoder of ResNet-34's blocks: 24 million parameters, 98 MB, at a width of 64."""

    def __init__(self, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3), nn.ReLU())
        widths = [width, *(width * 2**level for level in range(4))]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(
                    _Block(
                        widths[level] if first == 0 else widths[level + 1], widths[level + 1], 2 if first == 0 else 1
                    )
                    for first in range(count)
                )
            )
            for level, count in enumerate(blocks)
        )
        inputs, decoders = widths[4], list[nn.Module]()
        for skip, outputs in ((widths[3], 4 * width), (widths[2], 2 * width), (widths[1], width), (width, width // 2)):
            decoders.append(_Decoder(inputs, skip, outputs))
            inputs = outputs
        self.decoders = nn.ModuleList(decoders)
        self.head = nn.Conv2d(inputs, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.stem(x)]
        for level in self.levels:
            kept.append(level(kept[-1]))
        y = kept.pop()
        for decoder in self.decoders:
            y = decoder(y, kept.pop())
        return self.head(F.interpolate(y, size=x.shape[-2:], mode="nearest"))


class Fat(nn.Module):
    """Two convolutions of 40 MB, at half the size, and an enlarging that only programs do exactly."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(F.relu(self.b(F.relu(self.a(F.avg_pool2d(x, 2, ceil_mode=True))))))
        return F.interpolate(y, size=x.shape[-2:], mode="nearest")


def pack(counts: tuple[int, ...]) -> None:
    """Make programs of so many kinds, and print by how many times the weights that grows the process at its peak."""
    from outsize.tiler.analysis.network import analyze_network
    from outsize.tiler.base.geometry import Interval
    from outsize.tiler.engines.programs import pack_programs
    from outsize.tiler.system.machine import release_freed_memory
    from outsize.tiler.system.meter import process_bytes, sample_peak

    torch.manual_seed(0)
    network = analyze_network(Fat().eval(), bands=3, dtype="float32")
    rows = [Interval(start=start, stop=start + 16 + start // 32) for start in range(0, 512, 64)]
    grown: list[float] = []
    for count in (1, *counts):  # once for what is imported and allocated only once
        release_freed_memory()
        before = process_bytes()
        with sample_peak() as peak:
            packed = pack_programs(network, "openvino", 1, (601, 601), rows[:count], rows[1:2])
        grown.append((peak[0] - before) / network.weight_bytes)
        del packed
    print(json.dumps(grown[1:]))


def run(width: int, side: int, core: int, memory: str, folder: Path) -> None:
    """Run a large network over a raster of so many pixels a side, and print what was predicted and measured."""
    from outsize.tiler.analysis.network import analyze_network
    from outsize.tiler.runs.run import predict

    torch.manual_seed(0)
    network = analyze_network(ResUNet(width).eval(), bands=3, dtype="float32")
    image = np.random.default_rng(0).random((3, side, side), np.float32)
    source = write_geotiff(folder / f"{side}.tif", image, tiled=True, blockxsize=256, blockysize=256)
    del image
    programs: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, RunPlanned):
            programs.append(event.plan.geometries)

    summary = predict(
        source,
        network,
        folder / f"{side}.zarr",
        engine="openvino",
        method="program",
        core=core,
        memory=memory,
        listener=listen,
        tile_map=False,
    )
    values = {"programs": programs[0], "weights": network.weight_bytes}
    print(json.dumps({**values, "peak": summary.peak_bytes, "predicted": summary.predicted_peak_bytes}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "pack":
        pack(tuple(map(int, sys.argv[2:])))
    else:
        run(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], Path(sys.argv[6]))
