"""A small embedder: images to features that a margin head can tell apart."""

from __future__ import annotations

from torch import Tensor, nn

from .feature_norm import FeatureNorm


class _Residual(nn.Module):
    """Two convolutions around a shortcut; group norm, which looks at one sample alone, so that a run does not depend
    on how its batch is cut."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, wider, 3, stride, 1, bias=False),
            nn.GroupNorm(8, wider),
            nn.PReLU(wider),
            nn.Conv2d(wider, wider, 3, 1, 1, bias=False),
            nn.GroupNorm(8, wider),
        )
        same = stride == 1 and channels == wider
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, wider, 1, stride, bias=False)
        self.activation = nn.PReLU(wider)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class SmallEmbedder(nn.Module):
    """(batch, 3, height, width) -> (batch, dim), for images of any size from 16 on."""

    def __init__(self, dim: int = 128, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.PReLU(width))
        self.stages = nn.Sequential(
            _Residual(width, 2 * width, 2), _Residual(2 * width, 4 * width, 2), _Residual(4 * width, 4 * width, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.project = nn.Linear(16 * width, dim, bias=False)
        self.feature_norm = FeatureNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.feature_norm(self.project(self.pool(self.stages(self.stem(images))).flatten(1)))
