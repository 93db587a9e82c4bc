"""`outsize train` on real rasters, beside a random forest that sees one pixel, on the same split.

    python -m outsize.tests.benchmarks.training --steps 400

Cloud masks (three scenes of 512 x 512, dense labels): trained on two scenes and tested on the third, and on blocks of
all. Rachel Carson (2629 x 2201, 23 polygons): blocks. The forest is scikit-learn's, on the same training pixels, tested
on the same validation pixels. Figures of both are printed as JSON; docs/benchmarks.md says what was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from outsize.models.segmentation.training.metrics import Confusion
from outsize.models.segmentation.training.scene import SceneLabels, TrainingScene
from outsize.models.segmentation.training.split import BlockSplit
from outsize.tiler.base.geometry import Window
from outsize.tiler.labels.labels import UNLABELLED, LabelOptions, open_labels
from outsize.tiler.rasters.opening import open_raster
from rasterio.errors import NotGeoreferencedWarning

CLOUDS = ("shadow", "water", "snow", "land", "cloud")
COVER = ("Sand", "WetSand", "Emergent Wetland", "Forested Wetland", "Herbaceous", "Subtidal Haline")
_MOST = 60_000
"""Pixels that the forest is trained on, drawn from all."""


def write_clouds(data: Path, folder: Path) -> list[tuple[Path, Path]]:
    """(scene, labels) of each of the three crops, as GeoTIFF."""
    found: list[tuple[Path, Path]] = []
    for name in ("sentinel2", "landsat5", "landsat7"):
        arrays = np.load(data / f"cloud_masks/{name}.npz")
        image, mask = np.moveaxis(arrays["img"], 2, 0), arrays["msk"][..., 0]
        paths = (folder / f"{name}.tif", folder / f"{name}-labels.tif")
        for path, values in zip(paths, (image.astype(np.float32), mask[None].astype(np.uint8)), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(
                    path, "w", driver="GTiff", count=len(values), height=512, width=512, dtype=values.dtype,
                    tiled=True, blockxsize=256, blockysize=256,
                ) as dataset:  # fmt: skip
                    dataset.write(values)
        found.append(paths)
    return found


def outsize(*words: str | Path) -> dict[str, Any]:
    """The command in a process of its own; its JSON."""
    command = [sys.executable, "-m", "outsize", "--json", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def open_scenes(
    out: Path, pairs: Sequence[tuple[Path, Path]], names: Sequence[str], options: LabelOptions, held_out: Sequence[Path]
) -> list[TrainingScene]:
    """The scenes with the split that the training in a folder has chosen."""
    splits = json.loads((out / "survey.json").read_text())["splits"]
    found: list[TrainingScene] = []
    for (scene, labels), split in zip(pairs, splits, strict=True):
        raster = open_raster(scene)
        opened = open_labels(str(labels), raster.place, raster.shape_yx, of=str(scene), names=names, options=options)
        found.append(
            TrainingScene(
                raster=raster,
                labels=opened,
                split=BlockSplit(**split) if split else None,
                is_held_out=scene in held_out,
            )
        )
    return found


def pixels_of(scenes: Sequence[TrainingScene], part: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, bands) and (pixels,) classes of all that train, or validate."""
    features: list[np.ndarray] = []
    classes: list[np.ndarray] = []
    for scene in scenes:
        if not (scene.trains if part == "training" else scene.validates):
            continue
        whole = Window.whole(scene.raster.shape_yx)
        labels = SceneLabels(scene=scene, part=part).open_reader().read(whole)  # pyright: ignore[reportArgumentType]
        chosen = labels != UNLABELLED
        features.append(scene.raster.open_reader().read(whole)[:, chosen].T)
        classes.append(labels[chosen])
    return np.concatenate(features), np.concatenate(classes)


def score(confusion: Confusion, names: Sequence[str]) -> dict[str, Any]:
    return {
        "accuracy": round(confusion.accuracy, 4),
        "mean_iou": round(confusion.mean_iou, 4),
        "mean_f1": round(confusion.mean_f1, 4),
        "iou": {name: round(value, 4) for name, value in zip(names, confusion.iou, strict=True)},
    }


def run_forest(scenes: Sequence[TrainingScene], names: Sequence[str]) -> dict[str, Any]:
    """A random forest of 200 trees on the same pixels."""
    from sklearn.ensemble import RandomForestClassifier

    began = time.perf_counter()
    features, classes = pixels_of(scenes, "training")
    chosen = np.random.default_rng(0).permutation(len(classes))[:_MOST]
    forest = RandomForestClassifier(200, random_state=0, min_samples_leaf=2, class_weight="balanced_subsample")
    forest.fit(features[chosen], classes[chosen])
    tested, truth = pixels_of(scenes, "validation")
    found = forest.predict(tested).astype(np.uint8)
    return {
        **score(Confusion.count(truth, found, len(names)), names),
        "training_pixels": len(classes),
        "pixels": len(truth),
        "seconds": round(time.perf_counter() - began, 1),
    }


def compare(
    name: str,
    pairs: Sequence[tuple[Path, Path]],
    names: Sequence[str],
    folder: Path,
    words: Sequence[str],
    options: LabelOptions,
    held_out: Sequence[Path] = (),
) -> dict[str, Any]:
    """Both on one split."""
    out = folder / name
    labels = [word for _, path in pairs for word in ("--labels", str(path))]
    holding = [word for path in held_out for word in ("--validate-on", str(path))]
    scenes = [str(scene) for scene, _ in pairs]
    trained = outsize("train", *scenes, *labels, *holding, "--out", out, *words)
    best = trained["best"]
    network = {key: round(best[key], 4) for key in ("accuracy", "mean_iou", "mean_f1")}
    network["iou"] = {
        label: None if value is None else round(value, 4)
        for label, value in zip(trained["classes"], best["iou"], strict=True)
    }
    network |= {"step": best["step"], "steps": trained["steps"], "training_s": trained["training_s"]}
    network |= {"pixels": best["pixels"], "peak_bytes": trained["peak_bytes"]}
    return {"network": network, "forest": run_forest(open_scenes(out, pairs, names, options, held_out), names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training, each")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "../shared/data")
    parser.add_argument("--out", type=Path, help="keep the trainings here")
    parser.add_argument("--only", choices=["third-scene", "blocks", "polygons"], help="one of the comparisons")
    options = parser.parse_args()
    common = ("--steps", str(options.steps), "--val-every", "50", "--class-weights", "balanced")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        clouds = write_clouds(options.data, folder)
        # Snow is in none of the crops.
        there = tuple(name for name in CLOUDS if name != "snow")
        values = tuple(str(CLOUDS.index(name)) for name in there)
        of_clouds = LabelOptions(values=values)
        words = (*common, "--classes", ",".join(there), "--class-values", ",".join(values), "--core", "128")
        # A reach of 22 pixels: scenes of 512 pixels have no room for wide guards.
        words = (*words, "--widths", "16,32,64", "--warm-up", "20")
        found: dict[str, Any] = {}
        if options.only in (None, "third-scene"):
            found["third-scene"] = compare("third-scene", clouds, there, folder, words, of_clouds, [clouds[2][0]])
        if options.only in (None, "blocks"):
            found["blocks"] = compare("blocks", clouds, there, folder, words, of_clouds)
        if options.only in (None, "polygons"):
            source = options.data / "sentinel2_rachel_carson"
            stack = folder / "carson.zarr"
            if not stack.exists():
                files = [next(source.glob(f"*{band}.tif")) for band in ("B04", "B03", "B02", "B08")]
                outsize("ingest", *files, stack, "--stack", "--no-dashboard")
            read = LabelOptions(field="Classname", encoding="latin1")
            # A small network: reach and guard are small too, as the polygons are.
            words = (
                *common,
                "--label-field",
                "Classname",
                "--label-encoding",
                "latin1",
                "--core",
                "64",
                "--block",
                "32",
            )
            words = (
                *words,
                "--classes",
                ",".join(COVER),
                "--widths",
                "16,32",
                "--validation",
                "0.35",
                "--warm-up",
                "20",
            )
            pair = (stack, source / "rcr_landcover.shp")
            found["polygons"] = compare("polygons", [pair], COVER, folder, words, read)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
