"""Model files, the tile network, and the shipped weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from outsize.models.segmentation.files.sources import default_model_path, load_model, save_model
from outsize.models.segmentation.networks.model import SegmentationClass, SegmentationModel, as_tile_network
from outsize.models.segmentation.networks.scaling import Scaling
from outsize.models.segmentation.networks.trust import ModelFileError
from outsize.models.segmentation.networks.unet import UNet
from outsize.models.segmentation.training.metrics import Confusion
from outsize.sample_data.scene import CLASSES, COLOURS
from outsize.sample_data.small import small_scene_path
from outsize.tiler.base.errors import UsageError
from pydantic import ValidationError
from safetensors.torch import load_file
from stac_model.schema import MLModelProperties


def small_model(kind: str = "z-score") -> SegmentationModel:
    return SegmentationModel(
        name="small",
        network=UNet(2, 3, (4, 6), norm="frozen").eval(),
        bands=("red", "nir"),
        scaling=Scaling(kind=kind, subtract=(10.5, 20.25), divide=(3.5, 4.0)),  # pyright: ignore[reportArgumentType]
        fill=(1.0, 2.0),
        classes=tuple(SegmentationClass(name=n, colour=(i, 2, 255)) for i, n in enumerate("abc")),
    )


def test_names_with_dots_stay_apart(tmp_path: Path) -> None:
    first, second = (
        save_model(small_model(), tmp_path / "unet-1.5"),
        save_model(small_model(), tmp_path / "unet-1.6.json"),
    )
    assert first.sha256 != second.sha256
    assert load_model(tmp_path / "unet-1.5").sha256 == first.sha256
    assert load_model(tmp_path / "unet-1.6").sha256 == second.sha256
    assert len(list(tmp_path.iterdir())) == 4


class Killed(BaseException):
    """What no handler of errors sees."""


def test_a_kill_at_any_rename_leaves_the_earlier_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace
    renames, dies_at = 0, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == dies_at:
            raise Killed
        return replace(self, target)

    # Also where no earlier model is; a place beyond the last rename ends the loop.
    for name, has_earlier in (("first", False), ("second", True)):
        path, seen = tmp_path / name / "m.json", set[str]()
        for at in range(1, 9):
            earlier = save_model(small_model(), path).sha256 if has_earlier else ""
            renames, dies_at = 0, at
            monkeypatch.setattr(Path, "replace", dying)
            later = small_model()
            try:
                save_model(later, path)
                done = True
            except Killed:
                done = False
            monkeypatch.undo()
            if not has_earlier and not path.exists():
                continue
            found = load_model(path)
            image = torch.randn(1, 2, 9, 11)
            assert done or has_earlier or not path.with_suffix(".safetensors").exists()
            if found.sha256 == earlier:
                assert not done
                seen.add("earlier")
            else:
                assert torch.equal(found.network(image), later.network(image))
                seen.add("later" if done else "later, not renamed")
            if done:
                break
            # The next one is saved over what the kill left.
            assert load_model(path).sha256 != save_model(small_model(), path).sha256 == load_model(path).sha256
            if not has_earlier:
                for file in path.parent.iterdir():
                    file.unlink()
        assert done
        assert {"later", "later, not renamed"} <= seen
        assert ("earlier" in seen) == has_earlier


def test_weights_are_on_the_disk_before_their_description_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the calls that a power cut could fall between: flushed, then named, then described."""
    calls: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def noted(self: Path, target: Path) -> Path:
        calls.append(f"rename {target.name}")
        return replace(self, target)

    def flushed(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        calls.append(f"flush {name}")
        fsync(handle)

    monkeypatch.setattr(Path, "replace", noted)
    monkeypatch.setattr(os, "fsync", flushed)
    saved = save_model(small_model(), tmp_path / "m.json")
    kept = f".m-{saved.sha256}.safetensors"
    for first, then in (
        ("flush .m.new.safetensors", f"rename {kept}"),
        ("flush .m.new.json", "rename m.json"),
        (f"rename {kept}", "rename m.json"),
        ("rename m.json", "rename m.safetensors"),
    ):
        assert calls.index(first) < calls.index(then), calls
    assert calls[calls.index("rename m.json") - 1] == f"flush {tmp_path.name}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.safetensors"]


@pytest.mark.parametrize("kind", ["z-score", "min-max"])
def test_a_model_survives_its_files(tmp_path: Path, kind: str) -> None:
    model = small_model(kind)
    saved = save_model(model, tmp_path / "m.json", card={"accuracy": 0.5})
    for path in (tmp_path / "m.json", tmp_path / "m.safetensors", tmp_path / "m"):
        loaded = load_model(path)
        assert (loaded.bands, loaded.scaling, loaded.fill, loaded.classes) == (
            model.bands,
            model.scaling,
            model.fill,
            model.classes,
        )
        assert loaded.sha256 == saved.sha256 != ""
        image = torch.randn(1, 2, 9, 11)
        assert torch.equal(loaded.network(image), model.network(image))


def test_the_description_is_a_valid_mlm_item(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "m.json")
    for path in (tmp_path / "m.json", default_model_path()):
        item = json.loads(path.read_text())
        fields = {key.removeprefix("mlm:"): value for key, value in item["properties"].items()}
        known = {key: value for key, value in fields.items() if not key.startswith("outsize:")}
        aliased = {f"mlm:{key}": value for key, value in known.items()}
        MLModelProperties.model_validate(aliased)
        for missing in ("mlm:input", "mlm:output", "mlm:tasks", "mlm:name"):
            with pytest.raises(ValidationError):
                MLModelProperties.model_validate({key: value for key, value in aliased.items() if key != missing})


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model at"):
        load_model(tmp_path / "none.json")
    save_model(small_model(), tmp_path / "m.json")
    item = json.loads((tmp_path / "m.json").read_text())
    weights = (tmp_path / "m.safetensors").read_bytes()
    broken = {
        "not JSON": ("{", weights, "not a model description"),
        "no properties": ("{}", weights, "not a model description"),
        "cut weights": (json.dumps(item), weights[:100], "does not hold the weights"),
        "other widths": (
            json.dumps(item).replace('"widths": [4, 6]', '"widths": [4, 8]'),
            weights,
            "does not hold the weights",
        ),
        "other architecture": (json.dumps(item).replace("UNet", "Transformer"), weights, "architecture must be"),
    }
    for name, (text, data, words) in broken.items():
        (tmp_path / "b.json").write_text(text.replace("m.safetensors", "b.safetensors"))
        (tmp_path / "b.safetensors").write_bytes(data)
        with pytest.raises(ModelFileError, match=words) as refusal:
            load_model(tmp_path / "b.json")
        assert "\n" not in str(refusal.value), name


def test_the_tile_network_takes_raw_pixels_and_finishes_them() -> None:
    model = small_model()
    image = torch.randint(0, 255, (1, 2, 13, 17), dtype=torch.uint8)
    scaled = (image.float() - torch.tensor([10.5, 20.25])[:, None, None]) / torch.tensor([3.5, 4.0])[:, None, None]
    logits = model.network(scaled)
    assert torch.allclose(as_tile_network(model, "logits")(image), logits, atol=1e-5)
    assert torch.equal(as_tile_network(model, "class")(image), logits.argmax(1, keepdim=True).to(torch.uint8))
    probability = as_tile_network(model, "probability")(image)
    assert probability.dtype == torch.uint8
    assert (probability.int() - 254 * logits.softmax(1)).abs().max() <= 0.51
    with pytest.raises(UsageError, match="output must be one of"):
        as_tile_network(model, "vibes")  # pyright: ignore[reportArgumentType]


def test_models_that_contradict_themselves_are_refused() -> None:
    good = {f: getattr(small_model(), f) for f in ("name", "network", "bands", "scaling", "fill", "classes")}
    for change, words in (
        ({"fill": (1.0,)}, "as many fill values, got 1"),
        ({"bands": ("red",)}, "as many scaling constants, got 2"),
        ({"classes": ()}, "1..65535 classes"),
    ):
        with pytest.raises(UsageError, match=words):
            SegmentationModel(**{**good, **change})
    with pytest.raises(UsageError, match="divide by numbers > 0"):
        Scaling(kind="z-score", subtract=(0,), divide=(0,))


def test_the_shipped_weights_are_small_and_know_the_small_scene() -> None:
    weights = default_model_path().with_suffix(".safetensors")
    assert weights.stat().st_size < 3_000_000
    assert all(value.dtype == torch.float32 for value in load_file(weights).values())
    model = load_model()
    assert [(entry.name, entry.colour) for entry in model.classes] == list(zip(CLASSES, COLOURS, strict=True))
    with (
        rasterio.open(small_scene_path()) as scene,
        rasterio.open(small_scene_path().with_name("labels.tif")) as labels,
    ):
        image, truth = scene.read(), labels.read(1)
        assert tuple(scene.descriptions) == model.bands
    with torch.inference_mode():
        found = as_tile_network(model)(torch.from_numpy(image)[None])[0, 0].numpy()
    confusion = Confusion.count(truth, found, 6)
    assert confusion.accuracy > 0.98
    assert confusion.mean_iou > 0.95


def test_the_card_sets_the_network_against_a_forest_of_one_pixel() -> None:
    card = json.loads(default_model_path().read_text())["properties"]["outsize:card"]
    assert card["unet"]["mean_iou"] > card["per_pixel_forest"]["mean_iou"] + 0.2
    assert card["per_pixel_forest"]["iou"]["built-up"] < 0.5


def test_confusion_counts_and_scores() -> None:
    truth = np.array([0, 0, 1, 1, 2, 255, 0], np.uint8)
    found = np.array([0, 1, 1, 1, 0, 0, 255], np.uint8)
    confusion = Confusion.count(truth, found, 4)
    assert confusion.counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.accuracy == pytest.approx(3 / 5)
    assert confusion.iou[:3] == pytest.approx([1 / 3, 2 / 3, 0])
    assert np.isnan(confusion.iou[3])
    assert confusion.mean_iou == pytest.approx(1 / 3)
    assert (confusion + confusion).pixels == 10
    assert np.isnan(Confusion.count(truth[:0], found[:0], 2).accuracy)
