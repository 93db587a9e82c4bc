"""What must hold after pages were run, beyond that nothing failed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import rasterio
import torch
from outsize.tiler.output.store import open_array, read_header
from safetensors.torch import load_file
from torch import nn

CLOSING = {
    "docs/how-to/training-loop.md": """
assert on_dask.item() < value.item(), "the loop's step made the loss smaller"
alone = outsize.tile_loss(analysed, plan, loss, raster, labels)
assert abs(on_dask.item() - alone.item()) < 1e-5 * alone.item()
gradients = [parameter.grad for parameter in model.parameters()]
assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
cluster.close()
client.close()
""",
    "docs/explanation/face-layer.md": "assert loss.isfinite() and features.grad.abs().sum() > 0",
}
"""Python behind the last block of a page, where its names are known."""


def check_packed_model(folder: Path, printed: str) -> None:
    """Command and Python wrote the same file, and the map is that of the network on the whole image."""
    assert "tinynet:TinyNet(width=16)" in printed
    by_command, by_python = (json.loads((folder / name).read_text()) for name in ("tinynet.json", "again.json"))
    ours, theirs = by_command["properties"], by_python["properties"]
    assert {key: value for key, value in ours.items() if key != "datetime"} == {
        key: value for key, value in theirs.items() if key != "datetime"
    }

    class TinyNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.head = nn.Conv2d(16, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x))

    network = TinyNet().eval()
    network.load_state_dict(load_file(folder / "tinynet.safetensors"))
    with rasterio.open(folder / "scene.tif") as dataset:
        pixels = dataset.read()
    mean, std = (torch.tensor(v)[:, None, None] for v in ([88.7, 103.2, 68.9, 114.7], [45.0, 34.0, 26.0, 44.0]))
    with torch.no_grad():
        expected = network(((torch.from_numpy(pixels) - mean) / std)[None])[0].argmax(0).numpy().astype(np.uint8)
    expected[(pixels == 0).all(0)] = 255
    assert (open_array(folder / "map.zarr", "class")[:] != expected).mean() < 1e-4
    assert len(np.unique(expected)) == 3
    colours = {entry["name"]: entry["colour"] for entry in read_header(folder / "map.zarr")["classes"]}
    assert colours == {"water": [0x26, 0x67, 0xB2], "land": [0x96, 0xC8, 0x5A]}


CHECKS = {"docs/how-to/pack-a-model.md": check_packed_model}
"""Called with the page's folder and with what it printed."""
