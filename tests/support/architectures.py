"""Networks as the field builds them, small: what programs must tile exactly.

Each maps (1, 3, H, W) to (1, C, ceil(H * scale), ceil(W * scale)), for every H and W >= 40 and one rational scale.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(bands: int, channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """A padded convolution and a ReLU: ceil(size / stride)."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(nn.Conv2d(bands, channels, kernel, stride, padding, dilation), nn.ReLU())


def normed(bands: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A padded convolution without bias and a batch norm that has seen data."""
    norm = nn.BatchNorm2d(channels)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.linspace(-0.5, 0.5, channels))
    norm.running_var.copy_(torch.linspace(0.5, 2, channels))
    return nn.Sequential(nn.Conv2d(bands, channels, kernel, stride, kernel // 2, groups=groups, bias=False), norm)


def resize(x: Tensor, like: Tensor, mode: str = "bilinear", corners: bool = False) -> Tensor:
    """To the size of `like`, by a factor that depends on the image's size unless it is a multiple of the stride."""
    flag = corners if mode in ("bilinear", "bicubic") else None
    return F.interpolate(x, size=like.shape[-2:], mode=mode, align_corners=flag)


def crop(x: Tensor, like: Tensor) -> Tensor:
    """Without the rows and columns beyond the size of `like`."""
    return x[..., : like.shape[-2], : like.shape[-1]]


def pad_around(x: Tensor, like: Tensor) -> Tensor:
    """Zeros to the size of `like`, half of them before."""
    dy, dx = like.shape[-2] - x.shape[-2], like.shape[-1] - x.shape[-1]
    return F.pad(x, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))


def pad_to_multiple(x: Tensor, multiple: int, mode: str = "constant") -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode=mode)


# U-Nets ------------------------------------------------------------------------------------------------------------


class Resized(nn.Module):
    """Interpolation to the skip's size."""

    def __init__(self, mode: str, corners: bool = False) -> None:
        super().__init__()
        self.mode, self.corners = mode, corners

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return resize(x, skip, self.mode, self.corners)


class Doubled(nn.Module):
    """Upsampling by exactly two, or a transposed convolution that does so, then a crop or zeros to the skip's size."""

    def __init__(self, up: nn.Module, fit: Callable[[Tensor, Tensor], Tensor] = crop) -> None:
        super().__init__()
        self.up, self.fit = up, fit

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.fit(self.up(x), skip)


class ToOutputSize(nn.Module):
    """A transposed convolution whose output_padding follows the skip's parity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.up(x, output_size=skip.shape[-2:])


class UNet(nn.Module):
    """Three levels joined by skips; how it goes down and up is given."""

    def __init__(self, down: Callable[[], nn.Module], up: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 6)
        self.d, self.e = conv(12, 6), conv(12, 6)
        self.down, self.ups = down(), nn.ModuleList([up(), up()])
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(self.down(a))
        c = self.c(self.down(b))
        d = self.d(torch.cat([b, self.ups[0](c, b)], dim=1))
        return self.head(self.e(torch.cat([self.ups[1](d, a), a], dim=1)))


def max_pool() -> nn.Module:
    return nn.MaxPool2d(2, ceil_mode=True)


def resized(mode: str, corners: bool = False) -> Callable[[], nn.Module]:
    return lambda: UNet(max_pool, lambda: Resized(mode, corners))


def averaged(kernel: int, padding: int, counted: bool, divisor: int | None = None) -> Callable[[], nn.Module]:
    def pool() -> nn.Module:
        return nn.AvgPool2d(kernel, 2, padding, True, counted, divisor)

    return lambda: UNet(pool, lambda: Doubled(nn.Upsample(scale_factor=2)))


def transposed(kernel: int, padding: int = 0, output_padding: int = 0, groups: int = 1) -> Callable[[], nn.Module]:
    def up() -> nn.Module:
        return Doubled(nn.ConvTranspose2d(6, 6, kernel, 2, padding, output_padding, groups))

    return lambda: UNet(max_pool, up)


class NestedUNet(nn.Module):
    """UNet++: every level decoded at every depth, the heads averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.x00, self.x10, self.x20 = conv(3, 4), conv(4, 4), conv(4, 4)
        self.x01, self.x11, self.x02 = conv(8, 4), conv(8, 4), conv(12, 4)
        self.heads = nn.ModuleList(nn.Conv2d(4, 2, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x00 = self.x00(x)
        x10 = self.x10(F.max_pool2d(x00, 2))
        x20 = self.x20(F.max_pool2d(x10, 2))
        x01 = self.x01(torch.cat([x00, resize(x10, x00)], dim=1))
        x11 = self.x11(torch.cat([x10, resize(x20, x10)], dim=1))
        x02 = self.x02(torch.cat([x00, x01, resize(x11, x00)], dim=1))
        return torch.stack([head(y) for head, y in zip(self.heads, (x01, x02), strict=True)]).mean(dim=0)


class AttentionUNet(nn.Module):
    """The skip weighted by a gate that is computed at the coarse size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 6, stride=2), conv(12, 4)
        self.fine, self.coarse = nn.Conv2d(6, 4, 1, stride=2, bias=False), nn.Conv2d(6, 4, 1)
        self.gate, self.head = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        gate = torch.sigmoid(self.gate(F.relu(self.fine(a) + self.coarse(b))))
        return self.head(self.c(torch.cat([a * resize(gate, a), resize(b, a)], dim=1)))


class ValidUNet(nn.Module):
    """Unpadded convolutions and skips cropped at their centre, as in the first U-Net, then zeros all round."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2, self.b1, self.b2, self.c1, self.c2 = (nn.Conv2d(bands, 4, 3) for bands in (3, 4, 4, 4, 8, 4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a2(F.relu(self.a1(x))))
        b = F.relu(self.b2(F.relu(self.b1(F.max_pool2d(a, 2, ceil_mode=True)))))
        skip = a[..., 4:-4, 4:-4]
        c = torch.cat([skip, crop(F.interpolate(b, scale_factor=2), skip)], dim=1)
        return F.pad(self.head(F.relu(self.c2(F.relu(self.c1(c))))), (8, 8, 8, 8))


# Encoders ----------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two normed convolutions; the shortcut of a strided block is a strided 1 x 1 projection."""

    def __init__(self, bands: int, channels: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = normed(bands, channels, 3, stride), normed(channels, channels)
        self.shortcut = nn.Identity() if stride == 1 and bands == channels else normed(bands, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x), inplace=True)
        y = self.b(y)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNetFCN(nn.Module):
    """Strided 7 x 7 stem, overlapping max pooling, basic blocks, a head at 1/8 resized to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(normed(3, 6, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(BasicBlock(6, 6, 1), BasicBlock(6, 8, 2), BasicBlock(8, 8, 1))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.head(self.blocks(self.stem(x))), x)


class FCN8(nn.Module):
    """Scores of three depths fused by transposed convolutions, the last of kernel 16 and stride 8, then a crop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)
        self.score_a, self.score_b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.by_two, self.by_eight = nn.ConvTranspose2d(2, 2, 4, 2, 1), nn.ConvTranspose2d(2, 2, 16, 8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(self.a(x), 8, ceil_mode=True)
        b = F.max_pool2d(self.b(a), 2, ceil_mode=True)
        score_a = self.score_a(a)
        return crop(self.by_eight(crop(self.by_two(self.score_b(b)), score_a) + score_a), x)


class DeepLab(nn.Module):
    """Atrous spatial pyramid at 1/4, decoded with a low-level skip at 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = conv(3, 6, stride=2), conv(6, 6, stride=2)
        self.pyramid = nn.ModuleList([conv(6, 4, 1), *(conv(6, 4, dilation=d) for d in (2, 4, 6))])
        self.project, self.reduce, self.decode = conv(16, 6, 1), conv(6, 3, 1), conv(9, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(low)
        high = self.project(torch.cat([branch(high) for branch in self.pyramid], dim=1))
        return resize(self.head(self.decode(torch.cat([resize(high, low), self.reduce(low)], dim=1))), x)


class FPN(nn.Module):
    """Lateral 1 x 1 convolutions, nearest top-down sums at the lateral's size; its finest level, 1/4, is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6, stride=2)
        self.stages = nn.ModuleList(conv(6, 6, stride=2) for _ in range(3))
        self.laterals = nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in range(3))
        self.smooth = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        x = self.stem(x)
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        top = levels[-1]
        for level in reversed(levels[:-1]):
            top = level + resize(top, level, "nearest")
        return self.smooth(top)


class HRNet(nn.Module):
    """Three resolutions side by side, each fed by all: strided convolutions down, 1 x 1 and resizing up."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 6, 8)
        self.stems = nn.ModuleList([conv(3, 4), *(conv(a, b, stride=2) for a, b in pairwise(widths))])
        self.branches = nn.ModuleList(conv(c, c) for c in widths)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self.path(a, b, i, j) for i, a in enumerate(widths)) for j, b in enumerate(widths)
        )
        self.head = nn.Conv2d(sum(widths), 2, 1)

    @staticmethod
    def path(bands: int, channels: int, source: int, target: int) -> nn.Module:
        if target <= source:
            return nn.Identity() if target == source else nn.Conv2d(bands, channels, 1)
        steps = [nn.Conv2d(bands, bands, 3, 2, 1) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, nn.Conv2d(bands, channels, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for stem in self.stems:
            x = stem(x)
            levels.append(x)
        levels = [branch(y) for branch, y in zip(self.branches, levels, strict=True)]
        fused = []
        for j, paths in enumerate(self.fuse):
            parts = [path(y) for path, y in zip(paths, levels, strict=True)]
            parts = [resize(y, levels[j]) if i > j else y for i, y in enumerate(parts)]
            fused.append(F.relu(sum(parts[1:], parts[0])))
        return self.head(torch.cat([fused[0], *(resize(y, fused[0]) for y in fused[1:])], dim=1))


class InvertedResidual(nn.Module):
    """Widened by 1 x 1, filtered depthwise, narrowed by 1 x 1 without activation; a sum where the size allows."""

    def __init__(self, bands: int, channels: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide = 2 * bands
        self.joins = stride == 1 and bands == channels
        self.layers = nn.Sequential(
            normed(bands, wide, 1), act(), normed(wide, wide, 3, stride, groups=wide), act(), normed(wide, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.joins else self.layers(x)


class MobileNet(nn.Module):
    """Inverted residuals with ReLU6, then hardswish, to an output at 1/8."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            normed(3, 6, 3, 2),
            nn.Hardswish(),
            InvertedResidual(6, 6, 1, nn.ReLU6),
            InvertedResidual(6, 8, 2, nn.ReLU6),
            InvertedResidual(8, 8, 1, nn.Hardswish),
            InvertedResidual(8, 8, 2, nn.Hardswish),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNeXtBlock(nn.Module):
    """7 x 7 depthwise, then layer norm, linear layers and GELU over channels that come last; scaled and added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen, self.narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.widen(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """The image padded to whole 4 x 4 patches, blocks at 1/4, resized to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 2, 1)
        self.blocks = nn.Sequential(ConvNeXtBlock(6), ConvNeXtBlock(6))

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.head(self.blocks(self.stem(pad_to_multiple(x, 4)))), x)


class LayerNorm2d(nn.Module):
    """Layer norm over channels, written by hand with mean and variance over dim=1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        variance = x.var(dim=1, keepdim=True, unbiased=False)
        x = (x - mean) * torch.rsqrt(variance + 1e-6)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class NormedByHand(nn.Module):
    """A hand-written per-pixel norm after each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), LayerNorm2d(8), nn.GELU("tanh"), nn.Conv2d(8, 4, 3, 2, 1), LayerNorm2d(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.layers(x), x)


class DenseNet(nn.Module):
    """Each layer reads all before it; the transition drops odd rows and columns by floor pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(normed(4 + 3 * i, 3) for i in range(3))
        self.transition, self.head = nn.Conv2d(13, 6, 1), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(F.relu(torch.cat(features, dim=1))))
        y = F.avg_pool2d(self.transition(torch.cat(features, dim=1)), 2)
        return resize(self.head(F.relu(y)), x)


class EfficientNet(nn.Module):
    """Swish by hand and SiLU around a depthwise 5 x 5, without squeeze-and-excitation; an output at 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = normed(3, 6, 3, 2), normed(6, 6, 5, 1, groups=6), normed(6, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y * torch.sigmoid(y)
        return self.head(y + self.c(F.silu(self.b(y))))


class ShuffleNet(nn.Module):
    """Grouped 1 x 1 convolutions, their channels shuffled by view, transpose and reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8, stride=2), nn.Conv2d(8, 2, 1)
        self.a, self.b = nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 8, 1, groups=4)
        self.depthwise = normed(8, 8, 3, groups=8)

    @staticmethod
    def shuffle(x: Tensor, groups: int) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, groups, channels // groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = F.relu(y + self.b(self.depthwise(self.shuffle(F.relu(self.a(y)), 4))))
        return resize(self.head(y), x, "nearest")


class SmallImageResNet(nn.Module):
    """A shortcut without weights: every second pixel, with channels of zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = normed(3, 4), normed(4, 8, 3, 2), normed(8, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        shortcut = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(self.b(F.relu(self.a(y))) + shortcut))


class ENet(nn.Module):
    """A strided convolution beside a max pooling of the image, PReLU, factorised and dilated 5 x 1 and 1 x 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.prelu = nn.Conv2d(3, 5, 3, 2, 1), nn.PReLU(8)
        self.tall = nn.Conv2d(8, 8, (5, 1), padding=(4, 0), dilation=(2, 1))
        self.wide = nn.Conv2d(8, 8, (1, 5), padding=(0, 2))
        self.single, self.drop = nn.PReLU(), nn.Dropout2d(0.1)
        self.up = nn.ConvTranspose2d(8, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(torch.cat([self.stem(x), F.max_pool2d(x, 2, ceil_mode=True)], dim=1))
        return crop(self.up(self.single(y + self.drop(self.wide(self.tall(y))))), x)


class WeightStandardised(nn.Module):
    """Means and deviations, but of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    @staticmethod
    def standardised(layer: nn.Conv2d, x: Tensor) -> Tensor:
        weight = layer.weight - layer.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1)
        fan_in = weight.numel() // weight.shape[0]
        return F.conv2d(x, weight / (deviation * fan_in**0.5 + 1e-5), layer.bias, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.standardised(self.b, F.relu(self.standardised(self.a, x)))


# Changes of size ---------------------------------------------------------------------------------------------------


class ESPCN(nn.Module):
    """Super-resolution by three: all work at the image's size, then one pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 18, 3, padding=1), nn.PixelShuffle(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class NearestSuperResolution(nn.Module):
    """Super-resolution by two: nearest and a convolution, over a bilinear enlargement of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 4), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.interpolate(self.a(x), scale_factor=2, mode="nearest"))
        return self.c(y) + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class ShuffledSuperResolution(nn.Module):
    """Super-resolution by four: residual blocks, two pixel shuffles, over a bicubic enlargement of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 9, padding=4), nn.Conv2d(4, 4, 3, padding=1), nn.PReLU()
        self.ups = nn.Sequential(conv(4, 16), nn.PixelShuffle(2), nn.Conv2d(4, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(x))
        return self.ups(y + self.b(y)) + F.interpolate(x, scale_factor=4, mode="bicubic")


class ThreeHalves(nn.Module):
    """Enlarged by three, then strided by two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), nn.Conv2d(6, 2, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.interpolate(self.a(x), scale_factor=3, mode="bilinear"))


class Unshuffled(nn.Module):
    """The image padded to whole 4 x 4 blocks, unshuffled into channels, shuffled back and cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.PixelUnshuffle(4), nn.PixelShuffle(4)
        self.a, self.b = conv(48, 12), nn.Conv2d(12, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return crop(self.up(self.b(self.a(self.down(pad_to_multiple(x, 4, "replicate"))))), x)


class DepthToSpace(nn.Module):
    """A pixel shuffle of two written as view, permute and reshape, then undone in the same way after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 12), conv(3, 3), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        batch, channels, height, width = y.shape
        y = y.view(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        y = self.b(y.reshape(batch, channels // 4, height * 2, width * 2))
        y = y.reshape(batch, channels // 4, height, 2, width, 2).permute(0, 1, 3, 5, 2, 4)
        return self.c(y.reshape(batch, channels, height, width))


class Focus(nn.Module):
    """Four phases of the image, padded to even size, become channels at 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(12, 8), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2)
        phases = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.b(self.a(torch.cat(phases, dim=1)))


class StrideThree(nn.Module):
    """Stride 3, then resized by about three to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6, 3, 3), conv(6, 6), nn.Conv2d(9, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([x, resize(self.b(self.a(x)), x)], dim=1))


class StrideFive(nn.Module):
    """Stride 5 by 3 across: two scales of two axes brought to one, an output at 1/5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, (5, 1), (5, 1), (2, 0)), nn.Conv2d(6, 6, (1, 7), (1, 5), (0, 3))
        self.c = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Gapped(nn.Module):
    """A transposed convolution of stride 3 and kernel 2, between whose pixels only the bias is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = conv(3, 6, 3, 3), nn.ConvTranspose2d(6, 6, 2, 3, output_padding=1)
        self.dilated = nn.ConvTranspose2d(6, 6, 3, padding=2, dilation=2, groups=2)
        self.b = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(crop(self.up(self.dilated(self.a(x))), x)))


class Laplacian(nn.Module):
    """Bands of a pyramid, each the difference between a level and its average resized, each with its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bands = nn.ModuleList(conv(3, 4) for _ in range(3))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for _ in range(2):
            small = F.avg_pool2d(x, 2, ceil_mode=True)
            levels.append(x - resize(small, x))
            x = small
        y = self.bands[2](x)
        for band, level in zip(self.bands, reversed(levels), strict=False):
            y = band(level) + resize(y, level)
        return self.head(y)


class ImagePyramid(nn.Module):
    """The same weights on the image and on two smaller copies of it, resized to its size and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(conv(3, 6), nn.Conv2d(6, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        third = F.interpolate(x, size=((x.shape[-2] + 2) // 3, (x.shape[-1] + 2) // 3), mode="nearest")
        outputs = [self.network(x), resize(self.network(half), x), resize(self.network(third), x, "bicubic")]
        return sum(outputs[1:], outputs[0]) / 3


class BlurPool(nn.Module):
    """Max pooling without stride, then a fixed binomial filter with stride 2 over reflected edges."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), nn.Conv2d(6, 2, 3, padding=1)
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(row, row).expand(6, 1, 4, 4).clone())

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.a(x), 2, stride=1)
        y = F.conv2d(F.pad(y, (2, 2, 2, 2), mode="reflect"), self.get_buffer("kernel"), stride=2, groups=6)
        return self.b(y)


# Edges and kernels -------------------------------------------------------------------------------------------------


class EvenKernels(nn.Module):
    """2 x 2 and 4 x 4 kernels, centred by unequal padding before or after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 2), nn.Conv2d(6, 6, 4), nn.Conv2d(6, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(F.pad(x, (0, 1, 1, 0))))
        y = F.relu(self.b(F.pad(y, (1, 2, 2, 1))))
        return self.c(F.pad(y, (3, 0, 0, 3), value=0.5))


class DilatedGroupedEven(nn.Module):
    """Even kernels with dilation and groups, padded alike on both sides or by "same"."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a = nn.Conv2d(8, 8, 4, padding=3, dilation=2, groups=4)
        self.b = nn.Conv2d(8, 8, (4, 2), padding="same", dilation=2, groups=2)
        self.c = nn.Conv2d(8, 2, 2, padding=2, dilation=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(self.stem(x))))))


class Padded(nn.Module):
    """An image-to-image generator whose padding, by F.pad and by padding_mode, mirrors or repeats the edges."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.stem, self.head = nn.Conv2d(3, 4, 7), nn.Conv2d(4, 2, 7)
        self.down = nn.Conv2d(4, 6, 3, 2, 1, padding_mode=mode)
        self.block = nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode=mode)
        self.even = nn.Conv2d(6, 6, (2, 4), padding="same", padding_mode=mode)
        self.up = nn.ConvTranspose2d(6, 4, 3, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(F.relu(self.stem(F.pad(x, (3, 3, 3, 3), mode=self.mode)))))
        y = y + self.even(F.relu(self.block(y)))
        return self.head(F.pad(F.relu(crop(self.up(y), x)), (3, 3, 3, 3), mode=self.mode))


class Valid(nn.Module):
    """Three unpadded convolutions, the image cropped to join them, zeros all round at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 6, 3, dilation=2), nn.Conv2d(9, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x))))
        return F.pad(self.c(torch.cat([y, x[:, :, 4:-4, 4:-4]], dim=1)), (5, 5, 5, 5))


class PartialConvolution(nn.Module):
    """Rescaled at the edges by how much of each window is image: a convolution of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 5, padding=2, bias=False), nn.Conv2d(6, 2, 3, padding=1)
        self.register_buffer("window", torch.ones(1, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        count = F.conv2d(torch.ones_like(x[:, :1]), self.get_buffer("window"), padding=2)
        return self.b(F.relu(self.a(x) * (25 / count)))


class Morphology(nn.Module):
    """Erosion as negated max pooling, dilation with a dilated window, and their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        opened = F.max_pool2d(-F.max_pool2d(-y, 3, 1, 1), 3, 1, 1)
        wide = F.max_pool2d(F.pad(y, (2, 2, 2, 2), value=float("-inf")), 3, 1, dilation=2)
        return self.b(torch.cat([y - opened, wide - y], dim=1))


# Per pixel ---------------------------------------------------------------------------------------------------------


class SpatialAttention(nn.Module):
    """A map of one channel, from the mean and maximum over channels, multiplies all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.map, self.b = conv(3, 8), nn.Conv2d(2, 1, 7, padding=3), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        pooled = torch.cat([y.mean(dim=1, keepdim=True), y.max(dim=1, keepdim=True).values], dim=1)
        return self.b(y * torch.sigmoid(self.map(pooled)))


class ChannelAttention(nn.Module):
    """Each pixel weighs its own channels by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weights, self.b = conv(3, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return F.log_softmax(self.b(y * self.weights(y).softmax(dim=1)), dim=1)


class TwoHeads(nn.Module):
    """Two outputs, near and far-sighted, merged by maximum where one is large and by a mean elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = conv(3, 8)
        self.near, self.far = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 3, padding=5, dilation=5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        near, far = self.near(y), self.far(y)
        return torch.where(near.abs() > 1, torch.maximum(near, far), (near + far) / 2)


class Channels(nn.Module):
    """Channels stacked, unbound, chunked, split, narrowed and indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 12), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(9, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        first, second, third = y.chunk(3, dim=1)
        stacked = torch.stack([self.b(first), self.b(second)], dim=2)
        low, high = stacked.unbind(dim=2)
        one, many = y.split([2, 10], dim=1)
        parts = [low * high, one, many.narrow(1, 3, 2), third[:, -1:]]
        return self.c(torch.cat(parts, dim=1))


class Broadcast(nn.Module):
    """Learned vectors of one value a channel: broadcast, expanded to the image, and joined to it as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), nn.Conv2d(8, 2, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.zeros(6))
        self.token = nn.Parameter(torch.ones(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.scale
        y = y + self.shift.view(1, -1, 1, 1).expand_as(y)
        return self.b(torch.cat([y, self.token.expand(-1, -1, *x.shape[-2:])], dim=1))


class Dropout(nn.Module):
    """Three kinds of dropout, idle in eval mode, and an image scaled by stored means and deviations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1))
        self.layers = nn.Sequential(
            conv(3, 6), nn.Dropout(0.3), conv(6, 6), nn.Dropout2d(0.3), nn.Conv2d(6, 6, 3, padding=1), nn.SELU()
        )
        self.drop, self.head = nn.AlphaDropout(0.3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.get_buffer("mean")) / self.get_buffer("deviation")
        return self.head(self.drop(self.layers(x)))


class Gated(nn.Module):
    """Half of the channels gate the other half, by GLU and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(6, 8, 3, padding=2, dilation=2)
        self.c = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.b(F.glu(self.a(x), dim=1)).tensor_split(2, dim=1)
        return self.c(F.elu(value) * torch.sigmoid(gate))


class Prototypes(nn.Module):
    """Cosine similarity of each pixel with learned vectors, through F.normalize on both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Conv2d(8, 6, 3, padding=1)
        self.prototypes = nn.Parameter(torch.randn(4, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(self.b(self.a(x)), dim=1)
        return 10 * F.conv2d(features, F.normalize(self.prototypes, dim=1))


class Denoiser(nn.Module):
    """The same block five times over, its result taken from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.block, self.b = conv(3, 6), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        for _ in range(5):
            y = y + 0.2 * F.leaky_relu(self.block(y), 0.1)
        return (x - self.b(y)).clamp(-50, 50)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "unet bilinear": resized("bilinear"),
    "unet bilinear corners": resized("bilinear", corners=True),
    "unet bilinear corners padded": lambda: UNet(
        lambda: nn.MaxPool2d(2),
        lambda: Doubled(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), pad_around),
    ),
    "unet bicubic": resized("bicubic"),
    "unet bicubic corners": resized("bicubic", corners=True),
    "unet nearest": resized("nearest"),
    "unet nearest exact": resized("nearest-exact"),
    "unet transposed": transposed(2),
    "unet transposed overlapping": transposed(4, 1),
    "unet transposed output padding": transposed(3, 1, 1),
    "unet transposed depthwise": transposed(4, 1, groups=6),
    "unet transposed to size": lambda: UNet(max_pool, lambda: ToOutputSize(6)),
    "unet average pooled": averaged(3, 1, counted=True),
    "unet average pooled uncounted": averaged(3, 1, counted=False),
    "unet average pooled even": averaged(2, 0, counted=True),
    "unet average pooled even uncounted": averaged(4, 1, counted=False),
    "unet average pooled divisor": averaged(4, 1, counted=True, divisor=9),
    "unet strided": lambda: UNet(lambda: nn.Conv2d(6, 6, 3, 2, 1), lambda: Resized("bilinear")),
    "nested unet": NestedUNet,
    "attention unet": AttentionUNet,
    "valid unet": ValidUNet,
    "resnet fcn": ResNetFCN,
    "fcn8": FCN8,
    "deeplab": DeepLab,
    "fpn": FPN,
    "hrnet": HRNet,
    "mobilenet": MobileNet,
    "convnext": ConvNeXt,
    "layer norm by hand": NormedByHand,
    "densenet": DenseNet,
    "efficientnet": EfficientNet,
    "shufflenet": ShuffleNet,
    "small image resnet": SmallImageResNet,
    "enet": ENet,
    "weight standardised": WeightStandardised,
    "espcn": ESPCN,
    "nearest super-resolution": NearestSuperResolution,
    "shuffled super-resolution": ShuffledSuperResolution,
    "three halves": ThreeHalves,
    "unshuffled": Unshuffled,
    "depth to space": DepthToSpace,
    "focus": Focus,
    "stride three": StrideThree,
    "stride five": StrideFive,
    "gapped": Gapped,
    "laplacian": Laplacian,
    "image pyramid": ImagePyramid,
    "blur pool": BlurPool,
    "even kernels": EvenKernels,
    "dilated grouped even": DilatedGroupedEven,
    "reflect padded": lambda: Padded("reflect"),
    "replicate padded": lambda: Padded("replicate"),
    "valid": Valid,
    "partial convolution": PartialConvolution,
    "morphology": Morphology,
    "spatial attention": SpatialAttention,
    "channel attention": ChannelAttention,
    "two heads": TwoHeads,
    "channels": Channels,
    "broadcast": Broadcast,
    "dropout": Dropout,
    "gated": Gated,
    "prototypes": Prototypes,
    "denoiser": Denoiser,
}


# What looks too far ------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Conv2d(3, 4, 3, padding=1), middle, nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(F.relu(self.a(x))))


class SqueezeExcitation(nn.Module):
    """Channels weighed by their means over the image, by pooling or by mean over (2, 3)."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled, self.a, self.b = pooled, nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x, 1) if self.pooled else x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.b(F.relu(self.a(means))))


class ImagePooling(nn.Module):
    """DeepLab's branch of the whole image, resized back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=6, dilation=6), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + resize(F.relu(self.b(F.adaptive_avg_pool2d(x, 1))), x)


class TrainingBatchNorm(nn.Module):
    """A batch norm that never leaves training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt's second norm: each channel by its length over the image, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        length = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
        y = y + self.weight * (y * length / (length.mean(dim=-1, keepdim=True) + 1e-6)) + self.bias
        return y.permute(0, 3, 1, 2)


class SelfAttention(nn.Module):
    """Every pixel of a coarse map attends to all others."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        small = F.avg_pool2d(x, 8, ceil_mode=True)
        query, key, value = (part(small).flatten(2) for part in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key / 2, dim=-1)
        return x + resize((value @ weights.transpose(1, 2)).view_as(small), x)


def layer_norm_over_space(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:])


def layer_norm_by_hand(x: Tensor) -> Tensor:
    return (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-5)


def softmax_over_pixels(x: Tensor) -> Tensor:
    return x.flatten(2).softmax(dim=-1).view_as(x)


def stretch(x: Tensor) -> Tensor:
    return (x - x.amin((2, 3), keepdim=True)) / (x.amax((2, 3), keepdim=True) + 1)


def filter_by_fourier(x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:])


def warp(x: Tensor) -> Tensor:
    return F.grid_sample(x, torch.tanh(x[:, :2]).permute(0, 2, 3, 1), align_corners=False)


def pool_to_seven(x: Tensor) -> Tensor:
    return x + resize(F.adaptive_avg_pool2d(x, 7), x)


def unpool(x: Tensor) -> Tensor:
    small, indices = F.max_pool2d(x, 2, return_indices=True, ceil_mode=True)
    return F.max_unpool2d(small, indices, 2, output_size=x.shape[-2:])


STATISTICS = "whole-image statistics"
ANYWHERE = "any pixel of"

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group norm": (lambda: Between(nn.GroupNorm(2, 4)), STATISTICS),
    "instance norm": (lambda: Between(nn.InstanceNorm2d(4, affine=True)), STATISTICS),
    "squeeze and excitation": (lambda: Between(SqueezeExcitation(pooled=True)), STATISTICS),
    "squeeze and excitation by mean": (lambda: Between(SqueezeExcitation(pooled=False)), STATISTICS),
    "image pooling": (lambda: Between(ImagePooling()), STATISTICS),
    "global max pooling": (lambda: Between(lambda x: x * F.adaptive_max_pool2d(x, 1)), STATISTICS),
    "global maximum": (lambda: Between(lambda x: x / (x.amax((2, 3), keepdim=True) + 1)), STATISTICS),
    "stretch": (lambda: Between(stretch), STATISTICS),
    "strip pooling": (lambda: Between(lambda x: x + x.mean(dim=3, keepdim=True)), STATISTICS),
    "layer norm over space": (lambda: Between(layer_norm_over_space), STATISTICS),
    "layer norm over space by hand": (lambda: Between(layer_norm_by_hand), STATISTICS),
    "softmax over pixels": (lambda: Between(softmax_over_pixels), STATISTICS),
    "batch norm in training mode": (lambda: Between(TrainingBatchNorm()), STATISTICS),
    "batch norm without running statistics": (
        lambda: Between(nn.BatchNorm2d(4, track_running_stats=False)),
        STATISTICS,
    ),
    "global response norm": (lambda: Between(GlobalResponseNorm()), STATISTICS),
    "self-attention": (lambda: Between(SelfAttention()), "any pixel of the image"),
    "fourier filter": (lambda: Between(filter_by_fourier), ANYWHERE),
    "sorted rows": (lambda: Between(lambda x: x.sort(dim=-1).values), ANYWHERE),
    "running sum": (lambda: Between(lambda x: x.cumsum(dim=-1) / 100), ANYWHERE),
    "warp": (lambda: Between(warp), ANYWHERE),
    "circular padding": (
        lambda: Between(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        "circular padding",
    ),
    "rolled": (lambda: Between(lambda x: x + x.roll(3, dims=-1)), ANYWHERE),
    "flipped": (lambda: Between(lambda x: x + x.flip(-2)), ANYWHERE),
    "height and width transposed": (lambda: Between(lambda x: x.transpose(2, 3)), "height and width"),
    "pooling to seven": (lambda: Between(pool_to_seven), "adaptive_avg_pool2d"),
    "noise": (lambda: Between(lambda x: x + torch.randn_like(x)), "random"),
    "max unpooling": (lambda: Between(unpool), "pooling indices"),
}
