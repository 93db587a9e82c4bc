"""int8: one network of fixed ranges for all windows, kept with its output."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from outsize.models import as_tile_network, load_model
from outsize.models.segmentation.networks.unet import UNet
from outsize.sample_data.small import small_scene_path
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import EngineError, OutputError
from outsize.tiler.base.geometry import Interval, Window
from outsize.tiler.engines.engine import Engine
from outsize.tiler.engines.loading import load_windows
from outsize.tiler.engines.quantise import QuantisedNetwork, find_float_operations, quantise_network, require_quantiser
from outsize.tiler.output.records import run_folder
from outsize.tiler.output.store import open_array, read_header
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs import calibration
from outsize.tiler.runs.calibration import read_calibration
from outsize.tiler.runs.events import Calibrating, Event, LossMeasured
from outsize.tiler.runs.reference import Reference
from outsize.tiler.runs.verify import recompute_samples
from torch import nn

from ...support.rasters import write_geotiff
from ...support.runs import Classify, random_image, run, stored
from ...support.zoo import PlainUNet, alive

pytestmark = pytest.mark.system

ov = pytest.importorskip("openvino")
pytest.importorskip("nncf")


@cache
def shipped() -> Network:
    return analyze_network(as_tile_network(load_model()), bands=4, dtype="uint8")


@cache
def small() -> Network:
    return analyze_network(Classify(alive(UNet(3, 4, (6, 8, 10)), seed=3).float()).eval(), bands=3)


@cache
def quantised() -> QuantisedNetwork:
    """The shipped network on some windows of the small scene."""
    raster = open_raster(small_scene_path())
    windows = read_calibration(raster, shipped(), Window.whole(raster.shape_yx), (0, 0, 0, 0)).calibrated
    return quantise_network(shipped(), [sample.image[:, :128] for sample in windows[:4]], threads=2)


IMAGES = [random_image(64, 64, seed) for seed in range(3)]


@cache
def quantised_small() -> QuantisedNetwork:
    return quantise_network(small(), IMAGES, threads=1)


@pytest.fixture
def _made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the small network take one that is there."""
    monkeypatch.setattr("outsize.tiler.runs.conversion.quantise_network", lambda *_: quantised_small())


@pytest.fixture(autouse=True)
def _few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CALIBRATED", 4), ("HELD_OUT", 2), ("SIDE", 64)):
        monkeypatch.setattr(calibration, name, value)


def scene_image(height: int = 401, width: int = 389) -> np.ndarray:
    """An image of two primes, with its edges."""
    raster = open_raster(small_scene_path())
    reader = raster.open_reader()
    try:
        return reader.read(Window(y=0, x=0, height=height, width=width))
    finally:
        reader.close()


def tiles_of(engine: Engine, image: np.ndarray, core: int) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
    """(core, finished, logits) of every tile of the plan."""
    plan = plan_tiles(image.shape, shipped(), engine="openvino", precision="int8", core=core, memory="64GB")
    for at in plan.grid:
        tile = plan.tile(*at)
        window = image[(slice(None), *tile.window.slices())]
        finished, logits = engine.run_with_logits(np.ascontiguousarray(window))
        cut = (slice(None), *tile.crop.slices())
        yield tile.core, finished[cut].copy(), logits[cut].copy()


@pytest.mark.parametrize("core", [pytest.param(64, marks=pytest.mark.long), 256])
def test_tiles_are_bit_equal_to_the_whole_image_under_the_same_network(core: int) -> None:
    image, engine = scene_image(269, 263), load_windows(quantised().pack(shipped(), 2))
    classes, logits = (array.copy() for array in engine.run_with_logits(image))
    for place, finished, shown in tiles_of(engine, image, core):
        cut = (slice(None), *place.slices())
        assert np.array_equal(finished, classes[cut])
        assert np.array_equal(shown, logits[cut])
    # Without the logits another program is compiled, of the same result.
    assert np.array_equal(engine.run(image), classes)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_window_that_is_a_pixel_short_differs(axis: int, missing: int) -> None:
    """Mutation: `missing` pixels fewer than the network needs, at the end of the window. In eight bits the farthest
    pixels do not show everywhere, so there are several cores."""
    image, engine, network = scene_image(), load_windows(quantised().pack(shipped(), 1)), shipped()
    logits, shape = engine.run_with_logits(image)[1].copy(), image.shape[1:]
    same = []
    for y in (100, 144, 176):
        core = Window(y=y, x=96, height=67, width=101)
        window = network.input_window(core, shape)
        needed = network.needed_interval(axis, (core.rows, core.columns)[axis])
        sides = [window.rows, window.columns]
        sides[axis] = Interval(start=sides[axis].start, stop=needed.stop - missing)
        window = Window.from_intervals(*sides)
        shown = engine.run_with_logits(np.ascontiguousarray(image[(slice(None), *window.slices())]))[1]
        inside = Window(y=core.y - window.y, x=core.x - window.x, height=core.height, width=core.width)
        same.append(np.array_equal(shown[(slice(None), *inside.slices())], logits[(slice(None), *core.slices())]))
    assert all(same) is (missing == 0)


def test_few_pixels_are_of_another_class_than_in_float32_and_the_loss_says_how_many() -> None:
    image, engine, network = scene_image(), load_windows(quantised().pack(shipped(), 2)), shipped()
    finished, logits = engine.run_with_logits(image)
    with torch.no_grad():
        expected = network.module.logits(torch.from_numpy(image)[None])[0].numpy()  # pyright: ignore[reportCallIssue]
    assert 0 < np.abs(logits - expected).max() < 0.5 * np.abs(expected).max()
    assert np.abs(logits - expected).mean() < 0.02 * np.abs(expected).max()
    assert (finished[0] != expected.argmax(0)).mean() < 0.05  # ranges of four small windows
    assert np.array_equal(finished[0], logits.argmax(0))


def test_zero_is_one_of_the_values_of_every_range_and_the_ends_stay_in_float32() -> None:
    network = quantised()
    from outsize.tiler.engines.openvino import read_model

    model = read_model(network.graph, network.weights)
    ranges = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    assert len(ranges) >= 15
    for node in ranges:
        low, high = (float(node.input_value(i).get_node().data.ravel()[0]) for i in (1, 2))
        level = -low / (high - low) * (node.get_attributes()["levels"] - 1)
        assert abs(level - round(level)) < 1e-3
    first = ranges[0].input_value(0).get_node().get_type_name()
    assert first not in ("Parameter", "Convert")  # scaling comes first, in float32
    logits = model.get_results()[1].input_value(0).get_node()
    assert {reader.get_node().get_type_name() for reader in logits.output(0).get_target_inputs()} == {"Result", "TopK"}
    weights = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    # All but the network's biases and scales are bytes.
    assert sum(w.get_element_type() == ov.Type.i8 for w in weights) >= 15


class Raw(nn.Module):
    """Without logits: a network whose output goes on after its last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network((x.float() - 100) / 40).softmax(1) * 3


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_networks_without_logits_and_other_pixels_are_taken(dtype: str) -> None:
    network = analyze_network(alive(Raw()).float(), bands=3, dtype=dtype)
    image = np.random.default_rng(0).integers(0, 250, (3, 61, 53)).astype(dtype)
    engine = load_windows(quantise_network(network, [image], threads=1).pack(network, 1))
    with torch.no_grad():
        expected = network.module(torch.from_numpy(image)[None])[0].numpy()
    assert 0 < np.abs(engine.run(image) - expected).max() < 0.2


def test_what_stays_in_float32_is_told_by_where_it_lies() -> None:
    network = analyze_network(alive(Raw()).float(), bands=3, dtype="float32")
    from outsize.tiler.engines.openvino import convert_network, read_model

    payload = convert_network(network, 1).payload
    model = read_model(payload[0], payload[1])
    kinds = {node.get_friendly_name(): node.get_type_name() for node in model.get_ordered_ops()}
    names = find_float_operations(model, has_logits=False)
    assert names is not None
    kept = [kinds[name] for name in names]
    assert {"Subtract", "Divide", "Softmax"} <= {*kept, *(["Subtract"] if "Add" in kept else [])}
    assert "Convolution" not in kept
    relus = [name for name, kind in kinds.items() if kind == "Relu"]
    assert sum(name in names for name in relus) == 1  # the last one


def test_what_has_nothing_to_quantise_is_refused() -> None:
    network = analyze_network(nn.AvgPool2d(3, 1, 1).eval(), bands=3)
    with pytest.raises(EngineError, match=r"NNCF cannot quantise this network: .*no convolution.*--precision float32"):
        quantise_network(network, [random_image(40, 40)], threads=1)


def test_where_nncf_is_not_installed_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_quantiser()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(EngineError, match=r"pip install 'outsize\[int8\]', or use --precision float32"):
        require_quantiser()


def int8(source: Path, out: Path, client: Client, **options: Any) -> Any:
    return run(source, small(), out, client, engine="openvino", precision="int8", **options)


@pytest.mark.long
def test_a_run_is_continued_with_the_network_that_it_was_begun_with(tmp_path: Path, client: Client) -> None:
    source, out = write_geotiff(tmp_path / "s.tif", random_image(197, 263)), tmp_path / "o.zarr"
    events: list[Event] = []
    summary = int8(source, out, client, listener=events.append)
    loss = summary.loss
    assert [type(event) for event in events if isinstance(event, (Calibrating, LossMeasured))] == [
        Calibrating,
        LossMeasured,
    ]
    assert loss is not None
    assert loss.held_out == 2
    assert loss.max_abs > 0
    assert summary.to_json()["precision_loss"]["flipped_share"] == loss.flipped_share
    check, header = summary.start_check, read_header(out)
    assert (check.max_abs, check.by) == (0, "openvino in int8")
    assert header["precision_loss"] == loss.to_json()
    before = stored(out)
    # The output is the whole image's under the network in the run's folder.
    network = QuantisedNetwork.read(run_folder(out), header["fingerprint"]["quantised"])
    reader = open_raster(source).open_reader()
    whole = load_windows(network.pack(small(), 1)).run(reader.read(Window.whole((197, 263))))
    assert np.array_equal(before, whole)
    # Damaged tiles are made again by that network: no calibration, the same pixels.
    shutil.rmtree(out / "class/c/1")
    events.clear()
    again = int8(source, out, client, listener=events.append)
    assert (again.tiles, again.loss) == (5, loss)
    assert not any(isinstance(event, Calibrating) for event in events)
    assert np.array_equal(stored(out), before)
    # Verification recomputes by that network too, and finds what is wrong.
    plan = plan_tiles(open_raster(source), small(), engine="openvino", precision="int8", core=64)
    reference = Reference(
        raster=open_raster(source),
        plan=plan,
        network=small(),
        fill=(0, 0, 0),
        engine=load_windows(network.pack(small(), 1)),
    )
    found = recompute_samples(out, reference, 50, frozenset(), "class")
    assert (found.wrong, found.ties, found.by) == ((), 0, "openvino in int8")
    array = open_array(out, "class", "r+")
    array[...] = np.asarray((stored(out)[0] + 1) % 4)
    assert recompute_samples(out, reference, 50, frozenset(), "class").wrong


@pytest.mark.long
@pytest.mark.usefixtures("_made_before")
def test_another_precision_or_a_lost_network_is_no_continuation(tmp_path: Path, client: Client) -> None:
    source, out = write_geotiff(tmp_path / "s.tif", random_image(130, 97)), tmp_path / "o.zarr"
    int8(source, out, client)
    with pytest.raises(OutputError, match="another run: precision int8 there, float32 now; --overwrite"):
        run(source, small(), out, client, engine="openvino", method="window")
    chunk = out / "class/c/1/1"
    chunk.unlink()
    (weights,) = run_folder(out).glob("int8-*.bin")
    value = weights.read_bytes()
    weights.write_bytes(value[:-1] + bytes([value[-1] ^ 1]))
    with pytest.raises(OutputError, match="is damaged; segment --overwrite"):
        int8(source, out, client)
    weights.unlink()
    with pytest.raises(OutputError, match="must be there, the network in int8 that this output was begun with"):
        int8(source, out, client)
    weights.write_bytes(value)
    assert int8(source, out, client).tiles == 1


def test_a_folder_holds_one_network(tmp_path: Path) -> None:
    first, second = (QuantisedNetwork(graph=value, weights=b"w") for value in (b"a", b"b"))
    (tmp_path / "records-1.jsonl").write_text("")
    for network in (first, first, second):
        network.write(tmp_path)
        assert QuantisedNetwork.read(tmp_path, network.digest) == network
    assert sorted(place.suffix for place in tmp_path.iterdir()) == [".bin", ".jsonl", ".xml"]
    with pytest.raises(OutputError, match="must be there"):
        QuantisedNetwork.read(tmp_path, first.digest)


def test_networks_that_take_some_sizes_only_and_rasters_of_one_window_run(tmp_path: Path, client: Client) -> None:
    network = analyze_network(alive(PlainUNet()).float(), bands=3)
    source, out = write_geotiff(tmp_path / "s.tif", random_image(83, 67)), tmp_path / "o.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = run(source, network, out, client, engine="openvino", precision="int8", core=64)
    assert summary.start_check.max_abs == 0
    assert summary.loss.compared == "output"
    assert stored(out).shape[1:] == (83, 67)


@pytest.mark.usefixtures("_made_before")
def test_a_halo_that_is_too_small_stops_a_run_in_int8_too(tmp_path: Path, client: Client) -> None:
    from outsize.tiler.base.errors import ExactnessError

    from ...support.runs import larger_windows_of

    network = small()
    narrow = dataclasses.replace(network, axes=tuple(_cut(axis) for axis in network.axes))
    source, out = write_geotiff(tmp_path / "s.tif", random_image(300, 300)), tmp_path / "o.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outsize.tiler.runs.reference.larger_window", larger_windows_of(network))
        with pytest.raises(ExactnessError, match="start check must agree"):
            run(source, narrow, out, client, engine="openvino", precision="int8")
    assert not out.exists()
    assert not run_folder(out).exists()


def _cut(graph: Any) -> Any:
    """One pixel fewer on each side of every convolution of three."""
    from outsize.tiler.analysis.receptive import AxisGraph, Slide

    nodes = list(graph.nodes)
    for index, node in enumerate(nodes):
        ((source, rule), *rest) = node.sources or ((0, None),)
        if isinstance(rule, Slide) and rule.extent == 3:
            one = Slide(extent=1, stride=rule.stride, padding=0)
            nodes[index] = dataclasses.replace(node, sources=((source, one), *rest))
    return AxisGraph(nodes=tuple(nodes))
