"""What the ranks of a test run: python train_rank.py RANK RANKS FOLDER, each with an image of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from outsize.models.segmentation.networks.unet import UNet
from outsize.models.segmentation.training.losses import CrossEntropy, Dice
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.system.process_end import end_with
from outsize.tiler.training.plan import TrainPlan
from outsize.tiler.training.tiled_autograd import TiledLoss, TiledModule
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

SHAPE = (53, 67)


def make_module() -> nn.Module:
    torch.manual_seed(5)
    return UNet(3, 2, (4, 6)).double()


def make_sample(rank: int) -> tuple[Tensor, Tensor]:
    """Image and labels of a rank."""
    generator = torch.Generator().manual_seed(rank)
    image = torch.randn((3, *SHAPE), generator=generator, dtype=torch.float64)
    return image, torch.randint(0, 2, SHAPE, generator=generator)


def main(rank: int, ranks: int, folder: Path) -> None:
    """A step of each kind under DDP; its gradients are saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    plan = TrainPlan(image_shape=(3, *SHAPE), output_shape=(2, *SHAPE), core=(30, 31))
    image, labels = make_sample(rank)
    saved: dict[str, list[Tensor | None]] = {}
    for kind in ("loss", "no pixel", "no pixel by sums", "output", "whole output"):
        # One each, since DDP's hooks stay on parameters.
        module = make_module()
        network = analyze_network(module, bands=3)
        kinds = {
            "loss": TiledLoss(network, plan, CrossEntropy()),
            "no pixel": TiledLoss(network, plan, CrossEntropy(ignore_index=255)),
            "no pixel by sums": TiledLoss(network, plan, Dice(ignore_index=255)),
            "output": TiledModule(network, plan),
        }
        parallel = DistributedDataParallel(kinds.get(kind, module))
        if "output" in kind:
            value = parallel(image[None]).square().mean()
        else:
            # Of the ranks only the first has labels then.
            value = parallel(image, labels.fill_(255) if rank and kind != "loss" else labels)
        value.backward()
        saved[kind] = [parameter.grad for parameter in module.parameters()]
    torch.save(saved, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    end_with(lambda: main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
