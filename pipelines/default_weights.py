"""Trains the shipped weights on sample scenes, and measures them on scenes never trained on.

    python -m outsize.pipelines.default_weights --minutes 25 --out models/segmentation/weights/sample-unet

The same recipe trains the per-pixel baseline (1 x 1 convolutions), so that the card shows what context is worth. The
seeds of the training scenes and of the held-out ones do not meet.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..models.segmentation.metrics import Confusion
from ..models.segmentation.model import SegmentationClass, SegmentationModel
from ..models.segmentation.norm import calibrating
from ..models.segmentation.scaling import Scaling
from ..models.segmentation.sources import save_model
from ..models.segmentation.unet import Norm, UNet
from ..sample_data.scene import BANDS, CLASSES, COLOURS, LABEL_NODATA, NODATA, Scene, render_window
from ..tiler.geometry import Window

TRAINING_SEEDS = range(1000, 1120)
HELD_OUT_SEEDS = range(5000, 5008)
PATCH = 768
CROP = 256
BATCH = 8


def make_patches(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 4, PATCH, PATCH) and labels (n, PATCH, PATCH), one patch a seed, from anywhere in a large scene."""
    images, labels = [], []
    for seed in seeds:
        position = np.random.default_rng(seed).integers(0, 20_000, 2)
        # Every tenth patch is the scene's corner, where nodata is.
        y, x = (0, 0) if seed % 10 == 0 else (int(position[0]), int(position[1]))
        scene = Scene(height=30_000, width=30_000 if (y, x) != (0, 0) else 4096, seed=seed)
        image, label = render_window(scene, Window(y=y, x=x, height=PATCH, width=PATCH))
        images.append(torch.from_numpy(image))
        labels.append(torch.from_numpy(label))
    return torch.stack(images), torch.stack(labels)


def make_batch(
    images: torch.Tensor, labels: torch.Tensor, scaling: Scaling, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops, flipped, turned and with other gain and offset for each band; scaled floats and labels."""
    crops, truths = [], []
    for _ in range(BATCH):
        index = int(rng.integers(len(images)))
        y, x = (int(v) for v in rng.integers(0, PATCH - CROP + 1, 2))
        image = images[index, :, y : y + CROP, x : x + CROP].float()
        truth = labels[index, y : y + CROP, x : x + CROP].long()
        gain = torch.from_numpy(rng.uniform(0.88, 1.12, (4, 1, 1)).astype(np.float32))
        offset = torch.from_numpy(rng.uniform(-6, 6, (4, 1, 1)).astype(np.float32))
        image = torch.where((image == NODATA).all(0), image, image * gain + offset)
        turns = int(rng.integers(4))
        image, truth = image.rot90(turns, (1, 2)), truth.rot90(turns, (0, 1))
        if rng.random() < 0.5:
            image, truth = image.flip(2), truth.flip(1)
        crops.append(image)
        truths.append(truth)
    subtract = torch.tensor(scaling.subtract)[:, None, None]
    divide = torch.tensor(scaling.divide)[:, None, None]
    return (torch.stack(crops) - subtract) / divide, torch.stack(truths)


def train(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, scaling: Scaling, *, minutes: float, seed: int
) -> tuple[nn.Module, int]:
    """AdamW with warm-up and cosine decay over the given time; returns the averaged weights and the number of steps."""
    rng = np.random.default_rng(seed)
    network.train()
    with calibrating(network):
        network(make_batch(images, labels, scaling, rng)[0])
    optimiser = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=1e-4)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    weights = torch.tensor([1.0, 1.0, 1.0, 1.3, 1.0, 1.6])
    began, steps = time.monotonic(), 0
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1:
        warm_up = min(1.0, (steps + 1) / 50)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * warm_up * 0.5 * (1 + math.cos(math.pi * progress))
        x, truth = make_batch(images, labels, scaling, rng)
        loss = F.cross_entropy(
            network(x.contiguous(memory_format=torch.channels_last)), truth, weights, ignore_index=LABEL_NODATA
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(network)
        steps += 1
        if steps % 50 == 0:
            print(f"{time.monotonic() - began:6.0f} s  step {steps:5d}  loss {loss.item():.4f}", flush=True)
    trained: nn.Module = average.module
    return trained.eval(), steps


def measure(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, scaling: Scaling) -> dict[str, Any]:
    """Accuracy and IoU over whole patches."""
    subtract = torch.tensor(scaling.subtract)[:, None, None]
    divide = torch.tensor(scaling.divide)[:, None, None]
    total = Confusion(counts=np.zeros((len(CLASSES), len(CLASSES)), np.int64))
    with torch.inference_mode():
        for image, truth in zip(images, labels, strict=True):
            predicted = network(((image.float() - subtract) / divide)[None])[0].argmax(0).to(torch.uint8)
            total += Confusion.count(truth.numpy(), predicted.numpy(), len(CLASSES))
    return {
        "pixels": total.pixels,
        "accuracy": round(total.accuracy, 4),
        "mean_iou": round(total.mean_iou, 4),
        "iou": {name: round(value, 4) for name, value in zip(CLASSES, total.iou, strict=True)},
    }


def per_pixel_network() -> nn.Module:
    """A classifier that sees one pixel: 1 x 1 convolutions."""
    return nn.Sequential(
        nn.Conv2d(len(BANDS), 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, len(CLASSES), 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="training time of the U-Net")
    parser.add_argument("--baseline-minutes", type=float, default=1.5, help="training time of the per-pixel baseline")
    parser.add_argument("--norm", choices=["none", "frozen"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write OUT.safetensors and OUT.json")
    options = parser.parse_args()
    norm: Norm = options.norm
    torch.manual_seed(options.seed)

    images, labels = make_patches(TRAINING_SEEDS)
    held_out = make_patches(HELD_OUT_SEEDS)
    valid = images.permute(1, 0, 2, 3)[:, (labels != LABEL_NODATA)].float()
    scaling = Scaling(
        kind="z-score",
        subtract=tuple(round(float(v), 2) for v in valid.mean(1)),
        divide=tuple(round(float(v), 2) for v in valid.std(1)),
    )
    del valid
    network, steps = train(
        UNet(norm=norm).to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue] - torch's stubs
        images,
        labels,
        scaling,
        minutes=options.minutes,
        seed=options.seed,
    )
    card: dict[str, Any] = {
        "trained_on": f"sample scenes, seeds {TRAINING_SEEDS.start}..{TRAINING_SEEDS.stop - 1}",
        "held_out": f"sample scenes, seeds {HELD_OUT_SEEDS.start}..{HELD_OUT_SEEDS.stop - 1}",
        "steps": steps,
        "minutes": options.minutes,
        "norm": norm,
        "unet": measure(network, *held_out, scaling),
    }
    if options.baseline_minutes:
        baseline, _ = train(
            per_pixel_network(), images, labels, scaling, minutes=options.baseline_minutes, seed=options.seed
        )
        card["per_pixel_baseline"] = measure(baseline, *held_out, scaling)
    print(json.dumps(card, indent=1))
    if options.out:
        model = SegmentationModel(
            name="sample-unet",
            network=network.to(memory_format=torch.contiguous_format),  # pyright: ignore[reportCallIssue]
            bands=BANDS,
            scaling=scaling,
            fill=(float(NODATA),) * len(BANDS),
            classes=tuple(SegmentationClass(name=n, colour=c) for n, c in zip(CLASSES, COLOURS, strict=True)),
        )
        save_model(model, options.out, card)


if __name__ == "__main__":
    main()
