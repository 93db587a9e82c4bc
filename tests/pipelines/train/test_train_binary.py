"""Training one channel of yes and no, and labels of more classes than bytes hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from outsize.models import as_tile_network, load_model
from outsize.models.segmentation.training.losses import CrossEntropy, OneAgainstAll
from outsize.tests.support.commands import outsize_here, result_of
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.labels.labels import UNLABELLED, LabelOptions, open_labels
from outsize.tiler.rasters.opening import open_raster
from torch.nn import functional as F

from ...support.rasters import write_geotiff
from ...support.train_commands import done, refusal

pytestmark = pytest.mark.system

SHAPE = (128, 160)
TINY = ("--widths", "6", "--core", "96", "--step", "tiles:1", "--warm-up", "1", "--memory", "6GB", "--threads", "1",
        "--validation", "0.3", "--block", "16", "--lr", "0.02", "--ema", "0", "--augment", "none")  # fmt: skip


def make_scene(folder: Path) -> tuple[Path, Path, np.ndarray]:
    """An image whose brightness says yes or no, and labels of it with a gap."""
    rng = np.random.default_rng(1)
    truth = np.kron(rng.integers(0, 2, (SHAPE[0] // 8, SHAPE[1] // 8)), np.ones((8, 8), int)).astype(np.uint8)
    image = (60 + 100 * truth + rng.normal(0, 10, SHAPE)).clip(0, 255).astype(np.uint8)
    labels = truth.copy()
    labels[:9, :9] = 255
    return (
        write_geotiff(folder / "s.tif", image[None]),
        write_geotiff(folder / "l.tif", labels[None]),
        truth,
    )


def test_one_against_none_is_torchs_binary_cross_entropy_of_one_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (1, 13, 11), generator=generator)
    labels[0, :3] = UNLABELLED
    logits = torch.randn((1, 13, 11), generator=generator, dtype=torch.float64)
    known = labels[0] != UNLABELLED
    expected = F.binary_cross_entropy_with_logits(logits[0][known], labels[0][known].double())
    loss = OneAgainstAll(ignore_index=UNLABELLED)
    counted = loss.select(labels, torch.ones_like(known))
    assert torch.allclose(loss.value(loss.sums(logits, labels, counted)), expected, rtol=1e-12)
    with pytest.raises(UsageError, match="a channel for each class"):
        CrossEntropy().sums(logits, labels, counted)


def test_one_channel_is_trained_validated_and_saved_as_yes_and_no(tmp_path: Path) -> None:
    scene, labels, truth = make_scene(tmp_path)
    out = tmp_path / "out"
    words = ["train", scene, "--labels", labels, "--classes", "land,water", "--val-every", "15", *TINY]
    found = done(*words, "--out", out, "--task", "binary", "--steps", "30")
    assert found["best"]["accuracy"] > 0.95
    model = load_model(out / "best.json")
    assert (model.task, model.activation, model.threshold) == ("binary", "none", 0.5)
    assert [entry.name for entry in model.classes] == ["land", "water"]
    image = open_raster(scene).open_reader()
    pixels = torch.from_numpy(image.read(Window(y=0, x=0, height=SHAPE[0], width=SHAPE[1])))[None]
    mapped = as_tile_network(model)(pixels)[0, 0].numpy()
    assert (mapped == truth).mean() > 0.95
    # A training that starts from it is of one channel too, and says so of a loss that needs more.
    onwards = ["train", scene, "--labels", labels, "--model", out / "best.json", "--steps", "2", *TINY]
    done(*onwards, "--out", tmp_path / "on")
    assert load_model(tmp_path / "on" / "best.json").task == "binary"
    assert "needs a channel for each class" in refusal(*onwards, "--out", tmp_path / "x", "--loss", "cross-entropy")
    assert "--task is for a new U-Net" in refusal(*onwards, "--out", tmp_path / "x", "--task", "binary")
    three = [*words[:4], "--classes", "a,b,c", *words[6:], "--out", tmp_path / "y", "--task", "binary", "--steps", "1"]
    assert "task binary has two classes, no and yes, got 3" in refusal(*three)


def test_a_network_that_has_applied_its_activation_is_not_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, labels, _ = make_scene(tmp_path)
    (tmp_path / "squashed.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Softmax(1))\n"
    )
    monkeypatch.chdir(tmp_path)
    said = refusal(
        "train", scene, "--labels", labels, "--model", "squashed:build", "--out", "out", "--steps", "1", *TINY
    )
    assert "gives logits of classes, and squashed:build does not (multiclass: 2 channels of probabilities" in said


def test_labels_of_more_classes_than_bytes_hold_are_read_and_trained(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    classes = np.kron(rng.permutation(np.arange(48 * 40) % 300).reshape(48, 40), np.ones((4, 4), int)).astype(np.uint16)
    image = write_geotiff(tmp_path / "s.tif", (classes % 251).astype(np.uint8)[None])
    stored = classes.copy()
    stored[-9:] = 65535
    labels = write_geotiff(tmp_path / "l.tif", stored[None])
    names = [f"c{value}" for value in range(300)]
    raster = open_raster(image)
    opened = open_labels(str(labels), raster.place, raster.shape_yx, of="s", names=names, options=LabelOptions())
    found = opened.open_reader().read(Window(y=0, x=0, height=192, width=160))
    assert np.array_equal(found, stored)
    assert (found == UNLABELLED).sum() == 9 * 160
    out = tmp_path / "out"
    done("train", image, "--labels", labels, "--out", out, "--steps", "2", *TINY)
    model = load_model(out / "best.json")
    # Of so many values 255 is one.
    assert [entry.name for entry in model.classes] == [f"class {value}" for value in range(300)]
    shown = result_of(outsize_here("--json", "plan", image, "--model", out / "best.json", "--core", "64"))
    assert shown["plan"]["output_dtype"] == "uint16"
