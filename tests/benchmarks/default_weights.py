"""Scores of models on sample scenes that none was trained on, beside a random forest that sees one pixel.

    python -m outsize.tests.benchmarks.default_weights sample-unet/best.json
    python -m outsize.tests.benchmarks.default_weights sample-unet/best.json --ship PATH

The shipped model is always among them. --ship writes the first model, in the scene's colours and with its scores on
its card, as PATH.json and PATH.safetensors: so are the weights in the package made (the training's commands stand in
docs/reference/models.md).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...models import as_tile_network, load_model, save_model
from ...models.segmentation.training.metrics import Confusion
from ...pipelines.base.console import format_table
from ...sample_data.scene import CLASSES, COLOURS, LABEL_NODATA, NODATA, Scene, render_window
from ...tiler.base.geometry import Window

HELD_OUT = range(5000, 5008)
FOREST = range(1000, 1024)
"""Scenes that the forest learns from: those of the network's training."""
SIDE = 768
_MOST = 60_000
"""Pixels that the forest is trained on, drawn from all."""

Patch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


def render_patch(seed: int) -> Patch:
    """(4, SIDE, SIDE) pixels and (SIDE, SIDE) classes from somewhere in a large scene; nodata of every tenth seed."""
    y, x = (int(start) for start in np.random.default_rng(seed).integers(0, 20_000, 2))
    if seed % 10 == 0:
        return render_window(Scene(height=4096, width=4096, seed=seed), Window(y=0, x=0, height=SIDE, width=SIDE))
    return render_window(Scene(height=30_000, width=30_000, seed=seed), Window(y=y, x=x, height=SIDE, width=SIDE))


def describe(total: Confusion) -> dict[str, Any]:
    return {
        "pixels": total.pixels,
        "accuracy": round(total.accuracy, 4),
        "mean_iou": round(total.mean_iou, 4),
        "iou": {name: round(value, 4) for name, value in zip(CLASSES, total.iou, strict=True)},
    }


def score_model(path: Path | None, patches: list[Patch]) -> dict[str, Any]:
    """Of whole patches at once."""
    network = as_tile_network(load_model(path))
    total = Confusion(counts=np.zeros((len(CLASSES), len(CLASSES)), np.int64))
    with torch.inference_mode():
        for image, truth in patches:
            found = network(torch.from_numpy(image)[None])[0, 0].numpy()
            total += Confusion.count(truth, found, len(CLASSES))
    return describe(total)


def score_forest(patches: list[Patch]) -> dict[str, Any]:
    """200 trees on the bands of one pixel."""
    from sklearn.ensemble import RandomForestClassifier

    taught = [render_patch(seed) for seed in FOREST]
    features = np.concatenate([image.reshape(len(image), -1).T for image, _ in taught])
    classes = np.concatenate([truth.ravel() for _, truth in taught])
    known = np.flatnonzero((classes != LABEL_NODATA) & (features != NODATA).any(1))
    chosen = np.random.default_rng(0).choice(known, _MOST, replace=False)
    forest = RandomForestClassifier(200, random_state=0, min_samples_leaf=2, class_weight="balanced_subsample")
    forest.fit(features[chosen], classes[chosen])
    total = Confusion(counts=np.zeros((len(CLASSES), len(CLASSES)), np.int64))
    for image, truth in patches:
        found = forest.predict(image.reshape(len(image), -1).T).astype(np.uint8).reshape(truth.shape)
        total += Confusion.count(truth, found, len(CLASSES))
    return describe(total)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="descriptions of models for segment")
    parser.add_argument("--ship", type=Path, metavar="PATH", help="write the first model with its scores")
    options = parser.parse_args()
    patches = [render_patch(seed) for seed in HELD_OUT]
    scores = {str(path): score_model(path, patches) for path in options.models}
    scores["shipped"] = score_model(None, patches)
    scores["forest of one pixel"] = forest = score_forest(patches)
    print(json.dumps(scores))
    rows = [
        [name, *(f"{found[key]:.4f}" for key in ("accuracy", "mean_iou")), *(f"{v:.4f}" for v in found["iou"].values())]
        for name, found in scores.items()
    ]
    print(format_table(("", "accuracy", "mean IoU", *CLASSES), rows))
    if options.ship:
        source = options.models[0]
        trained = json.loads(source.read_text())["properties"]["outsize:card"]
        held_out = f"sample scenes, seeds {HELD_OUT.start}..{HELD_OUT.stop - 1}"
        card = {**trained, "held_out": held_out, "unet": scores[str(source)], "per_pixel_forest": forest}
        model = load_model(source)
        classes = tuple(replace(c, colour=colour) for c, colour in zip(model.classes, COLOURS, strict=True))
        save_model(replace(model, name=options.ship.name, classes=classes), options.ship, card)


if __name__ == "__main__":
    main()
