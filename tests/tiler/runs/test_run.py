"""Runs: the whole image's result, nodata, resuming, failures, refusals. Workers are threads of this process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from outsize.models.segmentation.networks.unet import UNet
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.analysis.receptive import AxisGraph, Slide
from outsize.tiler.base.errors import BudgetError, ExactnessError, OutputError, RasterError, TilerError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.cluster.client import ClusterOptions
from outsize.tiler.engines.openvino import OpenVinoEngine
from outsize.tiler.output.records import RunFolder
from outsize.tiler.output.store import open_array, read_header
from outsize.tiler.rasters.gdal_files import GdalReader
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs import worker
from outsize.tiler.runs.events import ClusterReady, Event, RunPlanned, StartChecked, TileFinished
from outsize.tiler.runs.inference import lazy_predict, predict_window
from outsize.tiler.runs.run import predict
from torch import Tensor, nn

from ...support.rasters import write_geotiff
from ...support.runs import (
    Classify,
    class_network,
    larger_windows_of,
    logit_network,
    passed_check,
    random_image,
    run,
    scene,
    stored,
    whole,
)
from ...support.zoo import alive

pytestmark = pytest.mark.system


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 130), (97, 131), (129, 65)])
def test_a_run_equals_the_whole_image(tmp_path: Path, client: Client, height: int, width: int) -> None:
    source = scene(tmp_path, height, width)
    summary = run(source, class_network(), tmp_path / "o.zarr", client)
    assert np.array_equal(stored(tmp_path / "o.zarr"), whole(class_network(), source))
    assert summary.pixels == height * width
    assert summary.start_check is not None
    assert summary.start_check.flipped == 0
    assert summary.start_check.compared == "logits"
    assert (np.asarray(open_array(tmp_path / "o.zarr", "status")[...]) == 1).all()


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("name", ["plain unet", "padded unet", "strided", "enlarged nearest", "cropped"])
def test_networks_of_any_scale_and_size_rule_run_on_both_engines(
    tmp_path: Path, client: Client, name: str, engine: str
) -> None:
    source = scene(tmp_path, 117, 150)
    run(source, logit_network(name), tmp_path / "o.zarr", client, engine=engine)
    expected = whole(logit_network(name), source)
    assert np.allclose(stored(tmp_path / "o.zarr"), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_nodata_in_is_nodata_out_and_fill_is_what_neighbours_see(tmp_path: Path, client: Client) -> None:
    source = scene(tmp_path, 150, 141, nodata=True)
    network = logit_network("unet depth 1")
    run(source, network, tmp_path / "o.zarr", client, fill=(90, 100, 110))
    result, expected = stored(tmp_path / "o.zarr"), whole(network, source, (90, 100, 110))
    assert np.isnan(result[:, :50, :47]).all()
    assert np.isfinite(result[:, -1, -1]).all()
    assert np.allclose(result, expected, rtol=1e-4, atol=1e-3, equal_nan=True)
    other = whole(network, source, (0, 0, 0))
    assert not np.allclose(expected, other, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_a_scaled_output_is_nodata_where_all_pixels_under_it_are(tmp_path: Path, client: Client) -> None:
    image = random_image(60, 60)
    image[:, :30, :20] = -1
    source = write_geotiff(tmp_path / "s.tif", image, nodata=-1)
    run(source, logit_network("strided"), tmp_path / "o.zarr", client)
    missing = np.isnan(stored(tmp_path / "o.zarr")[0])
    assert missing[:10, :6].all()  # columns 18..20 hold valid pixels too
    assert missing.sum() == 60


def test_two_plans_give_the_same_output(tmp_path: Path, client: Client) -> None:
    source = scene(tmp_path, 200, 170, nodata=True)
    for core in (64, 128, 512):
        run(source, class_network(), tmp_path / f"{core}.zarr", client, core=core)
    assert np.array_equal(stored(tmp_path / "64.zarr"), stored(tmp_path / "128.zarr"))
    assert np.array_equal(stored(tmp_path / "64.zarr"), stored(tmp_path / "512.zarr"))


def test_workers_may_be_threads_of_the_calling_process(tmp_path: Path) -> None:
    network, source = class_network(), scene(tmp_path, 150, 170)
    options = ClusterOptions(processes=False, dashboard_address=None)
    predict(source, network, tmp_path / "out.zarr", cluster=options, engine="torch", core=64, memory="4GB")
    assert np.array_equal(open_array(tmp_path / "out.zarr", "class", "r")[:], whole(network, source)[0])


def test_windows_and_lazy_arrays_equal_the_run(tmp_path: Path, client: Client) -> None:
    source = scene(tmp_path, 150, 141, nodata=True)
    run(source, class_network(), tmp_path / "o.zarr", client)
    expected = stored(tmp_path / "o.zarr")
    raster = open_raster(source)
    for window in (Window(y=0, x=0, height=1, width=1), Window(y=37, x=51, height=64, width=83)):
        got = predict_window(raster, class_network(), window, engine="torch")
        assert np.array_equal(got, expected[(slice(None), *window.slices())])
    lazy = lazy_predict(raster, class_network(), chunk=50, engine="torch")
    assert lazy.shape == expected.shape
    assert np.array_equal(lazy[:, 20:120, 33:77].compute(scheduler="synchronous"), expected[:, 20:120, 33:77])
    with pytest.raises(UsageError, match="inside the output"):
        predict_window(raster, class_network(), Window(y=149, x=0, height=2, width=2))


def test_events_tell_the_run(tmp_path: Path, client: Client) -> None:
    events: list[Event] = []
    run(scene(tmp_path, 100, 100), class_network(), tmp_path / "o.zarr", client, listener=events.append)
    kinds = [type(event) for event in events]
    assert kinds == [RunPlanned, ClusterReady, StartChecked, *[TileFinished] * 4]
    last = events[-1]
    assert isinstance(last, TileFinished)
    assert (last.finished, last.total, last.pixels) == (4, 4, 10_000)


def test_the_same_call_finishes_what_is_missing(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    expected = stored(out)
    again = run(source, class_network(), out, client)
    assert (again.tiles, again.resumed_tiles) == (0, 16)
    # A lost chunk, a lost record, and a record cut short by a crash.
    (out / "class/c/1/2").unlink()
    records = tmp_path / "o.zarr.run/records-1.jsonl"
    lines = [line for line in records.read_text().splitlines() if '"row": 3, "column": 3' not in line]
    records.write_text("\n".join(lines) + '\n{"row": 0, "col')
    resumed = run(source, class_network(), out, client)
    assert (resumed.tiles, resumed.resumed_tiles) == (2, 14)
    assert np.array_equal(stored(out), expected)
    assert run(source, class_network(), out, client).tiles == 0


def test_an_interrupted_run_is_continued(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"

    def interrupt(event: Event) -> None:
        if isinstance(event, TileFinished) and event.finished == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, class_network(), out, client, listener=interrupt)
    summary = run(source, class_network(), out, client)
    assert summary.resumed_tiles >= 3
    assert summary.tiles + summary.resumed_tiles == 16
    assert np.array_equal(stored(out), whole(class_network(), source))


def test_another_network_or_input_is_not_mixed_into_an_output(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    before = stored(out)
    other = analyze_network(Classify(alive(UNet(3, 4, (6, 8, 10)), seed=4).float()).eval(), 3, torch.float32)
    with pytest.raises(OutputError, match="made by another run: network"):
        run(source, other, out, client)
    with pytest.raises(OutputError, match=r"made by another run: .*input"):
        run(scene(tmp_path, 70, 71), class_network(), out, client)
    with pytest.raises(OutputError, match="exists; choose another path, or --overwrite"):
        run(source, class_network(), out, client, resume=False)
    assert np.array_equal(stored(out), before)
    run(source, other, out, client, overwrite=True)
    assert np.array_equal(stored(out), whole(other, source))


def test_foreign_folders_are_neither_continued_nor_overwritten(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not an output of outsize"):
            run(source, class_network(), out, client, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(OutputError, match="lie in one another"):
        run(source, class_network(), source, client)


def test_tiles_of_the_start_check_are_not_computed_again(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile once, all by one compiled form of the network; and the same result where none is kept."""
    source, infer, asked = scene(tmp_path, 120, 130), OpenVinoEngine._infer, list[int]()

    def count(engine: OpenVinoEngine, image: np.ndarray, outputs: int) -> list[np.ndarray]:
        asked.append(outputs)
        return infer(engine, image, outputs)

    monkeypatch.setattr(OpenVinoEngine, "_infer", count)
    run(source, class_network(), tmp_path / "o.zarr", client, engine="openvino", method="window")
    assert asked == [2] * 6
    monkeypatch.setattr(worker, "KEPT_BYTES", 0)
    run(source, class_network(), tmp_path / "again.zarr", client, engine="openvino", method="window")
    assert asked == [2] * (6 + 6 + 3)
    assert np.array_equal(stored(tmp_path / "o.zarr"), stored(tmp_path / "again.zarr"))


def test_a_second_run_on_the_same_output_is_kept_off(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    with RunFolder(out), pytest.raises(OutputError, match="being written by another run"):
        run(source, class_network(), out, client)


def test_a_plan_that_needs_more_than_the_new_budget_is_not_continued(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    run(source, class_network(), out, client, core=None)
    with pytest.raises(BudgetError, match="memory must be at least"):
        run(source, class_network(), out, client, core=None, memory="400MB")


def test_a_bad_tile_is_recorded_becomes_nodata_and_is_tried_again_when_asked(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    readable = GdalReader.read

    def unreadable(self: GdalReader, window: Window) -> np.ndarray:
        if window.y > 100 and window.x > 100:
            raise RasterError(f"window {window} cannot be read: bad sector")
        return readable(self, window)

    monkeypatch.setattr("outsize.tiler.runs.execution.run_start_check", lambda *_: passed_check())
    monkeypatch.setattr(GdalReader, "read", unreadable)
    summary = run(source, class_network(), out, client)
    monkeypatch.undo()
    failed = {(row, column) for row, column, _ in summary.failed_tiles}
    assert failed == {(2, 2), (2, 3), (3, 2), (3, 3)}
    assert all("bad sector" in reason for *_, reason in summary.failed_tiles)
    result, expected = stored(out), whole(class_network(), source)
    assert (result[:, 128:, 128:] == 255).all()
    assert np.array_equal(result[:, :128], expected[:, :128])
    status = np.asarray(open_array(out, "status")[...])
    assert {tuple(map(int, at)) for at in np.argwhere(status == 2)} == failed
    same = run(source, class_network(), out, client)
    assert (same.tiles, same.resumed_tiles, same.failed_tiles) == (0, 16, summary.failed_tiles)
    again = run(source, class_network(), out, client, retry_failed=True)
    assert (again.tiles, again.failed_tiles) == (4, ())
    assert np.array_equal(stored(out), expected)


def test_the_start_check_stops_a_run_whose_halo_is_too_small(tmp_path: Path, client: Client) -> None:
    """Mutation: one convolution's reach is cut by a pixel on each side, as a wrong rule would."""
    network = class_network()

    def cut(graph: AxisGraph) -> AxisGraph:
        nodes = list(graph.nodes)
        for index, node in enumerate(nodes):
            ((source, rule), *rest) = node.sources or ((0, None),)
            if isinstance(rule, Slide) and rule.extent == 3:
                narrow = Slide(extent=1, stride=rule.stride, padding=0)
                nodes[index] = dataclasses.replace(node, sources=((source, narrow), *rest))
        return AxisGraph(nodes=tuple(nodes))

    wrong = dataclasses.replace(network, axes=(cut(network.axes[0]), cut(network.axes[1])))
    honest = larger_windows_of(network)
    source, out = scene(tmp_path, 300, 300), tmp_path / "o.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outsize.tiler.runs.reference.larger_window", honest)
        with pytest.raises(ExactnessError, match="start check must agree"):
            run(source, wrong, out, client)
    assert not out.exists()
    # Nor does a run that cannot start take an earlier result with it.
    run(source, network, out, client)
    before = stored(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outsize.tiler.runs.reference.larger_window", honest)
        with pytest.raises(ExactnessError):
            run(source, wrong, out, client, overwrite=True)
    assert np.array_equal(stored(out), before)
    assert run(source, network, out, client).tiles == 0


def test_the_stored_header_says_what_was_done(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    run(source, class_network(), out, client)
    header = read_header(out)
    assert header["format"] == 1
    assert header["start_check"]["flipped"] == 0
    assert header["plan"]["halo"]["top"] == class_network().halo.top
    assert {"torch", "zarr", "rasterio", "dask"} <= set(header["versions"])
    assert header["run"]["failed_tiles"] == 0
    records = (tmp_path / "o.zarr.run/records-1.jsonl").read_text().splitlines()
    assert {json.loads(line)["state"] for line in records} == {"done"}


def test_wrong_arguments_are_refused(tmp_path: Path, client: Client) -> None:
    source = scene(tmp_path, 70, 70)
    with pytest.raises(UsageError, match="fill must have one value a band"):
        run(source, class_network(), tmp_path / "o.zarr", client, fill=(0,))
    with pytest.raises(RasterError, match="no such raster"):
        run(tmp_path / "none.tif", class_network(), tmp_path / "o.zarr", client)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

    with pytest.raises(
        UsageError, match=r"class numbers in one channel, .* in 3 channels; end it with \.to\(torch\.uint8\)"
    ):
        run(source, analyze_network(Whole(), bands=3), tmp_path / "o.zarr", client)
    assert not (tmp_path / "o.zarr").exists()
    assert issubclass(UsageError, TilerError)


def test_an_output_is_never_its_own_source(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 70, 70), tmp_path / "o.zarr"
    run(source, logit_network("convolution"), out, client)
    before = stored(out)
    network = analyze_network(nn.Conv2d(2, 2, 1).eval(), bands=2)
    with pytest.raises(OutputError, match="lie in one another"):
        run(out / "logits", network, out, client, overwrite=True)
    assert np.array_equal(stored(out), before)
    (tmp_path / "link.zarr").symlink_to(out)
    with pytest.raises(OutputError, match="is a link"):
        run(source, logit_network("convolution"), tmp_path / "link.zarr", client, overwrite=True)


def test_an_overwriting_run_that_was_interrupted_goes_on(tmp_path: Path, client: Client) -> None:
    source, out = scene(tmp_path, 200, 200), tmp_path / "o.zarr"
    run(source, logit_network("strided"), out, client)
    seen = 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TileFinished)
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, logit_network("convolution"), out, client, overwrite=True, listener=interrupt)
    assert run(source, logit_network("convolution"), out, client, overwrite=True).resumed_tiles >= 4
    # A finished one is replaced.
    assert run(source, logit_network("convolution"), out, client, overwrite=True).resumed_tiles == 0
    with pytest.raises(OutputError, match="begun with cores of 64, got 128"):
        run(source, logit_network("convolution"), out, client, core=128)


def test_unreadable_corners_do_not_stop_the_start_check(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scene(tmp_path, 400, 400)
    right = GdalReader.read

    def read(reader: GdalReader, window: Window) -> np.ndarray:
        if window.y < 100 or window.rows.stop > 390:
            raise RasterError("cannot be read")
        return right(reader, window)

    opened, closed = list[GdalReader](), list[GdalReader]()
    begin, end = GdalReader.__init__, GdalReader.close

    def init(reader: GdalReader, *arguments: Any, **options: Any) -> None:
        begin(reader, *arguments, **options)
        opened.append(reader)

    def close(reader: GdalReader) -> None:
        end(reader)
        closed.append(reader)

    monkeypatch.setattr(GdalReader, "__init__", init)
    monkeypatch.setattr(GdalReader, "close", close)
    monkeypatch.setattr(GdalReader, "read", read)
    summary = run(source, logit_network("convolution"), tmp_path / "o.zarr", client)
    assert opened
    assert set(map(id, opened)) == set(map(id, closed))
    assert summary.start_check is not None
    assert summary.start_check.passed
    assert summary.start_check.pixels > 0
    assert 0 < len(summary.failed_tiles) < 49


def test_options_that_a_begun_output_does_not_take_are_told(tmp_path: Path, client: Client) -> None:
    source, out, told = scene(tmp_path, 70, 70), tmp_path / "o.zarr", list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, RunPlanned):
            told.append(event.ignored)

    for options in ({"workers": 1, "threads": 1}, {"workers": 1, "threads": 1}, {"workers": 3}, {"threads": 2}, {}):
        run(source, class_network(), out, client, listener=listen, **options)
    begun = "the output keeps the plan that it was begun with: "
    assert told == ["", "", f"{begun}workers 1, not 3", f"{begun}threads 1, not 2", ""]
