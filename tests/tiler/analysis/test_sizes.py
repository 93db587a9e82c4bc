"""Networks whose output follows the image's size only by multiples: tiles equal the whole padded image, at every
remainder."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client
from outsize.tiler.analysis.graph import trace_size
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.analysis.program import make_program
from outsize.tiler.base.errors import UntileableError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.engines.programs import open_programs
from outsize.tiler.output.store import open_array
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.raster import read_filled
from outsize.tiler.runs.inference import predict_window
from outsize.tiler.runs.run import predict
from torch import Tensor, nn

from ...support.floor_sizes import FLOORED, make_image, pad_image
from ...support.rasters import write_geotiff
from ...support.zoo import alive

pytestmark = pytest.mark.system

CORE = (7, 11)


@cache
def analysed(name: str) -> Network:
    return analyze_network(alive(FLOORED[name][0]()), bands=3)


def remainders(k: int) -> list[tuple[int, int]]:
    """Image sizes of every remainder by k on both axes, prime sizes and those below k among them."""
    return [*((17 + r, 29 + (3 * r + 1) % k) for r in range(k)), (1, 1), (1, k + 1), (k - 1, 2 * k)]


def whole_image(network: Network, image: Tensor) -> Tensor:
    """The module on the whole padded image."""
    with torch.no_grad():
        return network.module(pad_image(image, network.size_multiple))[0]


def expected_shape(network: Network, shape: tuple[int, int]) -> tuple[int, int]:
    """All of the raster, and of a last pixel that lies half on padding the whole of it."""
    height, width = (math.ceil(extent * scale) for extent, scale in zip(shape, network.scale, strict=True))
    return (height, width)


@pytest.mark.parametrize("name", FLOORED)
def test_the_multiple_is_found(name: str) -> None:
    network = analysed(name)
    assert network.size_multiple == FLOORED[name][1]
    for shape in remainders(network.size_multiple):
        assert network.output_shape(shape) == expected_shape(network, shape)


@pytest.mark.parametrize("name", [name for name in FLOORED if name != "stem and aligned corners"])
def test_windows_equal_the_whole_padded_image_at_every_remainder(name: str) -> None:
    network = analysed(name)
    for shape in remainders(network.size_multiple):
        image = make_image(network, shape)
        padded, whole = pad_image(image, network.size_multiple), whole_image(network, image)
        for at in (grid := Grid(shape=network.output_shape(shape), cell=CORE)):
            core = grid.window(*at)
            window = network.input_window(core, shape)
            with torch.no_grad():
                result = network.module(padded[(..., *window.slices())])[0]
            top, left = (int(o * s) for o, s in zip((window.y, window.x), network.scale, strict=True))
            tile = result[:, core.y - top :, core.x - left :][:, : core.height, : core.width]
            expected = whole[(slice(None), *core.slices())]
            assert tile.shape == expected.shape == (network.channels, *core.shape)
            assert (tile - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", FLOORED)
def test_programs_equal_the_whole_padded_image_at_every_remainder(name: str) -> None:
    network = analysed(name)
    for shape in remainders(network.size_multiple):
        image = make_image(network, shape)
        padded, whole = pad_image(image, network.size_multiple), whole_image(network, image)
        for at in (grid := Grid(shape=network.output_shape(shape), cell=CORE)):
            core = grid.window(*at)
            program = make_program(network, shape, core)
            with torch.no_grad():
                tile = program(padded[(..., *program.window.slices())])[0][0]
            expected = whole[(slice(None), *core.slices())]
            assert tile.shape == expected.shape == (network.channels, *core.shape)
            assert (tile - expected).abs().max() < 1e-12


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("name", FLOORED)
def test_engines_give_the_whole_padded_image_of_a_raster(engine: str, name: str, tmp_path: Path) -> None:
    module = alive(FLOORED[name][0]()).float()
    network = analyze_network(module, bands=3)
    shape = (2 * network.size_multiple + 1, 3 * network.size_multiple - 1)
    image = make_image(network, shape).float()
    raster = open_raster(write_geotiff(tmp_path / "image.tif", image[0].numpy()))
    fill = (2.0, 2.0, 2.0)
    with torch.no_grad():
        whole = module(pad_image(image, network.size_multiple, 2.0))[0].numpy()
    height, width = network.output_shape(shape)
    for window in (
        Window(y=0, x=0, height=height, width=width),
        Window(y=height - 3, x=width - 3, height=3, width=3),
        Window(y=0, x=width - 1, height=1, width=1),
    ):
        result = predict_window(raster, network, window, fill=fill, engine=engine)
        expected = whole[(slice(None), *window.slices())]
        assert np.abs(result - expected).max() < 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize(
    "name", ["stem and overlapping transposed convolution", "even kernels and back", "twice the pixels"]
)
def test_programs_of_engines_give_the_whole_padded_image_of_a_raster(engine: str, name: str, tmp_path: Path) -> None:
    module = alive(FLOORED[name][0]()).float()
    network = analyze_network(module, bands=3)
    shape = (41, 38)
    image = make_image(network, shape).float()
    raster = open_raster(write_geotiff(tmp_path / "image.tif", image[0].numpy()))
    plan = plan_tiles(raster, network, engine=engine, method="program", core=32)
    tiles = open_programs(network, engine, 1, shape)
    with torch.no_grad():
        whole = module(pad_image(image, network.size_multiple, 2.0))[0].numpy()
    rows, columns = plan.grid.counts
    reader = raster.open_reader()
    for at in ((rows - 1, columns - 1), (0, columns - 1)):
        tile = plan.tile(*at)
        found = tiles.run_tile(read_filled(reader, raster, tile.window, (2.0, 2.0, 2.0)).image, tile)
        expected = whole[(slice(None), *tile.core.slices())]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-5 * np.abs(whole).max()
    reader.close()


@pytest.mark.parametrize("method", ["window", "program"])
@pytest.mark.parametrize("name", ["stem and bilinear", "twice the pixels", "quarter of the pixels of eight"])
def test_a_run_gives_the_whole_padded_image_of_a_raster(name: str, method: str, tmp_path: Path, client: Client) -> None:
    module = alive(FLOORED[name][0]()).float()
    network = analyze_network(module, bands=3)
    shape, k = (101, 150), network.size_multiple
    image = make_image(network, shape).float()
    source = write_geotiff(tmp_path / "image.tif", image[0].numpy())
    summary = predict(
        source,
        network,
        tmp_path / "o.zarr",
        client=client,
        engine="torch",
        method=method,
        core=64,
        fill=(2.0, 2.0, 2.0),
    )
    assert summary.start_check is not None
    assert summary.start_check.passed
    with torch.no_grad():
        whole = module(pad_image(image, k, 2.0))[0].numpy()
    height, width = network.output_shape(shape)
    found = np.asarray(open_array(tmp_path / "o.zarr", "logits")[:])
    assert found.shape == (network.channels, height, width)
    assert np.abs(found - whole[:, :height, :width]).max() < 1e-5 * np.abs(whole).max()


def test_the_plan_says_to_which_multiples_sizes_are_padded() -> None:
    network = analysed("stem of other sides")
    text = plan_tiles((3, 100, 100), network, core=64).explain()
    assert "sizes padded to multiples of 6 at bottom and right" in text


class Unpadded(nn.Module):
    """What no padding to a multiple makes whole."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 4, 7, 4), nn.ConvTranspose2d(4, 2, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "too few pixels":
            return self.b(self.a(x))
        y = self.b(self.a(nn.functional.pad(x, (3, 3, 3, 3))))
        if self.kind == "a pixel too few":
            return y[..., :-1]
        return nn.functional.interpolate(y, size=((x.shape[-2] - 1) // 4 * 4 + 1, (x.shape[-1] - 1) // 4 * 4 + 1))


@pytest.mark.parametrize("kind", ["too few pixels", "a pixel too few", "one more than a multiple"])
def test_an_output_of_no_constant_scale_is_refused(kind: str) -> None:
    with pytest.raises(UntileableError, match=r"divisible by some k up to 64, but an image of .* gives"):
        analyze_network(alive(Unpadded(kind)), bands=3)


@pytest.mark.parametrize("multiple", [1, 2, 3, 7, 32, 64])
def test_traces_look_at_sizes_that_nothing_else_divides(multiple: int) -> None:
    height, width = trace_size(multiple)
    assert height % multiple == width % multiple == 0
    assert height != width
    assert min(height, width) >= 131
    assert all(height // multiple % factor and width // multiple % factor for factor in range(2, 5))
