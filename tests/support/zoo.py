"""Small networks that between them use every operation with a rule, with weights that keep every pixel alive."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from outsize.models.segmentation.networks.unet import UNet
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def without_onednn() -> Iterator[None]:
    """Its Winograd convolution spreads NaN over whole blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks on Intel GPUs
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and eval mode, its weights drawn anew with positive biases so that no ReLU is dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
            parameter.copy_(values if parameter.ndim > 1 else values.abs() + 0.5)
    return module.double().eval()


class PlainUNet(nn.Module):
    """Without ceil_mode and crops: takes only sizes divisible by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.d, self.e = nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        c = F.relu(self.c(F.max_pool2d(b, 2)))
        d = F.relu(self.d(torch.cat([F.interpolate(c, scale_factor=2), b], 1)))
        return self.e(torch.cat([F.interpolate(d, scale_factor=2, mode="bilinear"), a], 1))


class PaddedUNet(nn.Module):
    """Floor pooling, the upsampled path padded to the skip's size: another common way to take every size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c = nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.avg_pool2d(a, 2)))
        up = F.interpolate(b, scale_factor=2)
        dy, dx = a.shape[-2] - up.shape[-2], a.shape[-1] - up.shape[-1]
        up = F.pad(up, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))
        return self.c(torch.cat([a, up], 1))


class Strided(nn.Module):
    """An encoder whose output has a third of the pixels: strided, dilated, grouped and even convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 5, stride=3, padding=2)
        self.b = nn.Conv2d(8, 8, 3, padding=3, dilation=3, groups=4)
        self.c = nn.Conv2d(8, 8, (4, 2), padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.gelu(self.norm(self.c(F.silu(self.b(F.relu(self.a(x))))))))


class Pooled(nn.Module):
    """Overlapping pooling with ceil_mode and padding, joined with its input by nearest upsampling and a crop."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        if self.kind == "max":
            p = F.max_pool2d(a, 3, 2, padding=1, ceil_mode=True)
        else:
            p = F.avg_pool2d(a, 3, 2, padding=1, ceil_mode=True, count_include_pad=self.kind == "avg")
        up = F.interpolate(p, scale_factor=2, mode="nearest")[..., : x.shape[-2], : x.shape[-1]]
        return self.b(torch.cat([a, up], dim=1))


class Enlarged(nn.Module):
    """Super-resolution: three output pixels for each input pixel."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.interpolate(F.relu(self.a(x)), scale_factor=3, mode=self.mode))


class Cropped(nn.Module):
    """Unpadded convolution, its input cropped to match, the result padded back; a path that drops the last pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 5), nn.Conv2d(9, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.a(x)), x[..., 2:-2, 2:-2]], dim=1)
        return self.b(F.pad(y[..., :-1, :], (2, 2, 2, 3)))


class Attended(nn.Module):
    """Per-pixel attention over channels, through permute, chunk, softmax and in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 2, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        value, weight = self.a(x).permute(0, 2, 3, 1).chunk(2, dim=-1)
        weight = weight.softmax(dim=-1) * weight.mean(dim=-1, keepdim=True).sigmoid_()
        y = (value.relu_() * weight).permute(0, 3, 1, 2)
        return self.b(y.clamp(-3, 3)) / 2 + y.amax(dim=1).unsqueeze(1)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "pointwise": lambda: nn.Conv2d(3, 2, 1),
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 5, padding=2)),
    "unet depth 0": lambda: UNet(3, 2, (6,)),
    "unet depth 1": lambda: UNet(3, 2, (4, 6)),
    "unet depth 2": lambda: UNet(3, 2, (4, 6, 8), norm="frozen"),
    "unet depth 3": lambda: UNet(3, 2, (4, 4, 6, 6)),
    "plain unet": PlainUNet,
    "padded unet": PaddedUNet,
    "strided": Strided,
    "max pooled": lambda: Pooled("max"),
    "average pooled": lambda: Pooled("avg"),
    "average pooled without padding": lambda: Pooled("avg-valid"),
    "enlarged nearest": lambda: Enlarged("nearest"),
    "enlarged bilinear": lambda: Enlarged("bilinear"),
    "cropped": Cropped,
    "attended": Attended,
}


class Finished(nn.Module):
    """A network whose logits are rounded to bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = alive(UNet(3, 4, (6, 8))).float()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.float() / 255)

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits.softmax(1) * 254).round().to(torch.uint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(self.logits(x))
