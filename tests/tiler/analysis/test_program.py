"""Programs: the whole image's result for every network of the field, from just the pixels that are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client
from outsize.tiler.analysis.axis_geometry import geometry_key
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.analysis.program import Program, make_program
from outsize.tiler.base.errors import ExactnessError, UntileableError, UsageError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.base.tile import Tile
from outsize.tiler.engines.programs import TorchPrograms, open_programs
from outsize.tiler.output.store import open_array
from outsize.tiler.planning.method import choose_method
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.inference import predict_window
from outsize.tiler.runs.run import predict
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.analysed import NETWORKS, analysed
from ...support.architectures import REFUSED
from ...support.rasters import write_geotiff
from ...support.zoo import ZOO, alive

pytestmark = pytest.mark.system


def padded_image(network: Network, shape: tuple[int, int], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn((1, 3, *shape), generator=generator, dtype=torch.float64)
    height, width = network.padded_shape(shape)
    return F.pad(image, (0, width - shape[1], 0, height - shape[0]))


def run(program: Program, image: Tensor) -> Tensor:
    """The program on its window of the (padded) image."""
    with torch.no_grad():
        return program(image[(..., *program.window.slices())])[0][0]


def largest_difference(network: Network, shape: tuple[int, int], cell: tuple[int, int]) -> float:
    """Of all cores of an image, against the module on the whole of it."""
    image = padded_image(network, shape)
    with torch.no_grad():
        whole = network.module(image)[0]
    worst = 0.0
    for at in (grid := Grid(shape=network.output_shape(shape), cell=cell)):
        core = grid.window(*at)
        tile = run(make_program(network, shape, core), image)
        expected = whole[(slice(None), *core.slices())]
        assert tile.shape == expected.shape
        worst = max(worst, float((tile - expected).abs().max()))
    return worst


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tile_equals_the_whole_image(name: str) -> None:
    network = analysed(name)
    assert largest_difference(network, (53, 67), (17, 29)) < 1e-10
    assert largest_difference(network, (97, 41), (96, 40)) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("shape", "core"), [((383, 389), 96), ((384, 385), 131), ((391, 377), 256)])
def test_every_plan_of_a_larger_image_gives_the_whole(name: str, shape: tuple[int, int], core: int) -> None:
    network = analysed(name)
    scale = max(float(s) for s in network.scale)
    assert largest_difference(network, shape, (int(core * scale) + 1, int(core * scale))) < 1e-10


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("plain unet", "padded unet")])
def test_one_pixel_and_other_tiny_images(name: str) -> None:
    network = analysed(name)
    for shape in ((1, 1), (2, 3), (5, 1)):
        if all(extent >= smallest for extent, smallest in zip(shape, network.graph.smallest, strict=True)):
            assert largest_difference(network, shape, (1, 2)) < 1e-10


@pytest.mark.parametrize("name", ["unet depth 2", "deeplab", "unet bilinear corners", "reflect padded", "espcn", "fpn"])
def test_the_outermost_pixels_that_are_read_matter(name: str) -> None:
    """A program with one row or column less would give another result: on every side, for some core."""
    network, shape = analysed(name), (160, 176)
    clean = padded_image(network, shape)
    moved: dict[str, bool] = {}
    for at in (grid := Grid(shape=network.output_shape(shape), cell=(24, 24))):
        program = make_program(network, shape, grid.window(*at))
        window, expected = program.window, run(program, clean)
        for side, inside, place in (
            ("top", window.y > 0, (window.y, slice(None))),
            ("bottom", window.rows.stop < shape[0], (window.rows.stop - 1, slice(None))),
            ("left", window.x > 0, (slice(None), window.x)),
            ("right", window.columns.stop < shape[1], (slice(None), window.columns.stop - 1)),
        ):
            if inside:
                image = clean.clone()
                image[(..., *place)] += 1000
                moved[side] = moved.get(side, False) or not torch.equal(run(program, image), expected)
    assert moved == dict.fromkeys(("top", "bottom", "left", "right"), True)


@pytest.mark.parametrize(
    "name", ["unet depth 3", "deeplab", "unet transposed overlapping", "average pooled", "unet bicubic"]
)
def test_cores_of_one_key_have_one_program(name: str) -> None:
    network, shape = analysed(name), (290, 310)
    image = padded_image(network, shape)
    height, width = network.padded_shape(shape)
    first: dict[tuple[str, str], Program] = {}
    shared = 0
    for at in (grid := Grid(shape=network.output_shape(shape), cell=(32, 32))):
        program = make_program(network, shape, grid.window(*at))
        key = (geometry_key(program.rows), geometry_key(program.columns))
        if key in first:
            shared += 1
            with torch.no_grad():
                other = first[key](image[(..., *program.window.slices())], *program.inputs())[0][0]
            assert (other - run(program, image)).abs().max() < 1e-10
        first.setdefault(key, program)
    # Position-dependent weights have programs of their own everywhere; the others share a few.
    assert shared > len(grid) / 2 or network.window_refusal
    assert (height, width) >= shape


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(name: str) -> None:
    build, words = REFUSED[name]
    with pytest.raises(UntileableError, match=words) as refusal:
        analyze_network(build(), bands=3)
    text = str(refusal.value)
    assert "\n" not in text
    assert "; " in text
    assert "architectures.py:" in text or "at every size" in text


def test_window_runs_are_refused_where_only_programs_are_exact() -> None:
    network = analysed("deeplab")
    assert "upsample_bilinear2d" in network.window_refusal
    with pytest.raises(UntileableError, match="no whole number for every height"):
        network.input_window(Window(y=0, x=0, height=4, width=4), (60, 60))
    assert choose_method(network, None, (60, 60)) == choose_method(network, "program", (60, 60)) == "program"
    with pytest.raises(UntileableError, match="run programs"):
        plan_tiles((3, 60, 60), network, method="window")
    assert choose_method(analysed("unet depth 2"), None, (60, 60)) == "window"
    with pytest.raises(UsageError, match="method must be"):
        choose_method(network, "guess", (60, 60))
    corners = analysed("unet bilinear corners")
    assert "align_corners=True" in corners.window_refusal


class SizeDependent(nn.Module):
    """Crops and pads by amounts that follow the image's size."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.kind == "pad":
            y = F.pad(y, (max(0, 100 - x.shape[3]), 0))[..., : x.shape[3]]
        elif self.kind == "centre":
            # The middle half, enlarged to the whole again.
            top, left = x.shape[2] // 4, x.shape[3] // 4
            y = F.interpolate(y[..., top : top + x.shape[2] // 2, left : left + x.shape[3] // 2], size=x.shape[2:])
        else:
            y = F.interpolate(y[..., 4:, 4:], size=x.shape[2:], mode="bilinear")
        return self.b(y)


@pytest.mark.parametrize("kind", ["pad", "centre", "enlarged"])
def test_positions_that_follow_the_images_size_are_exact(kind: str) -> None:
    network = analyze_network(alive(SizeDependent(kind)), bands=3)
    assert network.window_refusal
    for shape in ((53, 67), (61, 130)):
        assert largest_difference(network, shape, (16, 24)) < 1e-10


class Floored(nn.Module):
    """Outputs rounded down, as pooling without ceil_mode gives them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.kind = nn.Conv2d(3, 4, 3, padding=1), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return F.interpolate(y, scale_factor=1.5) if self.kind == "enlarged" else F.max_pool2d(F.max_pool2d(y, 2), 2)


@pytest.mark.parametrize(("kind", "shape"), [("pooled", (13, 16)), ("enlarged", (79, 100))])
def test_outputs_that_are_rounded_down_are_exact(kind: str, shape: tuple[int, int]) -> None:
    network = analyze_network(alive(Floored(kind)), bands=3)
    assert network.output_shape((53, 67)) == shape
    assert largest_difference(network, (53, 67), (7, 9)) < 1e-10
    if not network.window_refusal:
        image = padded_image(network, (53, 67))
        with torch.no_grad():
            whole = network.module(image)[0]
            for at in (grid := Grid(shape=shape, cell=(5, 6))):
                core = grid.window(*at)
                window = network.input_window(core, (53, 67))
                top, left = (int(v * s) for v, s in zip((window.y, window.x), network.scale, strict=True))
                tile = network.module(image[(..., *window.slices())])[0]
                tile = tile[:, core.y - top : core.y - top + core.height, core.x - left : core.x - left + core.width]
                assert torch.equal(tile, whole[(slice(None), *core.slices())])


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("name", ["deeplab", "unet bilinear corners", "convnext", "reflect padded", "unet transposed"])
def test_engines_run_programs(name: str, engine: str) -> None:
    network = analysed(name, torch.float32)
    shape = (90, 64)
    image = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    with torch.no_grad():
        whole = network.module(torch.from_numpy(image)[None])[0].numpy()
    plan = plan_tiles((3, *shape), network, core=64, method="program")
    tiles = open_programs(network, engine, 2, shape)
    for at in plan.order():
        tile = plan.tile(*at)
        result = tiles.run_tile(np.ascontiguousarray(image[(slice(None), *tile.window.slices())]), tile)
        expected = whole[(slice(None), *tile.core.slices())]
        assert np.abs(result - expected).max() < 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_run_by_programs_is_the_whole_image(tmp_path: Path, client: Client, engine: str) -> None:
    network = analysed("deeplab", torch.float32)
    image = np.random.default_rng(0).normal(100, 60, (3, 101, 150)).astype(np.float32)
    image[:, 20:50, 30:60] = -1
    source = write_geotiff(tmp_path / "s.tif", image, nodata=-1)
    fill = (100.0, 100.0, 100.0)
    filled = np.where((image == -1).all(0), np.float32(100), image)
    with torch.no_grad():
        whole = network.module(torch.from_numpy(filled)[None])[0].numpy()
    summary = predict(source, network, tmp_path / "o.zarr", client=client, engine=engine, core=64, fill=fill)
    assert summary.start_check is not None
    assert summary.start_check.passed
    found = np.asarray(open_array(tmp_path / "o.zarr", "logits")[:])
    missing = np.isnan(found).all(0)
    assert np.array_equal(missing, (image == -1).all(0))
    assert np.abs(found - whole)[:, ~missing].max() < 1e-4 * np.abs(whole).max()
    window = Window(y=40, x=70, height=40, width=33)
    part = predict_window(open_raster(source), network, window, fill=fill, engine=engine)
    assert np.abs(part - found[(slice(None), *window.slices())]).max() < 1e-4 * np.abs(whole).max()
    again = predict(source, network, tmp_path / "o.zarr", client=client, engine=engine, core=64, fill=fill)
    assert again.tiles == 0


def test_a_program_that_misses_a_row_is_found_by_the_start_check(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = analysed("deeplab", torch.float32)
    source = write_geotiff(tmp_path / "s.tif", np.random.default_rng(0).normal(size=(3, 131, 150)).astype(np.float32))
    right = TorchPrograms.run_tile_with_logits

    def short(tiles: TorchPrograms, image: np.ndarray, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        image = image.copy()
        image[:, 0 if tile.window.y > 0 else -1] = 0
        return right(tiles, image, tile)

    monkeypatch.setattr(TorchPrograms, "run_tile_with_logits", short)
    with pytest.raises(ExactnessError):
        predict(source, network, tmp_path / "o.zarr", client=client, engine="torch", core=64)
    assert not (tmp_path / "o.zarr").exists()


@pytest.mark.parametrize("shape", [(1, 8, 2048, 300), (1, 1, 4200, 1030)])
def test_giant_gathers_take_the_right_pixels(shape: tuple[int, ...]) -> None:
    """OpenVINO's own gather along the last axis takes wrong ones from 2^25 elements on, with two threads."""
    import openvino as ov
    from outsize.tiler.analysis.program import _gather
    from outsize.tiler.engines.openvino import compile_options

    class Gather(nn.Module):
        def forward(self, x: Tensor, indices: Tensor) -> Tensor:
            return _gather(x, 3, indices)

    image = torch.arange(shape[2] * shape[3], dtype=torch.float32).reshape(1, 1, *shape[2:]).repeat(1, shape[1], 1, 1)
    indices = torch.from_numpy(np.sort(np.random.default_rng(0).integers(0, shape[3], 4100)))
    model = ov.convert_model(torch.export.export(Gather(), (image, indices)))
    request = ov.Core().compile_model(model, "CPU", compile_options(2)).create_infer_request()
    request.infer([image.numpy(), indices.numpy()])
    result, expected = request.get_output_tensor(0).data, image[:, :1, :, indices].numpy()
    assert all(np.array_equal(result[:, [channel]], expected) for channel in range(shape[1]))
