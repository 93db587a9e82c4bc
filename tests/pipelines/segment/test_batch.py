"""Batches: what is an input, what its output is called, and that one bad scene costs no other."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from outsize.pipelines.segment.batch import SceneResult, describe_result
from outsize.pipelines.segment.scenes import find_scenes
from outsize.tests.support.commands import outsize, result_of
from outsize.tiler.base.errors import UsageError
from outsize.tiler.output.records import run_folder
from outsize.tiler.output.store import open_array
from outsize.tiler.runs.summary import RunSummary

from ...support.small_model import save_small_model

pytestmark = pytest.mark.system

NAMES = ("plain", "with space", 'quo\'ted "both"', "ünïcode-图", "-dash", "semi;colon $HOME `x`")
"""Of scenes on a disk; none of them may mean anything to a shell, a glob or an option."""


def write_tiff(path: Path, bands: int = 4, seed: int = 0, size: int = 70) -> Path:
    image = np.random.default_rng(seed).integers(1, 255, (bands, size, size + seed), np.uint8)
    with rasterio.open(
        path, "w", driver="GTiff", width=size + seed, height=size, count=bands, dtype="uint8", crs="EPSG:32618",
        transform=rasterio.Affine(10, 0, 5e5, 0, -10, 4e6),
    ) as file:  # fmt: skip
        file.write(image)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    place.mkdir()
    for seed, name in enumerate(NAMES):
        write_tiff(place / f"{name}.tif", seed=seed)
    (place / "notes.txt").write_text("no raster")
    return place


def test_folders_patterns_paths_and_lists_are_inputs(folder: Path, tmp_path: Path) -> None:
    of_folder = find_scenes([str(folder)])
    assert [scene.name for scene in of_folder] == sorted(NAMES)
    assert find_scenes([str(folder / "*.tif")]) == of_folder
    assert [scene.name for scene in find_scenes([str(folder / "**" / "p*.tif")])] == ["plain"]
    both = find_scenes([str(folder / "semi;colon $HOME `x`.tif"), str(folder / "plain.tif")])
    assert [scene.name for scene in both] == ["semi;colon $HOME `x`", "plain"]
    listed = tmp_path / "list.txt"
    listed.write_text(f"# two\n{folder}/plain.tif\n\n{folder}/-dash.tif\tother name\n")
    assert [scene.name for scene in find_scenes([], [listed])] == ["plain", "other name"]
    (folder / "[odd].tif").write_bytes((folder / "plain.tif").read_bytes())
    assert find_scenes([str(folder / "[odd].tif")])[0].name == "[odd]"
    assert find_scenes(["elsewhere/none.tif"])[0].paths == ("elsewhere/none.tif",)


def test_inputs_that_cannot_be_meant_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "again").mkdir()
    write_tiff(folder / "again" / "plain.tif")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("[1, 2]")
    for sources, words in (
        ([], "needs an input, got none"),
        ([str(tmp_path / "empty")], "holds no raster"),
        ([str(folder / "*.nothing")], "no file fits"),
        ([str(folder / "plain.tif"), str(folder / "again")], r"would both be written to plain\.zarr"),
        ([str(tmp_path / "bad.json")], "neither a STAC item nor an ItemCollection"),
    ):
        with pytest.raises(UsageError, match=words):
            find_scenes(sources)


def stac(assets: dict[str, Any], name: str = "S2_T18") -> dict[str, Any]:
    return {"type": "Feature", "id": name, "assets": assets}


def test_stac_items_give_their_assets(tmp_path: Path) -> None:
    item = stac({"B04": {"href": "B04.tif", "roles": ["data"]}, "thumb": {"href": "t.png", "roles": ["thumbnail"]}})
    other = stac({"B04": {"href": "/far/B04.tif", "roles": ["data"]}, "B08": {"href": "s3://b/B08.tif"}}, "a/b")
    file = tmp_path / "items.json"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": [item, other]}))
    scenes = find_scenes([str(file)])
    assert [(scene.name, scene.paths) for scene in scenes] == [
        ("S2_T18", (str(tmp_path / "B04.tif"),)),
        ("a_b", ("/far/B04.tif",)),
    ]
    file.write_text(json.dumps(other))
    assert find_scenes([str(file)], assets=["B08", "B04"])[0].paths == ("s3://b/B08.tif", "/far/B04.tif")
    with pytest.raises(UsageError, match="item a/b has no asset B02, it has: B04, B08"):
        find_scenes([str(file)], assets=["B02"])
    file.write_text(
        json.dumps(stac({"B04": {"href": "x", "roles": ["data"]}, "B03": {"href": "y", "roles": ["data"]}}))
    )
    with pytest.raises(UsageError, match="has 2 assets of role data; choose with --asset"):
        find_scenes([str(file)])


def test_stac_items_name_the_bands_of_their_assets(tmp_path: Path) -> None:
    older = {
        "href": "a.tif",
        "eo:bands": [{"name": "B04", "common_name": "red"}, {"name": "B08", "common_name": "nir"}],
    }
    newer = {"href": "b.tif", "bands": [{"name": "B02", "eo:common_name": "blue"}]}
    file = tmp_path / "items.json"
    file.write_text(json.dumps(stac({"a": older, "b": newer, "c": {"href": "c.tif"}})))
    assert find_scenes([str(file)], assets=["a", "b"])[0].bands == ("B04 (red)", "B08 (nir)", "B02 (blue)")
    # What one of them leaves open, the files may say.
    assert find_scenes([str(file)], assets=["a", "c"])[0].bands == ()


def test_stac_items_of_any_content_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "items.json"

    def found(known: dict[str, Any], name: str = "x", **how: Any) -> Any:
        file.write_text(json.dumps(stac(known, name)))
        return find_scenes([str(file)], **how)[0]

    plain = {"B04": {"href": "B04.tif", "roles": None}}
    assert found(plain, assets=["B04"]).paths == (str(tmp_path / "B04.tif"),)
    for href, path in (
        ("file:///in/a%20b%23c.tif", "/in/a b#c.tif"),
        ("file://localhost/in/a.tif", "/in/a.tif"),
        ("file:/in/a.tif", "/in/a.tif"),
        ("https://there/a%20b.tif", "https://there/a%20b.tif"),
    ):
        assert found({"B04": {"href": href, "roles": ["data"]}}).paths == (path,)
    data = {"B04": {"href": "B04.tif", "roles": ["data"]}}
    assert found(data, "../\x1b[31mred\n/x").name == "__[31mred__x"
    for assets, words in (
        ({"B04": "B04.tif"}, r"STAC item x: asset 'B04' must be an object with a href, got 'B04.tif'"),
        (plain, "has 0 assets of role data; choose with --asset, once for each band file; it has: B04"),
        ({}, "it has: none"),
    ):
        with pytest.raises(UsageError, match=words):
            found(assets)
    with pytest.raises(UsageError) as refusal:
        found({"B\n04\x1b": {"href": "a"}}, "i\nd\x1b[2J")
    assert str(refusal.value).isprintable()
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(stac(data)).encode())
    assert find_scenes([str(file)])[0].name == "S2_T18"


def test_a_list_may_begin_with_a_mark_and_name_nothing_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbf/in/a.tif\r\n/in/b.tif\tother\r\n")
    assert [(scene.paths, scene.name) for scene in find_scenes([], [file])] == [
        (("/in/a.tif",), "a"),
        (("/in/b.tif",), "other"),
    ]
    for name in ("../../escape", "/tmp/x", "..", "a/b", "a\x1b[2Jb"):
        file.write_text(f"/in/a.tif\t{name}\n")
        with pytest.raises(UsageError, match=r"must be written to a name in --out-dir, got .*without a slash"):
            find_scenes([], [file])


def test_a_terminal_gets_no_sequences_from_names(tmp_path: Path) -> None:
    done = outsize("segment", f"{tmp_path}/\x1b[2Jx.tif", tmp_path / "o.zarr")
    assert done.returncode == 1
    assert r"no such raster: " in done.stderr
    assert r"\x1b[2Jx.tif" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_scenes_line_counts_undeclared_nan() -> None:
    summary = RunSummary(
        out="a.zarr", pixels=2_000_000, startup_s=1, seconds=2, mpx_per_s=1, peak_bytes=1, predicted_peak_bytes=1,
        tiles=4, resumed_tiles=0, failed_tiles=(), start_check=None, read_amplification=None,
        check_read_amplification=0, predicted_read_amplification=1, engine="torch", precision="float32", device="cpu",
        device_peak_bytes=0, predicted_device_peak_bytes=0, undeclared_pixels=1_234,
    )  # fmt: skip
    scene = find_scenes(["elsewhere/a.tif"])[0]
    result = SceneResult(scene=scene, out=Path("a.zarr"), state="done", summary=summary)
    assert describe_result(result).endswith("(1.00 Mpx/s), 1234 pixels of undeclared NaN or infinity")
    quiet = replace(result, summary=replace(summary, undeclared_pixels=0))
    assert describe_result(quiet).endswith("(1.00 Mpx/s)")


def test_a_batch_goes_past_what_fails_and_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.tif").write_bytes((folder / "plain.tif").read_bytes()[:100])
    write_tiff(folder / "three bands.tif", bands=3)
    out, model = tmp_path / "maps", save_small_model(tmp_path / "small.json")
    words = ("--json", "segment", folder, "--out-dir", out, "--model", model, "--no-dashboard")
    dry = outsize(*words, "--dry-run")
    assert dry.returncode == 1
    planned = json.loads(dry.stdout.splitlines()[-1])["scenes"]
    assert sum("error" in scene for scene in planned) == 2
    (plain,) = (scene for scene in planned if scene["name"] == "plain")
    alone = result_of(outsize("--json", "plan", folder / "plain.tif", "--model", model))["plan"]
    grid = [-(-side // core) for side, core in zip(alone["raster_shape"][1:], alone["core"], strict=True)]
    assert plain["tiles"] == grid[0] * grid[1]
    assert (plain["flops"], plain["core"]) == (alone["flops"], list(alone["core"]))
    assert plain["output_bytes"] == 70 * 70
    assert plain["estimated_s"] >= 0
    total = json.loads(dry.stdout.splitlines()[-1])["output_bytes"]
    assert total == sum(70 * (70 + seed) for seed in range(len(NAMES)))
    assert not out.exists()
    done = outsize(*words)
    assert done.returncode == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["scenes"], result["done"], result["partial"], result["failed"]) == (8, 6, 0, 2)
    # What goes into the model is told once, since it is the same for all.
    assert [line.split()[0] for line in done.stderr.splitlines() if line.startswith(("task", "bands", "scaling"))] == [
        "task",
        "bands",
        "scaling",
    ]
    # One display over all.
    shown = [line for line in done.stderr.splitlines() if re.match(r"\w+: \d+ %", line)]
    assert {line.split(":")[0] for line in shown} == {"batch"}
    assert shown[-1].startswith("batch: 100 %")
    failed = {scene["name"]: scene["error"] for scene in result["results"] if scene["state"] == "failed"}
    assert "has 3 bands, model" in failed["three bands"]
    assert "broken.tif" in failed["broken"]
    lines = [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines].count("done") == 6
    for seed, name in enumerate(NAMES):
        assert open_array(out / f"{name}.zarr", "class").shape == (70, 70 + seed)
        assert run_folder(out / f"{name}.zarr").is_dir()
    assert not (out / "broken.zarr").exists()
    assert not run_folder(out / "broken.zarr").exists()
    # Healed, and called again: only what is missing is done.
    (folder / "three bands.tif").unlink()
    (folder / "broken.tif").unlink()
    write_tiff(folder / "broken.tif", seed=9)
    again = result_of(outsize(*words))
    assert (again["done"], again["failed"]) == (7, 0)
    assert [scene["name"] for scene in again["results"] if scene["run"]["tiles"]] == ["broken"]


def test_a_batch_of_band_files_stacks_them(tmp_path: Path) -> None:
    for number in range(4):
        write_tiff(tmp_path / f"B0{number}.tif", bands=1)
    assets = {f"B0{number}": {"href": f"B0{number}.tif", "roles": ["data"]} for number in range(4)}
    (tmp_path / "item.json").write_text(json.dumps(stac(assets)))
    chosen = [word for number in range(4) for word in ("--asset", f"B0{number}")]
    out, model = tmp_path / "maps", save_small_model(tmp_path / "small.json")
    words = ["--out-dir", out, "--model", model, "--no-dashboard"]
    assert result_of(outsize("--json", "segment", tmp_path / "item.json", *chosen, *words))["done"] == 1
    assert open_array(out / "S2_T18.zarr", "class").shape == (70, 70)


def test_wrong_calls_say_what_is_meant(tmp_path: Path) -> None:
    for words, said in (
        (["segment", "a.tif"], "one SRC and its OUT, or inputs and --out-dir DIR; got 1 arguments"),
        (["segment", "a.tif", "b.zarr", "--asset", "x"], "give --out-dir DIR"),
        (["segment", "--out-dir", tmp_path / "o"], "a batch needs an input"),
    ):
        done = outsize(*words)
        assert done.returncode == 2
        assert said in done.stderr
